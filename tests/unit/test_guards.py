"""Promises of the guards: a spike is a loss that jumps, and nothing else; a plateau is no improvement for a while."""

import math
import random
from collections.abc import Iterable

import pytest

from rxt_platform.config.stage_base import EarlyStopping
from rxt_platform.config.training import SpikeConfig
from rxt_platform.training.guards import Plateau, SpikeError, SpikeGuard

WINDOW = 20


def guard_after(losses: Iterable[float], factor: float = 8.0, window: int = WINDOW) -> SpikeGuard:
    """A guard that saw these losses as the engine shows them; none of them is a spike."""
    guard = SpikeGuard(SpikeConfig(factor=factor, window=window))
    for step, loss in enumerate(losses):
        guard.check(step, loss)
        guard.add(loss)
    return guard


def noisy(count: int, level: float, noise: float = 0.1) -> list[float]:
    drawn = random.Random(0)
    return [level + drawn.gauss(0, noise) for _ in range(count)]


def test_a_spike_raises_with_its_step_its_loss_and_the_usual_one() -> None:
    guard = guard_after(noisy(WINDOW, 2.0))
    with pytest.raises(SpikeError, match=r"step 8: the loss is 4\.5, the recent ones are around (1\.9|2\.0)") as raised:
        guard.check(7, 4.5)
    assert raised.value.step == 7
    guard.check(8, 2.1)  # the spike itself is no part of the window


@pytest.mark.parametrize("factor", [3.0, 7.0])
def test_a_spike_is_further_above_the_median_than_factor_median_deviations(factor: float) -> None:
    guard = guard_after([0.9, 1.0, 1.1, 1.2] * (WINDOW // 4), factor)
    median, deviation = 1.05, 0.1
    guard.check(WINDOW, median + (factor - 0.01) * deviation)
    with pytest.raises(SpikeError):
        guard.check(WINDOW, median + (factor + 0.01) * deviation)


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    guard = guard_after([*noisy(WINDOW - 2, 2.0), 1e9])
    guard.check(WINDOW - 1, 1e9)
    guard.add(2.0)
    with pytest.raises(SpikeError):
        guard.check(WINDOW, 1e12)


@pytest.mark.parametrize("slope", [-0.05, 0.05])
def test_a_slow_drift_is_no_spike(slope: float) -> None:
    guard_after(10 + slope * step for step in range(5 * WINDOW))


def test_normal_noise_is_no_spike_to_the_default_guard() -> None:
    """About one step in 45,000 would be; with a window of 20 one in 2,400."""
    guard_after(noisy(3000, 2.0), SpikeConfig().factor, SpikeConfig().window)


@pytest.mark.parametrize("level", [2.0, -0.9])
def test_a_loss_that_hardly_moves_makes_no_small_change_a_spike(level: float) -> None:
    """Half the losses are equal, so their median deviation is 0; a change of half a percent is still no spike."""
    guard = guard_after([level] * WINDOW)
    guard.check(WINDOW, level + 0.005 * abs(level))
    with pytest.raises(SpikeError):
        guard.check(WINDOW, level + 0.05 * abs(level))


def test_a_loss_that_falls_far_is_no_spike() -> None:
    guard_after(noisy(WINDOW, 2.0)).check(WINDOW, -100.0)


def test_only_the_last_window_of_losses_is_kept() -> None:
    losses = noisy(3 * WINDOW, 2.0)
    guard = guard_after(losses)
    assert guard.recent == losses[-WINDOW:]
    again = SpikeGuard(guard.config, guard.recent)  # as after a resume
    with pytest.raises(SpikeError):
        again.check(0, 100.0)


@pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_not_kept(loss: float) -> None:
    guard = guard_after(noisy(WINDOW, 2.0))
    before = guard.recent
    guard.add(loss)
    assert guard.recent == before


def test_without_a_configuration_nothing_is_a_spike_and_nothing_is_kept() -> None:
    guard = SpikeGuard(None)
    for step in range(2 * WINDOW):
        guard.add(1.0)
        guard.check(step, 1e9)
    assert guard.recent == []


def after(values: Iterable[float], **rule: object) -> Plateau:
    plateau = Plateau()
    for value in values:
        plateau = plateau.after(value, EarlyStopping.model_validate({"every": 1, **rule}))
    return plateau


def test_a_plateau_counts_measurements_without_an_improvement() -> None:
    assert after([3.0, 2.0, 2.5, 1.9]) == Plateau(1.9, 0)
    assert after([3.0, 2.0, 2.5, 2.0]) == Plateau(2.0, 2)
    assert after([2.0, 1.95, 1.92, 1.85], threshold=0.1) == Plateau(1.85, 0), "small steps add up"
    assert after([2.0, 1.95, 1.92], threshold=0.1) == Plateau(2.0, 2)
    assert after([0.5, 0.6, 0.55], highest=True) == Plateau(0.6, 1)


def test_what_is_not_a_number_is_no_improvement() -> None:
    assert after([2.0, math.nan, math.inf]) == Plateau(2.0, 2)
    assert after([math.nan, 2.0]) == Plateau(2.0, 0)
    assert after([math.nan, math.nan]) == Plateau(None, 2)

"""Promises of the confidence intervals."""

from collections.abc import Callable

import numpy as np
import pytest

from rxt_platform.evaluation.intervals import Bootstrap, Interval, gain_interval, share_interval

Method = Callable[[np.ndarray, np.ndarray], Interval]


def of(values: np.ndarray, counts: np.ndarray | None = None, seed: int = 0) -> list[float] | None:
    counts = np.ones(len(values)) if counts is None else counts
    return Bootstrap(len(values), seed).interval(values.astype(float), counts.astype(float))


def share(values: np.ndarray, counts: np.ndarray | None = None) -> list[float] | None:
    counts = np.ones(len(values)) if counts is None else counts
    return share_interval(values.astype(float), counts.astype(float))


def width(interval: list[float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def test_the_interval_of_a_constant_mean_is_that_constant() -> None:
    assert of(np.full(12, 0.25)) == pytest.approx([0.25, 0.25], abs=1e-12)
    assert of(np.array([3.0, 6.0, 9.0] * 4), np.array([1, 2, 3] * 4)) == pytest.approx([3.0, 3.0], abs=1e-12)


@pytest.mark.parametrize("true", [0.02, 0.4, 0.96])
@pytest.mark.parametrize(("conversations", "most"), [(10, 20), (60, 4)])
@pytest.mark.parametrize("alike", [1.0, 4.0])
def test_the_interval_of_a_share_holds_the_true_one_19_times_of_20(
    true: float, conversations: int, most: int, alike: float
) -> None:
    """Up to `most` questions a conversation, which agree more than independent ones would."""
    generator = np.random.default_rng(5)
    trials, hits = 400, 0
    for _ in range(trials):
        asked = generator.integers(1, most + 1, conversations)
        right = generator.binomial(asked, generator.beta(alike * true, alike * (1 - true), conversations))
        low, high = share(right, asked) or (1.0, 0.0)
        hits += low <= true <= high
    assert hits / trials >= 0.92


@pytest.mark.parametrize("conversations", [20, 100])
@pytest.mark.parametrize(("share_right", "lost"), [(0.6, 0.01), (0.6, 0.05), (0.9, 0.9), (0.5, 0.0)])
def test_the_interval_of_a_gain_holds_the_true_one_19_times_of_20(
    conversations: int, share_right: float, lost: float
) -> None:
    """What is right without memory is right with it: a share `lost` of the right answers needs the memory."""
    generator = np.random.default_rng(6)
    trials, hits = 400, 0
    for _ in range(trials):
        right = (generator.random(conversations) < share_right).astype(float)
        reset = right * (generator.random(conversations) >= lost)
        low, high = gain_interval(right, reset, np.ones(conversations)) or (1.0, 0.0)
        hits += low <= share_right * lost <= high
    assert hits / trials >= 0.92


def test_a_gain_that_comes_with_the_share_it_is_over_is_known_better_than_one_that_does_not() -> None:
    right = (np.arange(60) % 2).astype(float)
    same, other = (gain_interval(right, one, np.ones(60)) for one in (right, 1 - right))
    assert width(same) < 0.6 * width(gain_interval(right, np.repeat([0.0, 1.0], 30), np.ones(60)))
    assert width(other) > 1.2 * width(gain_interval(right, np.repeat([0.0, 1.0], 30), np.ones(60)))
    assert same == pytest.approx([-width(same) / 2, width(same) / 2])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_was_always_right_may_still_be_wrong(value: float) -> None:
    for conversations in range(10, 300):
        low, high = share(np.full(conversations, value)) or (0.5, 0.5)
        assert (high if value else low) == value, "rounding takes nothing away"
        assert 3 / conversations < high - low < 8 / conversations  # the rule of three: 3/n, one-sided
    ones, zeros = np.ones(40), np.zeros(40)
    low, high = gain_interval(ones, zeros, ones) or (1.0, 0.0)
    assert 0.75 < low < high == 1.0


def test_answers_that_are_more_even_than_chance_tell_no_more_than_independent_ones() -> None:
    """Five of ten right in each conversation."""
    independent = 2 * 1.96 * (0.25 / 600) ** 0.5
    assert width(share(np.full(60, 5), np.full(60, 10))) == pytest.approx(independent, rel=0.05)


def test_one_mistake_more_changes_little() -> None:
    asked = np.full(200, 10.0)
    lows = []
    for mistakes in range(4):
        right = asked.copy()
        right[:mistakes] -= 1
        low, _ = share_interval(right, asked) or (0.0, 0.0)
        lows.append(low)
    assert np.abs(np.diff(lows)).max() < 0.001


def test_the_interval_of_a_mean_holds_the_true_one_about_19_times_of_20() -> None:
    generator = np.random.default_rng(7)
    found = [of(generator.normal(2.0, 1.0, 10), seed=trial) or [1.0, 0.0] for trial in range(400)]
    assert 0.92 <= np.mean([low <= 2.0 <= high for low, high in found]) <= 0.98


@pytest.mark.parametrize("method", [of, share])
def test_the_interval_is_as_wide_as_the_normal_approximation_says(method: Method) -> None:
    low, high = method(np.arange(400) % 4 == 0, np.ones(400)) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("method", [of, share])
def test_questions_of_one_conversation_count_as_one_opinion(method: Method) -> None:
    """Ten questions that are all right or all wrong tell no more than one; ten independent ones do."""
    right = np.arange(40) % 2
    one, ten = method(right, np.ones(40)), method(10 * right, np.full(40, 10))
    assert one == pytest.approx(ten, abs=0.01)
    assert width(method(np.arange(400) % 2, np.ones(400))) < 0.5 * width(one)


@pytest.mark.parametrize("method", [of, share])
def test_conversations_weigh_what_they_hold(method: Method) -> None:
    low, high = method(np.array([1.0] * 20 + [0.0] * 20), np.array([9] * 20 + [1] * 20)) or (0.0, 0.0)
    assert low < 20 / 200 < high
    assert high < 0.2


def test_few_conversations_say_nothing_of_the_spread() -> None:
    for asked in (0, 1, 9):
        counts = np.array([1] * asked + [0] * (40 - asked))
        assert of(counts // 2, counts) is None
        assert share(counts // 2, counts) is None
        assert gain_interval(counts.astype(float), 0.0 * counts, counts.astype(float)) is None
    counts = np.array([1] * 10 + [0] * 30)
    assert of(counts, counts) is not None
    assert share(counts, counts) is not None
    assert gain_interval(counts.astype(float), 0.0 * counts, counts.astype(float)) is not None


def test_the_seed_decides() -> None:
    values = np.arange(30) % 3
    assert of(values, seed=1) == of(values, seed=1) != of(values, seed=2)


def test_totals_are_summed_by_conversation() -> None:
    totals = Bootstrap(3, 0).totals([(0, (1, 2)), (2, (5, 6)), (0, (10, 20))], 2)
    assert totals.tolist() == [[11, 22], [0, 0], [5, 6]]

"""Promises of the learning rate: how it rises and falls over a stage, and which components get it."""

import math
from typing import Any

import pytest
import torch

from rxt_platform.config.stage_base import Component, OptimizerConfig
from rxt_platform.model.parameters import component_of
from rxt_platform.stages.base import Phase
from rxt_platform.training.optimizer import build_optimizer, schedule, set_learning_rates
from tests.unit.helpers import tiny_config, tiny_model

STEPS = 40
KINDS = ["cosine", "wsd", "constant"]


def rates(steps: int = STEPS, **settings: Any) -> list[float]:
    """The rate of every step, as a share of `learning_rate`."""
    config = OptimizerConfig(learning_rate=3e-4, **settings)
    return [schedule(config, step, steps) / 3e-4 for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_warms_up_linearly_to_its_peak(kind: str) -> None:
    found = rates(schedule=kind, warmup=0.2)
    assert found[:8] == pytest.approx([step / 8 for step in range(1, 9)])
    assert found[8] == pytest.approx(1), "the first step after the warm-up"
    assert max(found) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_has_the_full_rate(kind: str) -> None:
    assert rates(schedule=kind, warmup=0)[0] == pytest.approx(1)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_falls_over_half_a_period_to_its_final_rate(final: float) -> None:
    found = rates(schedule="cosine", warmup=0.2, final=final)[8:]
    expected = [final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / 32)) for step in range(32)]
    assert found == pytest.approx(expected)
    assert found[16] == pytest.approx((1 + final) / 2), "half way down in the middle"


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_wsd_is_stable_and_then_falls_linearly_to_its_final_rate(final: float) -> None:
    found = rates(schedule="wsd", warmup=0.1, decay=0.25, final=final)
    assert found[4:31] == pytest.approx([1] * 27)
    assert found[30:] == pytest.approx([final + (1 - final) * (1 - step / 10) for step in range(10)])


def test_a_constant_rate_stays_whatever_decay_and_final_say() -> None:
    assert rates(schedule="constant", warmup=0, decay=1, final=0.5) == pytest.approx([1] * STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 1), (0.05, 0.2), (0.5, 0.5), (1, 0)])
def test_no_step_is_wasted_on_a_rate_of_zero(kind: str, steps: int, warmup: float, decay: float) -> None:
    found = rates(steps, schedule=kind, warmup=warmup, decay=decay)
    assert min(found) > 0
    assert max(found) <= 1


def test_wsd_without_decay_is_constant() -> None:
    assert rates(schedule="wsd", warmup=0, decay=0) == pytest.approx([1] * STEPS)


def test_a_phase_gives_its_components_their_rate_and_all_others_zero() -> None:
    """Groups of components that only another phase trains stay, so that ZeRO and the moments never change."""
    first: frozenset[Component] = frozenset({"decoder", "head"})
    phases = [Phase("first", 0, first), Phase("second", 5, first | {"memory_attention"})]
    config = OptimizerConfig(learning_rate=1.0, learning_rate_scale={"head": 0.5, "memory_attention": 0.0})
    optimizer = build_optimizer(tiny_model(), config, phases)

    def found() -> dict[str, float]:
        return {group["component"]: group["lr"] for group in optimizer.param_groups}

    set_learning_rates(optimizer, config, 0.2, phases[0])
    assert found() == {"decoder": 0.2, "head": 0.1, "memory_attention": 0.0}
    config = config.model_copy(update={"learning_rate_scale": {"memory_attention": 2.0}})
    set_learning_rates(optimizer, config, 0.2, phases[1])
    assert found() == {"decoder": 0.2, "head": 0.2, "memory_attention": 0.4}
    set_learning_rates(optimizer, config, 0.2, phases[0])
    assert found()["memory_attention"] == 0.0, "also after it was trained"


def test_a_component_without_a_rate_stays_bit_identical_through_an_update() -> None:
    """Weight decay included: it is multiplied by the rate."""
    phases = [Phase("first", 0, frozenset({"decoder"})), Phase("second", 5, frozenset({"decoder", "encoder"}))]
    config, model = OptimizerConfig(learning_rate=0.1, weight_decay=0.5), tiny_model()
    optimizer = build_optimizer(model, config, phases)
    set_learning_rates(optimizer, config, 0.1, phases[0])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {component_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"decoder"}


def test_only_what_some_phase_trains_requires_gradients() -> None:
    """Also not the frozen attention of the early encoders, although it is in a component that is trained."""
    encoder = {**tiny_config().encoder.model_dump(), "cross_attention": {"query_heads": 2, "key_value_heads": 2}}
    model = tiny_model(tiny_config(encoder=encoder))
    phases = [Phase("first", 0, frozenset({"head"})), Phase("second", 5, frozenset({"encoder"}))]
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0), phases)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted == {name for name, _ in model.named_parameters() if component_of(name) in ("head", "encoder")}
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert given == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

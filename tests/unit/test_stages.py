"""Promises of every training stage: its parts add up, its loss is a function of the batch, its phases hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rxt_platform.data.batches import collate
from rxt_platform.stages.build import mask_probability
from tests.unit.helpers import FIRST_WORD, batch_of, tiny_model
from tests.unit.stages import (
    KINDS,
    RANDOM,
    ROWS,
    TALKS,
    TEXTS,
    loss_of,
    metrics_of,
    stage_of,
    trained_components,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_and_gradients_of_two_halves_are_those_of_the_whole_batch(kind: str) -> None:
    stage = stage_of(kind, ROWS[kind], **RANDOM[kind])
    batch = stage.sampler.global_batch(0)
    whole, split = tiny_model(), tiny_model()
    report = loss_of(stage, whole, batch)
    report.loss.backward()
    parts = []
    for part in (batch.part(0, 1), batch.part(1, 4)):
        parts.append(loss_of(stage, split, part))
        parts[-1].loss.backward()
    sums = {name: sum(metrics_of(part)[name] for part in parts) for name in metrics_of(report)}
    assert sums == pytest.approx(metrics_of(report), abs=1e-6, rel=1e-6)
    for (name, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        if one.grad is None or other.grad is None:
            assert one.grad is other.grad is None, name
        else:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_a_function_of_model_and_batch(kind: str) -> None:
    stage, model = stage_of(kind, ROWS[kind], **RANDOM[kind]), tiny_model()
    batch = stage.sampler.global_batch(0)
    torch.manual_seed(1)
    once = loss_of(stage, model, batch)
    torch.manual_seed(2)  # the global generator plays no part
    assert metrics_of(loss_of(stage, model, batch)) == metrics_of(once)
    assert all(not value.requires_grad for value in once.metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_no_metric(kind: str) -> None:
    stage, model = stage_of(kind, ROWS[kind]), tiny_model()
    batch = stage.sampler.global_batch(0)
    wide = {name: F.pad(getattr(batch, name), (0, 3)) for name in ("ids", "mask", "targets", "hidden")}
    before, after = (metrics_of(loss_of(stage, model, b)) for b in (batch, replace(batch, **wide)))
    assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("kind", ["memory_pretraining", "memory_aware"])
def test_what_stands_in_the_turns_that_a_row_does_not_have_changes_nothing(kind: str) -> None:
    stage, model = stage_of(kind), tiny_model()
    batch = batch_of(TALKS)
    other = batch.ids.clone()
    other[~batch.turns] = FIRST_WORD + 5
    before, after = (metrics_of(loss_of(stage, model, b)) for b in (batch, replace(batch, ids=other)))
    assert after == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_phase_trains_exactly_its_components(kind: str) -> None:
    schedule = {"unfreeze_memory_attention": 1, "unfreeze_encoder": 1} if kind == "memory_aware" else {}
    stage = stage_of(kind, ROWS[kind], **schedule)
    batch = stage.sampler.global_batch(0)
    for phase in stage.phases():
        model = tiny_model()
        loss_of(stage, model, batch, phase).loss.backward()
        assert trained_components(model) == set(phase.trains), phase.name


def test_stages_read_the_rows_and_settings_of_their_kind() -> None:
    stages = {kind: stage_of(kind, ROWS[kind]).config for kind in KINDS}
    assert [config.section for config in stages.values()] == [
        "texts",
        "interactions",
        "conversations",
        "conversations",
    ]
    assert [mask_probability(config) for config in stages.values()] == [0.15, 0.15, 0.0, 0.0]
    masked = stage_of("joint_pretraining", TEXTS, loss={"mask_probability": 1.0}).sampler.global_batch(0)
    assert torch.equal(masked.hidden, masked.ids >= FIRST_WORD)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in KINDS), *(("joint_pretraining", {"trains": half}) for half in ("encoder", "decoder"))],
)
def test_a_stage_measures_what_its_configuration_says(kind: str, settings: dict[str, Any]) -> None:
    """By these names a configuration asks for the metric that ends the stage."""
    stage = stage_of(kind, ROWS[kind], **settings)
    report = stage.evaluate(tiny_model(), batch_of(ROWS[kind], 0.3), stage.phases()[-1])
    assert set(stage.config.metrics) == set(report.metrics) == set(stage.mean_over)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in KINDS), *(("joint_pretraining", {"trains": half}) for half in ("encoder", "decoder"))],
)
def test_a_held_out_metric_is_a_mean_over_what_it_counts(kind: str, settings: dict[str, Any]) -> None:
    """Parts of a batch of their own, weighted by `mean_over` as the engine does, give the metrics of the whole."""
    stage, model = stage_of(kind, ROWS[kind], **settings), tiny_model()
    phase = stage.phases()[-1]
    whole, seeds = batch_of(ROWS[kind], 0.3), batch_of(ROWS[kind]).seeds.tolist()
    numbers = range(len(seeds))
    parts = [collate(ROWS[kind][part], seeds[part], numbers[part], 0.3) for part in (slice(1), slice(1, None))]
    with torch.no_grad():
        reports = [stage.evaluate(model, part, phase).metrics for part in parts]
        expected = stage.evaluate(model, whole, phase).metrics
    for name, over in stage.mean_over.items():
        counts = [float(getattr(part, over)) for part in parts]
        mean = sum(float(one[name]) * count for one, count in zip(reports, counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(float(expected[name]), abs=1e-5), name

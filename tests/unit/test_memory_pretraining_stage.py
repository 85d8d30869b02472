"""Promises of stage 3: what the memory should hold, and that each write is an exercise of its own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform.config.stages import LabelWeights
from rxt_platform.data.batches import Batch
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import Stage
from rxt_platform.stages.memory_pretraining import by_slot, label_weight
from tests.unit.helpers import batch_of, gradients, tiny_model
from tests.unit.stages import (
    PROMPTED,
    TALKS,
    loss_of,
    mean_change,
    metrics_of,
    stage_of,
)


def test_label_weights_follow_the_published_schedule() -> None:
    weights = LabelWeights()
    centre = torch.tensor([0.5])
    values = [float(label_weight(weights, turn, centre)) for turn in range(6)]
    assert values == pytest.approx([0.9, 0.45, 0.40, 0.35, 0.30, 0.25])
    low, high = (label_weight(weights, 2, torch.tensor([draw])) for draw in (0.0, 1.0))
    assert (float(low), float(high)) == pytest.approx((0.25, 0.55)), "base - decay * i, 0.15 either way"
    assert float(label_weight(weights, 0, torch.tensor([1.0]))) == 1.0, "a weight stays between 0 and 1"
    assert float(label_weight(weights, 16, torch.tensor([0.0]))) == 0.0
    exact = label_weight(LabelWeights(random_factor=0.0), 1, torch.tensor([0.0, 0.3, 1.0]))
    assert exact.tolist() == pytest.approx([0.45] * 3)


def numbered_states(*lengths: int, width: int) -> tuple[Tensor, Tensor]:
    """States [1, B, T, 1] that say their own position, 100 in the padding."""
    mask = torch.arange(width) < torch.tensor([[length] for length in lengths])
    states = torch.arange(width, dtype=torch.float32).expand(len(lengths), -1).masked_fill(~mask, 100.0)
    return states[None, :, :, None], mask


def test_few_tokens_take_a_slot_each_and_leave_the_others() -> None:
    states, mask = numbered_states(3, 1, 4, width=6)
    content, filled = by_slot(states, mask, 4)
    assert filled.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]
    assert content[0, 0, :3, 0].tolist() == [0, 1, 2]
    assert content[0, 1, :1, 0].tolist() == [0]
    assert content[0, 2, :, 0].tolist() == [0, 1, 2, 3]


def test_many_tokens_are_shared_by_the_slots_as_means_of_segments() -> None:
    states, mask = numbered_states(8, 6, 7, width=9)
    content, filled = by_slot(states, mask, 4)
    assert filled.all()
    assert content[0, 0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert content[0, 1, :, 0].tolist() == [0.0, 1.5, 3.0, 4.5]  # segments 0, 1-2, 3, 4-5
    assert content[0, 2, :, 0].tolist() == [0.0, 1.5, 3.5, 5.5]  # segments 0, 1-2, 3-4, 5-6


@pytest.mark.parametrize("length", range(1, 24))
def test_every_token_is_in_exactly_one_slot_and_padding_in_none(length: int) -> None:
    mask = torch.arange(24)[None] < length
    marks = torch.eye(24)[None, None]  # each position its own channel
    content, _ = by_slot(marks, mask, 5)
    members = content[0, 0] > 0
    assert members.sum(dim=0).tolist() == [1] * length + [0] * (24 - length)


def plain_pretraining(model: ReactiveTransformer, stage: Stage, batch: Batch) -> tuple[Tensor, float]:
    """REF 3.3, row by row and write by write: every write is an exercise of its own, its memory given."""
    weights = stage.config.label_weights  # type: ignore[union-attr]
    terms, changes = [], []
    for row in range(len(batch.rows)):
        memory = model.initial_memory(batch.seeds[row : row + 1])
        for turn in range(int(batch.turns[row].sum())):
            length = int(batch.mask[row, turn].sum())
            ids = batch.ids[row : row + 1, turn, :length]
            real = torch.ones_like(ids, dtype=torch.bool)
            states = model.encode(ids, real).detach()
            content, filled = by_slot(states, real, memory.shape[2])
            weight = float(label_weight(weights, turn, torch.tensor([0.5])))
            target = memory.clone()
            target[:, :, filled[0]] = (1 - weight) * memory[:, :, filled[0]] + weight * content[:, :, filled[0]]
            written = model.write_states(memory, states, real)
            terms.append(-F.cosine_similarity(written, target, dim=-1).mean())
            changes.append(float((written.detach() - memory).norm() / memory.norm()))
            memory = written.detach()
    return torch.stack(terms).mean(), sum(changes) / len(changes)


@pytest.mark.parametrize("first", [0.9, 1.0])
def test_memory_pretraining_is_the_published_exercise_for_every_write_by_itself(first: float) -> None:
    """Also where the new interaction is all that counts: slots without a token of it keep what they held."""
    stage = stage_of("memory_pretraining", label_weights={"first": first, "random_factor": 0.0})
    batch, model, plain = batch_of(TALKS), tiny_model(), tiny_model()
    report = loss_of(stage, model, batch)
    expected, change = plain_pretraining(plain, stage, batch)
    assert metrics_of(report)["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert metrics_of(report)["memory_change"] == pytest.approx(change, abs=1e-5)
    report.loss.backward()
    expected.backward()
    for (name, got), wanted in zip(
        model.memory_attention.named_parameters(), plain.memory_attention.parameters(), strict=True
    ):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_only_the_memory_attention_gets_a_gradient_in_its_pretraining() -> None:
    stage, model = stage_of("memory_pretraining"), tiny_model()
    loss_of(stage, model, batch_of(TALKS)).loss.backward()
    reached = gradients(model)
    assert {component_of(name) for name in reached} == {"memory_attention"}
    assert all(size > 0 for size in reached.values())


@pytest.mark.parametrize(
    "settings", [{"input_noise": 0.5}, {"label_noise": 0.5}, {"label_weights": {"first": 0.2}}], ids=str
)
def test_noise_and_label_weights_change_the_exercise(settings: dict[str, Any]) -> None:
    model, batch = tiny_model(), batch_of(TALKS)
    plain, changed = (metrics_of(loss_of(stage_of("memory_pretraining", **s), model, batch)) for s in ({}, settings))
    assert abs(plain["loss"] - changed["loss"]) > 1e-4


def test_memory_pretraining_can_be_learned() -> None:
    stage, model, batch = stage_of("memory_pretraining"), tiny_model(), batch_of(TALKS)
    optimizer = torch.optim.Adam(model.memory_attention.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(stage, model, batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_a_change_of_the_memory_costs_what_the_published_term_says() -> None:
    """`sqrt(i) * MSE(new, old)` at write i, from 1, mean over all writes; with gradient to the new memory alone."""
    model, batch = tiny_model(), batch_of(TALKS)
    change = mean_change(model, batch)
    plain, costly = (
        metrics_of(loss_of(stage_of("memory_pretraining", memory_change_weight=weight), model, batch))
        for weight in (0.0, 0.1)
    )
    assert costly["total"] - plain["total"] == pytest.approx(0.1 * change, abs=1e-5)
    assert costly["loss"] == plain["loss"]


def test_a_system_prompt_is_the_first_thing_written_unless_it_is_not_wanted() -> None:
    stage = stage_of("memory_pretraining", PROMPTED)
    assert stage.sampler.global_batch(0).total_turns == sum(len(talk.turns) for talk in TALKS) + len(TALKS)
    without = stage_of("memory_pretraining", PROMPTED, system_prompts=False)
    rows = without.sampler.global_batch(0)
    assert torch.equal(rows.ids, stage_of("memory_pretraining").sampler.global_batch(0).ids)

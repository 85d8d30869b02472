"""Promises of stage 4: whole conversations, gradients through the writes, what is frozen and when."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.examples import Example
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import Phase, phase_at
from rxt_platform.stages.memory_pretraining import squared_change
from rxt_platform.stages.unroll import turn_groups
from tests.unit.helpers import (
    FIRST_WORD,
    batch_of,
    gradients,
    rows_of,
    tiny_config,
    tiny_model,
)
from tests.unit.stages import (
    ALL,
    PROMPT,
    PROMPTED,
    SINGLES,
    TALKS,
    answer_loss,
    loss_of,
    mean_change,
    metrics_of,
    stage_of,
)


def plain_conversations(model: ReactiveTransformer, batch: Batch) -> Tensor:
    """REF 3.4, one conversation and one turn at a time: decode, then write the reference interaction."""
    summed = torch.zeros(())
    for row in range(len(batch.rows)):
        memory = model.initial_memory(batch.seeds[row : row + 1])
        for turn in range(int(batch.turns[row].sum())):
            length = int(batch.mask[row, turn].sum())
            ids = batch.ids[row : row + 1, turn, :length]
            real = torch.ones_like(ids, dtype=torch.bool)
            start = length - int(batch.targets[row, turn].sum())
            summed = summed + answer_loss(model.decode(ids, real, memory)[0], ids[0], start)
            memory = model.write(memory, ids, real)
    return summed / batch.total_targets


def test_memory_aware_loss_and_gradient_are_those_of_turn_by_turn_conversations() -> None:
    stage, batch = stage_of("memory_aware", balance_weight=0.0), batch_of(TALKS)
    model, plain = tiny_model(), tiny_model()
    report, expected = loss_of(stage, model, batch), plain_conversations(plain, batch)
    assert metrics_of(report)["total"] == pytest.approx(float(expected.detach()), abs=1e-5)
    report.loss.backward()
    expected.backward()
    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            assert got.grad is not None, name
            torch.testing.assert_close(got.grad, wanted.grad, atol=2e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


WINDOWS: list[int | str] = [1, 2, 3, "all"]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_gradient_crosses_exactly_bptt_window_writes(window: int | str) -> None:
    """Of the last turn's loss alone. A word that stands in one turn only tells whether that turn's write is reached."""
    turns = [(2, FIRST_WORD + 2 * turn, FIRST_WORD + 2 * turn + 1, 3) for turn in range(4)]
    batch = batch_of([Example(tuple(turns), (2,) * 4)])
    targets = batch.targets.clone()
    targets[:, :3] = False
    stage, model = stage_of("memory_aware", bptt_window=window, balance_weight=0.0), tiny_model()
    loss_of(stage, model, replace(batch, targets=targets), ALL).loss.backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    reached = [bool(gradient[FIRST_WORD + 2 * turn].abs().max() > 0) for turn in range(3)]
    crossed = 4 if window == "all" else int(window)
    assert reached == [3 - turn <= crossed for turn in range(3)]


def test_the_value_of_the_loss_does_not_depend_on_the_window() -> None:
    model, batch = tiny_model(), batch_of(TALKS)
    values = [metrics_of(loss_of(stage_of("memory_aware", bptt_window=window), model, batch)) for window in WINDOWS]
    for other in values[:-1]:
        assert other == pytest.approx(values[-1], abs=1e-6)


def test_the_gradient_through_the_memory_agrees_with_finite_differences() -> None:
    decoder = tiny_config().decoder.model_dump()
    decoder["experts"]["per_token"] = 3  # no jumps between experts
    model, batch = tiny_model(tiny_config(decoder=decoder)), batch_of(TALKS)
    stage = stage_of("memory_aware")
    for name in (
        "memory_attention.layers.0.write_attention.value.weight",
        "memory_attention.mean_norm.weight",
        "memory_attention.layers.1.write_gate.linear.weight",
    ):
        weight = model.get_parameter(name)
        model.zero_grad()
        loss_of(stage, model, batch).loss.backward()
        assert weight.grad is not None
        size = float(weight.grad.norm())
        direction, start, step = weight.grad / size, weight.detach().clone(), 0.02
        values = []
        with torch.no_grad():
            for side in (1, -1):
                weight.copy_(start + side * step * direction)
                values.append(float(loss_of(stage, model, batch).loss))
            weight.copy_(start)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(size, rel=0.02), name


def test_memory_change_is_the_mean_relative_move_of_the_writes_that_are_read() -> None:
    model, batch = tiny_model(), batch_of(TALKS)
    moves = []
    with torch.no_grad():
        for row, talk in enumerate(TALKS):
            memory = model.initial_memory(batch.seeds[row : row + 1])
            for ids in talk.turns[:-1]:
                tokens = torch.tensor([ids])
                written = model.write(memory, tokens, torch.ones_like(tokens, dtype=torch.bool))
                moves.append(float((written - memory).norm() / memory.norm()))
                memory = written
    change = metrics_of(loss_of(stage_of("memory_aware"), model, batch))["memory_change"]
    assert change == pytest.approx(sum(moves) / len(moves), abs=1e-5)


def test_conversations_of_one_turn_are_no_problem() -> None:
    batch = batch_of(SINGLES)
    got = metrics_of(loss_of(stage_of("memory_aware", SINGLES), tiny_model(), batch))
    assert got["loss"] == pytest.approx(float(plain_conversations(tiny_model(), batch).detach()), abs=1e-5)
    assert got["memory_change"] == 0


DECODER = {"decoder", "memory_cross_attention", "head"}


@pytest.mark.parametrize(
    ("attention", "encoder", "expected"),
    [
        (0, 0, [(0, True, True)]),
        (1, 0, [(0, False, False), (2, True, True)]),
        (0, 1, [(0, True, False), (2, True, True)]),
        (1, 2, [(0, False, False), (2, True, False), (6, True, True)]),
        (0.5, 0.5, [(0, False, False), (1, True, False), (2, True, True)]),
    ],
)
def test_parts_are_unfrozen_after_their_epochs(
    attention: float, encoder: float, expected: list[tuple[int, bool, bool]]
) -> None:
    """Eight rows in batches of four: two steps an epoch."""
    stage = stage_of(
        "memory_aware", TALKS * 2, global_batch_size=4, unfreeze_memory_attention=attention, unfreeze_encoder=encoder
    )
    found = [
        (phase.start, "memory_attention" in phase.trains, {"encoder", "embedding"} <= phase.trains)
        for phase in stage.phases()
    ]
    assert found == expected
    assert all(phase.trains >= DECODER for phase in stage.phases())


def test_the_phase_of_a_step_is_the_last_that_started() -> None:
    phases = [Phase(name, start, frozenset()) for name, start in (("a", 0), ("b", 3), ("c", 7))]
    assert [phase_at(phases, step).name for step in (0, 2, 3, 6, 7, 99)] == ["a", "a", "b", "b", "c", "c"]


def test_frozen_parts_get_no_gradient_at_all() -> None:
    stage = stage_of("memory_aware", unfreeze_memory_attention=1, unfreeze_encoder=1)
    batch = batch_of(TALKS)
    for phase in stage.phases():
        model = tiny_model()
        loss_of(stage, model, batch, phase).loss.backward()
        assert {component_of(name) for name in gradients(model)} <= set(phase.trains), phase.name


def test_freezing_changes_gradients_and_never_the_loss() -> None:
    stage = stage_of("memory_aware", unfreeze_memory_attention=1, unfreeze_encoder=1)
    model, batch = tiny_model(), batch_of(TALKS)
    first, second, third = (metrics_of(loss_of(stage, model, batch, phase)) for phase in stage.phases())
    assert first == pytest.approx(third, abs=1e-6)
    assert second == pytest.approx(third, abs=1e-6)


def lengths_batch(*turns: int) -> Batch:
    """One row whose turns have these lengths."""
    return collate([Example(tuple(tuple(row) for row in rows_of(*turns)), (1,) * len(turns))], [0], [0])


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([10, 10, 10], [(0, 3, 10)]),
        ([10, 15], [(0, 2, 15)]),
        ([10, 16], [(0, 1, 10), (1, 2, 16)]),
        pytest.param([10, 15, 22, 33], [(0, 2, 15), (2, 4, 33)]),
        ([4, 12, 10, 3], [(0, 1, 4), (1, 3, 12), (3, 4, 3)]),
        ([7], [(0, 1, 7)]),
    ],
)
def test_neighbouring_turns_of_similar_length_share_a_forward(
    lengths: list[int], groups: list[tuple[int, int, int]]
) -> None:
    found = [(group.start, group.stop, length) for group, length in turn_groups(lengths_batch(*lengths))]
    assert found == groups


def test_turn_groups_cover_every_turn_once_at_the_length_of_its_longest_row() -> None:
    batch = batch_of(TALKS)
    covered = [turn for group, _ in turn_groups(batch) for turn in range(group.start, group.stop)]
    assert covered == list(range(batch.ids.shape[1]))
    for group, length in turn_groups(batch):
        assert length == int(batch.mask[:, group].sum(dim=-1).max())
    assert [group.stop for group, _ in turn_groups(batch, 2)][-1] == 2


def test_a_curriculum_shortens_the_conversations_of_its_steps() -> None:
    stage = stage_of("memory_aware", TALKS * 2, global_batch_size=4, curriculum=[{"turns": 2, "epochs": 1}])
    turns = [int(stage.sampler.global_batch(step).turns.sum(dim=1).max()) for step in range(4)]
    assert turns[:2] == [2, 2]
    assert max(turns[2:]) == 4


def test_a_change_of_the_memory_costs_what_the_published_term_says() -> None:
    """`sqrt(i) * MSE(new, old)` at write i, from 1, mean over the writes that are read."""
    model, batch = tiny_model(), batch_of(TALKS)
    change = mean_change(model, batch, last=-1)
    for window in (1, "all"):
        plain, costly = (
            metrics_of(loss_of(stage_of("memory_aware", memory_change_weight=weight, bptt_window=window), model, batch))
            for weight in (0.0, 0.1)
        )
        assert costly["total"] - plain["total"] == pytest.approx(0.1 * change, abs=1e-5)
        assert costly["loss"] == plain["loss"]


@pytest.mark.parametrize("window", [1, 2, "all"])
def test_after_a_reset_a_conversation_goes_on_from_its_initial_memory(window: int | str) -> None:
    """With probability 1 every turn is decoded over the initial memory; held-out rows are never reset."""
    model, batch = tiny_model(), batch_of(TALKS)
    stage = stage_of("memory_aware", reset_probability=1.0, bptt_window=window)
    summed = torch.zeros(())
    with torch.no_grad():
        for row, talk in enumerate(TALKS):
            memory = model.initial_memory(batch.seeds[row : row + 1])
            for ids, start in zip(talk.turns, talk.target_starts, strict=True):
                tokens = torch.tensor([ids])
                summed = summed + answer_loss(model.decode(tokens, None, memory)[0], tokens[0], start)
    got = metrics_of(loss_of(stage, model, batch))
    assert got["loss"] == pytest.approx(float(summed) / batch.total_targets, abs=1e-5)
    plain = stage_of("memory_aware", bptt_window=window)
    phase = stage.phases()[-1]
    assert metrics_of(stage.evaluate(model, batch, phase)) == metrics_of(plain.evaluate(model, batch, phase))


def test_about_the_given_share_of_turns_begins_anew_whatever_the_window() -> None:
    model = tiny_model()
    rows = [TALKS[0]] * 40
    batch = batch_of(rows)
    read: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[2].detach()))

    def forgotten(window: int | str) -> list[list[bool]]:
        read.clear()
        stage = stage_of("memory_aware", rows, reset_probability=0.3, bptt_window=window)
        with torch.no_grad():
            loss_of(stage, model, batch)
        turns = torch.cat([part.unflatten(1, (-1, len(rows))) for part in read], dim=1)  # [L, N, B, S, D]
        initial = model.initial_memory(batch.seeds)
        return [[torch.equal(turn[:, row], initial[:, row]) for row in range(len(rows))] for turn in turns.unbind(1)]

    found = forgotten("all")
    assert all(found[0]), "the first turn always is"
    counts = [sum(turn) for turn in found[1:]]
    assert all(4 <= count <= 22 for count in counts), counts
    assert len({tuple(turn) for turn in found[1:]}) == len(found) - 1, "each turn by itself"
    assert found == forgotten(1) == forgotten(2)


def test_a_system_prompt_is_written_before_the_first_turn_and_never_a_target() -> None:
    model, stage = tiny_model(), stage_of("memory_aware", PROMPTED, balance_weight=0.0)
    batch = stage.sampler.global_batch(0)
    summed, count = torch.zeros(()), 0
    with torch.no_grad():
        for row, seed in zip(batch.rows.tolist(), batch.seeds, strict=True):
            memory = model.write(model.initial_memory(seed[None]), torch.tensor([PROMPT]))
            for ids, start in zip(TALKS[row].turns, TALKS[row].target_starts, strict=True):
                tokens = torch.tensor([ids])
                summed = summed + answer_loss(model.decode(tokens, None, memory)[0], tokens[0], start)
                memory, count = model.write(memory, tokens), count + len(ids) - start
    assert batch.total_targets == count
    assert metrics_of(loss_of(stage, model, batch))["loss"] == pytest.approx(float(summed) / count, abs=1e-5)
    without = stage_of("memory_aware", PROMPTED, system_prompts=False).sampler.global_batch(0)
    assert torch.equal(without.ids, stage_of("memory_aware").sampler.global_batch(0).ids)


def test_a_curriculum_counts_turns_without_the_system_prompt() -> None:
    for settings, turns in (({}, 3), ({"system_prompts": False}, 2)):
        stage = stage_of("memory_aware", PROMPTED, curriculum=[{"turns": 2, "epochs": 1}], **settings)
        assert stage.sampler.global_batch(0).ids.shape[1] == turns


def test_the_cost_of_a_change_pulls_the_new_memory_to_the_old_one_and_never_the_other_way() -> None:
    old, new = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in (1, 2))
    squared_change(old, new, 4).sum().backward()
    assert old.grad is None
    assert new.grad is not None
    torch.testing.assert_close(new.grad, 2 * 2 * (new - old).detach() / (2 * 4 * 5))


@pytest.mark.parametrize("window", [1, 2, "all"])
def test_a_reset_takes_a_conversation_back_to_its_system_prompt(window: int | str) -> None:
    """Never before its first turn, and with no gradient to the prompt from what comes after."""
    stage = stage_of("memory_aware", PROMPTED, reset_probability=1.0, bptt_window=window)
    model, batch = tiny_model(), batch_of(PROMPTED)
    read: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[2].detach()))
    with torch.no_grad():
        loss_of(stage, model, batch)
        turns = torch.cat([part.unflatten(1, (-1, len(PROMPTED))) for part in read], dim=1)  # [L, N, B, S, D]
        initial = model.initial_memory(batch.seeds)
        told = model.write(initial, torch.tensor([PROMPT] * len(PROMPTED)))
    assert torch.equal(turns[:, 0], initial)
    for turn in range(1, turns.shape[1]):
        torch.testing.assert_close(turns[:, turn], told)

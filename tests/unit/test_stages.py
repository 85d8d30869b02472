"""Promises of the training stages: what each loss counts, where its gradient goes, and that parts add up."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from rxt_platform.config.stages import LabelWeights, StageConfig
from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.examples import Example
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import LossReport, Phase, Stage, phase_at
from rxt_platform.stages.build import build_stage, mask_probability
from rxt_platform.stages.memory_aware import turn_groups
from rxt_platform.stages.memory_pretraining import by_slot, label_weight
from tests.unit.helpers import FIRST_WORD, batch_of, conversation, gradients, rows_of, tiny_config, tiny_model

TALKS = [
    conversation((2, 3), (4, 2), (3, 5), (1, 4), seed=1),
    conversation((6, 2), (2, 2), seed=2),
    conversation((1, 1), (3, 3), (5, 2), seed=3),
    conversation((2, 6), (4, 4), seed=4),
]
SINGLES = [example.first_turns(1) for example in TALKS]
TEXTS = [Example(((2, *row, 3),), (1,)) for row in rows_of(9, 4, 14, 6)]
ROWS = {
    "joint_pretraining": TEXTS,
    "interaction_sft": SINGLES,
    "memory_pretraining": TALKS,
    "memory_aware": TALKS,
}
KINDS = list(ROWS)
_MASKING = {"mask_probability": 0.4, "mask_random": 0.3, "mask_kept": 0.2}
_JOINT = {"loss": {"memory_noise": 0.1, "memory_dropout": 0.2, "decoder_only": 0.4, **_MASKING}}
RANDOM: dict[str, dict[str, Any]] = {  # everything that draws random numbers switched on
    "joint_pretraining": _JOINT,
    "interaction_sft": _JOINT,
    "memory_pretraining": {"input_noise": 0.1, "label_noise": 0.1},
    "memory_aware": {},
}


def stage_of(kind: str, examples: Sequence[Example] = TALKS, **settings: Any) -> Stage:
    """A stage over these rows; all of them are one batch."""
    raw: dict[str, Any] = {"kind": kind, "epochs": 100, "global_batch_size": len(examples)}
    raw["optimizer"] = {"learning_rate": 1e-3}
    if kind == "joint_pretraining":
        raw["packing"] = 0
    if kind in ("joint_pretraining", "interaction_sft"):
        settings["loss"] = {"decoder_only": 0.0, **settings.get("loss", {})}
    config: StageConfig = TypeAdapter(StageConfig).validate_python({**raw, **settings})
    return build_stage(config, examples, seed=3, window=24)


def loss_of(stage: Stage, model: ReactiveTransformer, batch: Batch, phase: Phase | None = None) -> LossReport:
    """The loss in the stage's last phase, where everything that it ever trains does."""
    return stage.loss(model, batch, phase or stage.phases()[-1])


def metrics_of(report: LossReport) -> dict[str, float]:
    return {"total": float(report.loss.detach()), **{name: float(value) for name, value in report.metrics.items()}}


def trained_components(model: ReactiveTransformer) -> set[str]:
    """Components that a backward pass gave a gradient other than zero."""
    return {component_of(name) for name, size in gradients(model).items() if size > 0}


def answer_loss(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """Summed cross-entropy of one turn's tokens from `start` on, token by token: what DESIGN 2 says."""
    terms = [-logits[t - 1].log_softmax(dim=-1)[ids[t]] for t in range(start, len(ids))]
    return torch.stack(terms).sum()


# ---- every stage


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


# ---- joint pre-training and SFT


def joint(examples: Sequence[Example] = TEXTS, kind: str = "joint_pretraining", **loss: Any) -> Stage:
    return stage_of(kind, examples, loss=loss)


def test_the_decoder_s_loss_trains_the_embedding_but_no_encoder_layer() -> None:
    stage, model = joint(encoder_weight=0.0), tiny_model()
    loss_of(stage, model, batch_of(TEXTS, 0.3)).loss.backward()
    assert trained_components(model) == {"embedding", "decoder", "memory_cross_attention", "heads"}
    assert gradients(model).get("mlm_head.output.weight", 0) == 0


def test_the_encoder_s_loss_trains_encoder_embedding_and_its_head_but_no_decoder() -> None:
    stage, model = joint(decoder_weight=0.0), tiny_model()
    loss_of(stage, model, batch_of(TEXTS, 0.3)).loss.backward()
    assert trained_components(model) == {"embedding", "encoder", "heads"}
    assert gradients(model).get("decoder.head.weight", 0) == 0


def encoder_output(stage: Stage, model: ReactiveTransformer, batch: Batch) -> Tensor:
    """What the encoder gave while a loss was computed."""
    seen: list[Tensor] = []
    handle = model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss_of(stage, model, batch)
    handle.remove()
    (states,) = seen
    return states


def test_hidden_tokens_are_hidden_from_the_encoder() -> None:
    stage, model = joint(), tiny_model()
    batch = batch_of(TEXTS, 0.4)
    assert batch.hidden.any()
    states = encoder_output(stage, model, batch)
    swapped = batch.ids.masked_fill(batch.hidden, FIRST_WORD + 7)
    assert not torch.equal(swapped, batch.ids)
    assert torch.equal(encoder_output(stage, model, replace(batch, ids=swapped)), states)
    seen = batch.mask & ~batch.hidden & (batch.ids >= FIRST_WORD)
    others = batch.ids.masked_fill(seen, FIRST_WORD + 7)
    assert not torch.equal(encoder_output(stage, model, replace(batch, ids=others)), states)


def test_the_decoder_reads_the_clean_text() -> None:
    stage, model = joint(decoder_only=1.0), tiny_model()
    plain, hidden = (loss_of(stage, model, batch_of(TEXTS, share)).metrics["loss"] for share in (0.0, 0.5))
    assert float(hidden) == pytest.approx(float(plain), abs=1e-6)


def test_hidden_tokens_are_shown_as_mask_as_another_or_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT's way, in the shares that are asked for; the others are always shown as they are."""
    stage, model = joint(TEXTS * 40, mask_probability=0.5, mask_random=0.1, mask_kept=0.1), tiny_model()
    batch, shown = batch_of(TEXTS * 40, 0.5), list[Tensor]()
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda ids, *rest: shown.append(ids) or encode(ids, *rest))
    loss_of(stage, model, batch)
    (seen,), ids, hidden = shown, batch.ids[:, 0], batch.hidden[:, 0]
    assert torch.equal(seen[~hidden], ids[~hidden])
    masked, same = seen[hidden] == 4, seen[hidden] == ids[hidden]  # 4 is [MASK]
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.04)
    assert float(same.float().mean()) == pytest.approx(0.1, abs=0.04)
    assert seen[hidden][~masked].min() >= FIRST_WORD, "never a special token"
    others = seen[hidden][~masked & ~same]
    assert len(others.unique()) > 20, "drawn from the whole vocabulary"


def test_the_encoder_s_loss_is_over_the_hidden_tokens_only() -> None:
    stage, model = joint(), tiny_model()
    batch = batch_of(TEXTS, 0.4)
    with torch.no_grad():
        masked = batch.ids[:, 0].masked_fill(batch.hidden[:, 0], 4)  # 4 is [MASK]
        logits = model.mlm_head(model.encode(masked, batch.mask[:, 0])[-1])
        terms = [
            -logits[b, t].log_softmax(dim=-1)[batch.ids[b, 0, t]] for b, t in batch.hidden[:, 0].nonzero().tolist()
        ]
        expected = float(torch.stack(terms).mean())
    assert float(loss_of(stage, model, batch).metrics["masked_loss"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("kind", "rows"), [("joint_pretraining", TEXTS), ("interaction_sft", SINGLES)])
def test_the_decoder_s_loss_counts_all_tokens_of_texts_and_only_answers_of_interactions(
    kind: str, rows: list[Example]
) -> None:
    stage, model = joint(rows, kind), tiny_model()
    batch = batch_of(rows)
    summed = correct = count = 0.0
    with torch.no_grad():
        for row, example in enumerate(rows):
            ids, start = torch.tensor(example.turns[0]), example.target_starts[0]
            real = torch.ones(1, len(ids), dtype=torch.bool)
            logits = model.decode(ids[None], real, model.encode(ids[None], real))[0]
            summed += float(answer_loss(logits, ids, start))
            correct += int((logits[start - 1 : -1].argmax(dim=-1) == ids[start:]).sum())
            count += len(ids) - start
            assert batch.targets[row].sum() == len(ids) - start
    metrics = loss_of(stage, model, batch).metrics
    assert float(metrics["loss"]) == pytest.approx(summed / count, abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(correct / count)


def test_the_joint_loss_is_the_weighted_sum_of_its_parts() -> None:
    model, batch = tiny_model(), batch_of(TEXTS, 0.4)
    stage = joint(encoder_weight=0.5, decoder_weight=2.0, balance_weight=0.1)
    got = metrics_of(loss_of(stage, model, batch))
    expected = 0.5 * got["masked_loss"] + 2.0 * (got["loss"] + 0.1 * got["balance"])
    assert got["total"] == pytest.approx(expected, abs=1e-5)
    assert got["balance"] >= 0.9, "about 1 when balanced: a mean over rows and layers"


def test_a_query_is_no_target_in_sft() -> None:
    """Other queries of the same length change what is read, never what is counted: the head's labels are answers."""
    stage, model = joint(SINGLES, "interaction_sft", encoder_weight=0.0, balance_weight=0.0), tiny_model()
    batch = batch_of(SINGLES)
    loss_of(stage, model, batch).loss.backward()
    head = model.decoder.head.bias.grad
    assert head is not None
    answers = {token for example in SINGLES for token in example.turns[0][example.target_starts[0] :]}
    others = [token for token in range(len(head)) if token not in answers]
    assert (head[others] > 0).all(), "a token that is no target is only ever pushed down"
    assert any(float(head[token]) < 0 for token in answers)


def shaken_encoder(scale: float = 0.5) -> ReactiveTransformer:
    """The usual model with other encoder layers."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def test_decoder_only_rows_do_not_read_the_encoder() -> None:
    batch = batch_of(TEXTS, 0.2)

    def decoder_loss(share: float, model: ReactiveTransformer) -> float:
        return float(loss_of(joint(decoder_only=share), model, batch).metrics["loss"])

    assert decoder_loss(1.0, tiny_model()) == pytest.approx(decoder_loss(1.0, shaken_encoder()), abs=1e-6)
    assert abs(decoder_loss(0.0, tiny_model()) - decoder_loss(0.0, shaken_encoder())) > 1e-4


def test_decoder_only_rows_read_their_initial_memory() -> None:
    model, batch = tiny_model(), batch_of(SINGLES)
    with torch.no_grad():
        logits = model.decode(batch.ids[:, 0], batch.mask[:, 0], model.initial_memory(batch.seeds))
        summed = sum(
            answer_loss(logits[row], torch.tensor(example.turns[0]), example.target_starts[0])
            for row, example in enumerate(SINGLES)
        )
    for stage, use in (
        (joint(SINGLES, "interaction_sft", decoder_only=1.0), "loss"),
        (joint(SINGLES, "interaction_sft"), "evaluate"),
    ):
        report = getattr(stage, use)(model, batch, stage.phases()[0])
        assert float(report.metrics["loss"]) == pytest.approx(float(summed) / batch.total_targets, abs=1e-5)


def test_about_the_given_share_of_rows_is_decoder_only() -> None:
    model = tiny_model()
    rows = [TEXTS[0]] * 64
    batch = batch_of(rows)

    def row_losses(share: float) -> list[float]:
        stage = joint(rows, decoder_only=share)
        return [float(loss_of(stage, model, batch.part(i, i + 1)).metrics["loss"]) for i in range(64)]

    alone, reading, mixed = row_losses(1.0), row_losses(0.0), row_losses(0.5)
    is_alone = [abs(m - a) < 1e-7 for m, a in zip(mixed, alone, strict=True)]
    is_reading = [abs(m - r) < 1e-6 for m, r in zip(mixed, reading, strict=True)]
    assert all(a != r for a, r in zip(is_alone, is_reading, strict=True)), "each row is either"
    assert 16 <= sum(is_alone) <= 48


@pytest.mark.parametrize("effect", ["memory_noise", "memory_dropout"])
def test_noise_and_dropout_disturb_what_the_decoder_reads_and_nothing_else(effect: str) -> None:
    model, batch = tiny_model(), batch_of(TEXTS, 0.3)
    plain, disturbed = (metrics_of(loss_of(joint(**{effect: level}), model, batch)) for level in (0.0, 0.5))
    assert abs(plain["loss"] - disturbed["loss"]) > 1e-5
    assert plain["masked_loss"] == disturbed["masked_loss"]
    other = replace(batch, seeds=batch.seeds + 1)
    assert metrics_of(loss_of(joint(**{effect: 0.5}), model, other))["loss"] != disturbed["loss"], "by the row's seed"


def test_full_memory_dropout_leaves_one_position_to_read() -> None:
    model, batch = tiny_model(), batch_of(TEXTS)
    with torch.no_grad():
        states = model.encode(batch.ids[:, 0], batch.mask[:, 0])[:, :, :1]
        logits = model.decode(batch.ids[:, 0], batch.mask[:, 0], states)
        summed = sum(answer_loss(logits[row], torch.tensor(text.turns[0]), 1) for row, text in enumerate(TEXTS))
    loss = loss_of(joint(memory_dropout=1.0), model, batch).metrics["loss"]
    assert float(loss) == pytest.approx(float(summed) / batch.total_targets, abs=1e-5)


# ---- memory pre-training


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


# ---- memory-aware training

ALL = Phase(
    "all", 0, frozenset({"decoder", "memory_cross_attention", "heads", "memory_attention", "encoder", "embedding"})
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


DECODER = {"decoder", "memory_cross_attention", "heads"}


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

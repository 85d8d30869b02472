"""Promises of stages 1 and 2: what encoder and decoder see, what counts, and where the gradient goes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_platform.data.batches import Batch
from rxt_platform.data.examples import Example
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import Stage
from rxt_platform.stages.build import mask_probability
from tests.unit.helpers import (
    FIRST_WORD,
    batch_of,
    gradients,
    tiny_model,
)
from tests.unit.stages import (
    SINGLES,
    TEXTS,
    answer_loss,
    loss_of,
    metrics_of,
    stage_of,
    trained_components,
)


def joint(examples: Sequence[Example] = TEXTS, kind: str = "joint_pretraining", **loss: Any) -> Stage:
    return stage_of(kind, examples, loss=loss)


def test_the_decoder_s_loss_trains_the_embedding_but_no_encoder_layer() -> None:
    stage, model = joint(encoder_weight=0.0), tiny_model()
    loss_of(stage, model, batch_of(TEXTS, 0.3)).loss.backward()
    assert trained_components(model) == {"embedding", "decoder", "memory_cross_attention", "head"}
    assert gradients(model).get("mlm_head.output.weight", 0) == 0


def test_the_encoder_s_loss_trains_encoder_embedding_and_its_head_but_no_decoder() -> None:
    stage, model = joint(decoder_weight=0.0), tiny_model()
    loss_of(stage, model, batch_of(TEXTS, 0.3)).loss.backward()
    assert trained_components(model) == {"embedding", "encoder", "mlm_head"}
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


def test_decoder_only_rows_can_leave_the_memory_path_as_it_is() -> None:
    """The loss is the same; memory cross-attention learns from the rows that read encoder states alone."""
    batch = batch_of(SINGLES)

    def trained(share: float, frozen: bool) -> tuple[float, dict[str, float]]:
        stage, model = joint(SINGLES, "interaction_sft", decoder_only=share, freeze_memory_path=frozen), tiny_model()
        report = loss_of(stage, model, batch)
        report.loss.backward()
        sizes = gradients(model)
        return float(report.loss.detach()), {
            n: size for n, size in sizes.items() if component_of(n) == "memory_cross_attention"
        }

    usual, frozen = trained(1.0, False), trained(1.0, True)
    assert frozen[0] == usual[0]
    assert all(size > 0 for size in usual[1].values())
    assert frozen[1], "a gradient of zero, which every strategy can reduce"
    assert not any(frozen[1].values())
    assert all(size > 0 for size in trained(0.5, True)[1].values())
    with pytest.raises(ValueError, match="freeze_memory_path has no effect with decoder_only 0"):
        trained(0.0, True)


def separate(half: str, examples: Sequence[Example] = TEXTS, kind: str = "joint_pretraining", **loss: Any) -> Stage:
    return stage_of(kind, examples, trains=half, loss=loss)


def test_the_separate_way_trains_the_encoder_as_a_masked_language_model_alone() -> None:
    stage, model, batch = separate("encoder"), tiny_model(), batch_of(TEXTS, 0.4)
    report = loss_of(stage, model, batch)
    together = loss_of(joint(), tiny_model(), batch).metrics
    assert float(report.metrics["loss"]) == float(together["masked_loss"])
    assert float(report.metrics["accuracy"]) == float(together["masked_accuracy"])
    report.loss.backward()
    assert trained_components(model) == {"embedding", "encoder", "mlm_head"}
    assert mask_probability(stage.config) == 0.15


@pytest.mark.parametrize(("kind", "rows"), [("joint_pretraining", TEXTS), ("interaction_sft", SINGLES)])
def test_the_separate_way_trains_the_decoder_over_a_frozen_embedding_and_a_random_memory(
    kind: str, rows: list[Example]
) -> None:
    """Without the encoder, its memory cross-attention as it is; the memory is near zero and each row's own."""
    stage, model, batch = separate("decoder", rows, kind), tiny_model(), batch_of(rows)
    read: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[2]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(component_of(name) in stage.phases()[0].trains)
    report = loss_of(stage, model, batch)
    report.loss.backward()
    assert trained_components(model) == {"decoder", "head"}
    (memory,) = read
    assert memory.shape == model.initial_memory(batch.seeds).shape
    assert float(memory.std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(memory[:, 0], memory[:, 1])
    assert float(report.metrics["loss"]) == float(loss_of(stage, shaken_encoder(), batch).metrics["loss"])
    other = loss_of(separate("decoder", rows, kind, random_memory=0.0), tiny_model(), batch).metrics
    assert float(other["loss"]) != float(report.metrics["loss"])
    assert mask_probability(stage.config) == 0.0


@pytest.mark.parametrize(
    ("half", "loss"),
    [
        ("encoder", {"decoder_only": 0.5}),
        ("decoder", {"mask_probability": 0.3}),
        ("decoder", {"decoder_weight": 2.0}),
        ("both", {"random_memory": 0.1}),
    ],
)
def test_a_setting_without_effect_is_refused(half: str, loss: dict[str, Any]) -> None:
    (name,) = loss
    with pytest.raises(ValueError, match=f"loss.{name} has no effect with trains: {half}"):
        stage_of("joint_pretraining", TEXTS, trains=half, loss=loss)
    config = separate(half).config
    assert type(config).model_validate(config.model_dump()) == config, "what is left out may be spelled out"

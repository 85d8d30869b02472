"""Packing changes no loss: texts that share a row are computed as if each were alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_platform.config.stages import JointPretrainingConfig
from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.examples import Example
from rxt_platform.model.documents import Documents
from rxt_platform.stages.joint import JointStage
from tests.unit.helpers import rows_of, sampler_of, tiny_config, tiny_model
from tests.unit.variants import CONFIGS

TEXTS = [Example(((2, *row, 3),), (1,)) for row in rows_of(9, 4, 14, 6, 1, 7)]
PACKS = [3, 1, 2]  # texts of each row


def stage_of(**loss: Any) -> JointStage:
    config = JointPretrainingConfig(
        kind="joint_pretraining",
        epochs=1,
        global_batch_size=3,
        optimizer={"learning_rate": 1e-3},  # type: ignore[arg-type]
        loss={"mask_probability": 0.4, **loss},  # type: ignore[arg-type]
    )
    return JointStage(config, sampler_of(TEXTS, 3))


def both(hidden: float = 0.4) -> tuple[Batch, Batch]:
    """The same texts packed and one a row, with the same tokens hidden."""
    packed = collate(TEXTS, [1, 2, 3], [0, 1, 2], hidden, PACKS)
    single = collate(TEXTS, [1, 1, 1, 2, 3, 3], range(6))  # the seeds of their packs: the memory they start from
    assert packed.documents is not None
    place = 0
    for row, count in enumerate(PACKS):
        for document in range(count):
            chosen = packed.hidden[row, 0][packed.documents[row] == document]
            single.hidden[place, 0, : len(chosen)] = chosen
            place += 1
    counts = {"total_hidden": packed.total_hidden}
    return packed, Batch(**{**vars(single), **counts})


def documents_of(batch: Batch) -> Documents:
    assert batch.documents is not None
    return Documents.of(batch.documents, batch.most_documents)


@pytest.mark.parametrize("decoder_only", [0.0, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_equals_unpacked_loss_for_every_variant(name: str, decoder_only: float) -> None:
    model = tiny_model(CONFIGS[name])
    stage = stage_of(decoder_only=decoder_only)
    packed, single = both()
    one, other = (stage.loss(model, batch, stage.phases()[0]) for batch in (packed, single))
    for metric, value in one.metrics.items():
        assert float(value) == pytest.approx(float(other.metrics[metric]), abs=1e-5), metric
    assert float(one.loss) == pytest.approx(float(other.loss), abs=1e-5)


def test_packed_gradients_equal_unpacked_ones() -> None:
    packed, single = both()
    gradients = []
    for batch in (packed, single):
        model = tiny_model()
        stage = stage_of(decoder_only=0.0)
        stage.loss(model, batch, stage.phases()[0]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_no_text_sees_its_neighbour() -> None:
    """Changing one text changes no state of another one, in encoder and decoder."""
    model = tiny_model()
    packed = collate(TEXTS, [1, 2, 3], [0, 1, 2], documents=PACKS)
    documents = documents_of(packed)
    ids, mask = packed.ids[:, 0], packed.mask[:, 0]
    changed = ids.clone()
    middle = packed.documents[0] == 1  # type: ignore[index]
    changed[0][middle] = (changed[0][middle] + 7) % 50 + 11

    def states(of: Tensor) -> tuple[Tensor, Tensor]:
        encoded = model.encode(of, mask, documents)
        return encoded, model.decode_states(of, mask, encoded, documents.together, documents=documents).states

    for before, after in zip(states(ids), states(changed), strict=True):
        same = (before == after).all(dim=-1)
        assert same[..., 0, ~middle].all()
        assert not same[..., 0, middle].any()
        assert same[..., 1:, :].all()


def test_positions_begin_anew_in_every_text_and_padding_is_its_own() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0]]), 2)
    assert documents.position.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert documents.number.tolist() == [[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]]
    assert documents.count == 6
    assert documents.causal[0].sum(dim=-1).tolist() == [1, 2, 1, 2, 3, 1]


@pytest.mark.parametrize("settings", [{"memory_noise": 0.2}, {"memory_dropout": 0.9}, {"decoder_only": 0.5}])
def test_what_is_drawn_does_not_depend_on_how_rows_are_shared(settings: dict[str, float]) -> None:
    model, stage = tiny_model(tiny_config()), stage_of(**{"decoder_only": 0.0, **settings})
    whole = collate(TEXTS, [1, 2, 3], [0, 1, 2], 0.4, PACKS)
    total = stage.loss(model, whole, stage.phases()[0])
    parts = [stage.loss(model, part, stage.phases()[0]) for rank in range(3) for part in whole.shares(rank, 3, 1)]
    assert torch.isfinite(total.loss)
    assert float(total.loss) == pytest.approx(sum(float(part.loss) for part in parts), abs=1e-5)
    for name, value in total.metrics.items():
        assert float(value) == pytest.approx(sum(float(part.metrics[name]) for part in parts), abs=1e-5), name


def lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.turns[0]) for example in examples]


def test_a_packed_row_holds_its_texts_one_after_the_other() -> None:
    packed = collate(TEXTS, [1, 2, 3], [0, 1, 2], documents=PACKS)
    assert packed.mask[:, 0].sum(dim=-1).tolist() == [
        sum(lengths(TEXTS[:3])),
        lengths(TEXTS)[3],
        sum(lengths(TEXTS[4:])),
    ]
    assert packed.total_texts == 6
    assert packed.total_rows == 3
    assert packed.total_targets == sum(lengths(TEXTS)) - 6

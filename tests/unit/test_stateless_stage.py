"""Promises of the baseline's stages: the same tokens as the Reactive Transformer's, each row with its whole history."""

from typing import Any

import pytest
import torch

from rxt_platform.config.run import trains_without_memory
from rxt_platform.errors import ConfigError
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.stages.build import build_stage
from rxt_platform.stages.stateless import StatelessStage, whole_rows
from tests.unit.helpers import batch_of, tiny_config
from tests.unit.stages import PROMPTED, ROWS, TALKS, answer_loss, metrics_of, stage_of

KINDS = ["joint_pretraining", "interaction_sft", "memory_aware"]


def baseline(window: int = 200, seed: int = 0) -> StatelessTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return StatelessTransformer(matched_baseline(tiny_config(), window)).eval()


def stateless(kind: str, **settings: Any) -> StatelessStage:
    """The baseline's stage beside `stage_of` the same."""
    config = stage_of(kind, ROWS[kind], **settings).config
    stage = build_stage(config, ROWS[kind], seed=3, window=24, stateless=True)
    assert isinstance(stage, StatelessStage)
    return stage


@pytest.mark.parametrize("kind", KINDS)
def test_both_models_train_on_the_same_batches(kind: str) -> None:
    mine, other = stateless(kind).sampler, stage_of(kind, ROWS[kind]).sampler
    assert mine.total_steps == other.total_steps
    for step in range(3):
        assert mine.global_batch(step).digests() == other.global_batch(step).digests()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_every_target_after_all_that_was_said_before(kind: str) -> None:
    stage, model, batch = stateless(kind), baseline(), batch_of(ROWS[kind])
    summed, count = torch.zeros(()), 0
    with torch.no_grad():
        for example in ROWS[kind]:
            said: list[int] = []
            for ids, start in zip(example.turns, example.target_starts, strict=True):
                whole = torch.tensor([[*said, *ids]])
                summed += answer_loss(model.decode(whole)[0], whole[0], len(said) + start)
                count += len(ids) - start
                said += list(ids)
    got = metrics_of(stage.loss(model, batch, stage.phases()[0]))
    assert batch.total_targets == count
    assert got["loss"] == pytest.approx(float(summed) / count, abs=1e-5)
    assert got["total"] == pytest.approx(got["loss"] + 0.01 * got["balance"], abs=1e-6)
    assert set(got) - {"total"} == set(stage.mean_over)


@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_balance_costs_what_the_model_s_own_stage_says(kind: str) -> None:
    settings: dict[str, Any] = {"balance_weight": 0.5}
    stage = stateless(kind, **(settings if kind == "memory_aware" else {"loss": settings}))
    got = metrics_of(stage.loss(baseline(), batch_of(ROWS[kind]), stage.phases()[0]))
    assert got["balance"] > 0
    assert got["total"] == pytest.approx(got["loss"] + 0.5 * got["balance"], abs=1e-6)


def test_a_system_prompt_is_part_of_the_history() -> None:
    ids, mask, _ = whole_rows(batch_of(PROMPTED))
    for row, example in enumerate(PROMPTED):
        assert ids[row][mask[row]].tolist() == [token for turn in example.turns for token in turn]


def test_packed_texts_do_not_see_each_other() -> None:
    settings: dict[str, Any] = {"packing": 2, "global_batch_size": 2}
    stage = stateless("joint_pretraining", **settings)
    batch = stage.sampler.global_batch(0)
    assert batch.documents is not None
    model, phase = baseline(), stage.phases()[0]
    parts = [metrics_of(stage.loss(model, batch.part(row, row + 1), phase)) for row in range(2)]
    packed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    members = [index for row in batch.rows.tolist() for index in stage.sampler._packs.documents(row).tolist()]  # type: ignore[union-attr]
    apart = metrics_of(stage.loss(model, batch_of([ROWS["joint_pretraining"][i] for i in members]), phase))
    assert packed["loss"] == pytest.approx(apart["loss"], abs=1e-5)


def test_the_parts_of_a_batch_add_up() -> None:
    stage, model, batch = stateless("memory_aware"), baseline(), batch_of(TALKS)
    phase = stage.phases()[0]
    whole = metrics_of(stage.loss(model, batch, phase))
    parts = [metrics_of(stage.loss(model, part, phase)) for part in (batch.part(0, 1), batch.part(1, 4))]
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, abs=1e-5)


def test_flops_grow_with_the_history_and_not_with_the_memory() -> None:
    stage, model = stateless("memory_aware"), baseline()
    flops = ForwardFlops.of(model)
    short, long = batch_of([TALKS[0].first_turns(2)]), batch_of([TALKS[0]])
    assert 0 < stage.flops(flops, short, stage.phases()[0]) < stage.flops(flops, long, stage.phases()[0])
    assert (flops.cross_slot, flops.encoder_token, flops.write_token, flops.masked_head_token) == (0, 0, 0, 0)


def test_stages_of_encoder_or_memory_alone_have_no_counterpart() -> None:
    memory = stage_of("memory_pretraining").config
    assert not trains_without_memory(memory)
    with pytest.raises(ConfigError, match="no counterpart"):
        build_stage(memory, TALKS, seed=3, window=24, stateless=True)
    halves = [
        stage_of("joint_pretraining", ROWS["joint_pretraining"], trains=half).config for half in ("encoder", "decoder")
    ]
    assert [trains_without_memory(half) for half in halves] == [False, True]

"""Rows, stages and losses that the tests of the training stages share."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from rxt_platform.config.stages import StageConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.examples import Example
from rxt_platform.data.tokenizer import BOS, EOS, INTERNAL
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import LossReport, Phase, Stage
from rxt_platform.stages.build import build_stage
from tests.unit.helpers import (
    conversation,
    gradients,
    rows_of,
)

TALKS = [
    conversation((2, 3), (4, 2), (3, 5), (1, 4), seed=1),
    conversation((6, 2), (2, 2), seed=2),
    conversation((1, 1), (3, 3), (5, 2), seed=3),
    conversation((2, 6), (4, 4), seed=4),
]
PROMPT = (BOS, INTERNAL, *rows_of(4, seed=9)[0], EOS)
PROMPTED = [
    Example((PROMPT, *talk.turns), (len(PROMPT), *talk.target_starts)) for talk in TALKS
]  # with a system prompt
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
    "memory_pretraining": {"input_noise": 0.1, "label_noise": 0.1, "memory_change_weight": 0.5},
    "memory_aware": {"reset_probability": 0.4, "memory_change_weight": 0.5},
}


def stage_of(kind: str, examples: Sequence[Example] = TALKS, **settings: Any) -> Stage:
    """A stage over these rows; all of them are one batch."""
    raw: dict[str, Any] = {"kind": kind, "epochs": 100, "global_batch_size": len(examples)}
    raw["optimizer"] = {"learning_rate": 1e-3}
    if kind == "joint_pretraining":
        raw["packing"] = 0
    if kind in ("joint_pretraining", "interaction_sft") and settings.get("trains", "both") == "both":
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


def mean_change(model: ReactiveTransformer, batch: Batch, last: int | None = None) -> float:
    """Mean over the writes of `TALKS` (up to turn `last`) of `sqrt(i) * MSE(new, old)` at write i, from 1 (REF 3.3)."""
    terms = []
    with torch.no_grad():
        for row, talk in enumerate(TALKS):
            memory = model.initial_memory(batch.seeds[row : row + 1])
            for write, ids in enumerate(talk.turns[:last], start=1):
                written = model.write(memory, torch.tensor([ids]))
                terms.append(write**0.5 * float((written - memory).pow(2).mean()))
                memory = written
    return sum(terms) / len(terms)


def answer_loss(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """Summed cross-entropy of one turn's tokens from `start` on, token by token: what DESIGN 2 says."""
    terms = [-logits[t - 1].log_softmax(dim=-1)[ids[t]] for t in range(start, len(ids))]
    return torch.stack(terms).sum()


ALL = Phase(
    "all", 0, frozenset({"decoder", "memory_cross_attention", "head", "memory_attention", "encoder", "embedding"})
)

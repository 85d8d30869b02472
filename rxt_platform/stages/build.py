"""From a stage's configuration to the stage: which rows it reads and which class trains on them."""

from collections.abc import Sequence

from rxt_platform.config.stages import (
    InteractionSFTConfig,
    JointPretrainingConfig,
    MemoryAwareConfig,
    MemoryPretrainingConfig,
    StageConfig,
)
from rxt_platform.data.batches import BatchSampler, Example
from rxt_platform.data.corpus import RowKind
from rxt_platform.stages.base import Stage
from rxt_platform.stages.joint import JointStage
from rxt_platform.stages.memory_aware import MemoryAwareStage
from rxt_platform.stages.memory_pretraining import MemoryPretrainingStage


def row_kind(config: StageConfig) -> RowKind:
    """The rows that a stage trains on."""
    if isinstance(config, JointPretrainingConfig):
        return "texts"
    return "interactions" if isinstance(config, InteractionSFTConfig) else "conversations"


def build_stage(config: StageConfig, examples: Sequence[Example], seed: int) -> Stage:
    """The stage over its training rows."""
    curriculum = config.curriculum if isinstance(config, MemoryAwareConfig) else []
    lessons = [(lesson.epochs, lesson.turns) for lesson in curriculum]
    sampler = BatchSampler(examples, config.global_batch_size, seed, mask_probability(config), lessons)
    if isinstance(config, JointPretrainingConfig | InteractionSFTConfig):
        return JointStage(config, sampler)
    if isinstance(config, MemoryPretrainingConfig):
        return MemoryPretrainingStage(config, sampler)
    return MemoryAwareStage(config, sampler)


def mask_probability(config: StageConfig) -> float:
    """Share of tokens hidden from the masked encoder; 0 in stages that have none."""
    if isinstance(config, JointPretrainingConfig | InteractionSFTConfig):
        return config.loss.mask_probability
    return 0.0

"""From a stage's configuration to the stage: how its rows become batches, and which class trains on them."""

from collections.abc import Sequence

from rxt_platform.config.stages import (
    InteractionSFTConfig,
    JointPretrainingConfig,
    MemoryAwareConfig,
    MemoryPretrainingConfig,
    StageConfig,
)
from rxt_platform.data.examples import Example
from rxt_platform.data.sampler import BatchSampler, Sampling
from rxt_platform.errors import ConfigError
from rxt_platform.stages.base import Stage
from rxt_platform.stages.joint import JointStage
from rxt_platform.stages.memory_aware import MemoryAwareStage
from rxt_platform.stages.memory_pretraining import MemoryPretrainingStage
from rxt_platform.stages.stateless import StatelessStage


def build_stage(
    config: StageConfig,
    examples: Sequence[Example],
    seed: int,
    window: int,
    weights: Sequence[float] = (),
    stateless: bool = False,
) -> Stage:
    """The stage over its training rows, for a model whose interactions have at most `window` tokens.

    With `stateless` for the baseline without memory; its batches are the same.
    """
    sampler = BatchSampler(examples, sampling(config, seed, window, weights))
    if stateless:
        if isinstance(config, MemoryPretrainingConfig):
            raise ConfigError("memory pre-training has no counterpart without a memory")
        return StatelessStage(config, sampler)
    if isinstance(config, JointPretrainingConfig | InteractionSFTConfig):
        return JointStage(config, sampler)
    if isinstance(config, MemoryPretrainingConfig):
        return MemoryPretrainingStage(config, sampler)
    return MemoryAwareStage(config, sampler)


def sampling(config: StageConfig, seed: int, window: int, weights: Sequence[float] = ()) -> Sampling:
    """How a stage's rows become batches; `weights` are those of its sources."""
    windows = config.packing if isinstance(config, JointPretrainingConfig) else 0
    lessons = config.curriculum if isinstance(config, MemoryAwareConfig) else []
    return Sampling(
        global_batch_size=config.global_batch_size,
        seed=seed,
        epochs=config.epochs,
        mask_probability=mask_probability(config),
        lessons=[(lesson.epochs, lesson.turns) for lesson in lessons],
        capacity=windows * window or None,
        system_prompts=system_prompts(config),
        weights=weights,
    )


def system_prompts(config: StageConfig) -> bool:
    """Whether conversations begin with their system prompt."""
    return config.system_prompts if isinstance(config, MemoryPretrainingConfig | MemoryAwareConfig) else True


def mask_probability(config: StageConfig) -> float:
    """Share of tokens hidden from the masked encoder; 0 in stages that have none."""
    if isinstance(config, JointPretrainingConfig | InteractionSFTConfig) and config.trains != "decoder":
        return config.loss.mask_probability
    return 0.0

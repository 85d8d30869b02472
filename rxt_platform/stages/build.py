"""From a stage's configuration to the stage: how its rows become batches, and which class trains on them."""

from collections.abc import Sequence

import numpy as np

from rxt_platform.config.mrl import CriticPretrainingConfig, EpisodeConfig, MemoryRLConfig
from rxt_platform.config.stage_base import ConversationStage
from rxt_platform.config.stages import (
    InteractionSFTConfig,
    JointPretrainingConfig,
    MemoryAwareConfig,
    MemoryPretrainingConfig,
    StageConfig,
)
from rxt_platform.data.examples import Example, ExampleSet, Selected
from rxt_platform.data.sampler import BatchSampler, EpisodeSampler, Sampling
from rxt_platform.errors import ConfigError
from rxt_platform.rl.episode_set import with_follow_ups
from rxt_platform.stages.base import Stage
from rxt_platform.stages.joint import JointStage
from rxt_platform.stages.memory_aware import MemoryAwareStage
from rxt_platform.stages.memory_pretraining import MemoryPretrainingStage
from rxt_platform.stages.memory_rl import CriticStage, Judging, MemoryRLStage
from rxt_platform.stages.stateless import StatelessStage


def build_stage(
    config: StageConfig,
    examples: Sequence[Example],
    seed: int,
    window: int,
    weights: Sequence[float] = (),
    stateless: bool = False,
    judging: Judging | None = None,
) -> Stage:
    """The stage over its training rows, for a model whose interactions have at most `window` tokens.

    With `stateless` for the baseline without memory; its batches are the same. Stages of episodes need `judging` to
    run.
    """
    if isinstance(config, MemoryRLConfig | CriticPretrainingConfig):
        held = EpisodeSampler(
            examples, sampling(config, seed, window, weights), config.updates, config.steps * config.answers
        )
        if isinstance(config, MemoryRLConfig):
            return MemoryRLStage(config, held, judging)
        return CriticStage(config, held, judging)
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


def stage_rows(rows: ExampleSet, config: StageConfig) -> ExampleSet:
    """Those of a section's rows that a stage trains on: of its sources, with follow-ups if it holds conversations."""
    sources = config.sources if isinstance(config, ConversationStage) else None
    if isinstance(config, EpisodeConfig):
        return with_follow_ups(rows, config.steps, sources)
    return rows if sources is None else Selected(rows, np.flatnonzero(np.isin(rows.sources, sources)))


def sampling(config: StageConfig, seed: int, window: int, weights: Sequence[float] = ()) -> Sampling:
    """How a stage's rows become batches; `weights` are those of its sources."""
    windows = config.packing if isinstance(config, JointPretrainingConfig) else 0
    lessons = config.curriculum if isinstance(config, MemoryAwareConfig) else []
    return Sampling(
        global_batch_size=config.global_batch_size * (config.minibatches if isinstance(config, EpisodeConfig) else 1),
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

"""Conversations to be held, for the tests of reinforcement learning: the story world by a model of 32 channels."""

from functools import cache
from typing import Any

import torch

from rxt_platform.config.mrl import MemoryRLConfig
from rxt_platform.data.batches import derive_seed
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.sampler import EpisodeSampler
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.episode_set import EpisodeSet
from rxt_platform.rl.episodes import Episode, Experience, Rollout, answer_tensors, written_batch
from rxt_platform.rl.rewards import HashedEmbedding
from rxt_platform.rl.scoring import LocalScorer
from rxt_platform.stages.base import Phase
from rxt_platform.stages.build import sampling
from rxt_platform.stages.memory_rl import Judging, MemoryRLStage
from tests.unit.helpers import tiny_config, tiny_model

ALL = Phase(
    "all", 0, frozenset({"decoder", "memory_cross_attention", "head", "memory_attention", "encoder", "embedding"})
)


@cache
def world_tokenizer() -> RxtTokenizer:
    """Byte-level BPE of some conversations."""
    talks = StoryWorld(1).conversations("train", 40, 4)
    return RxtTokenizer.train(
        [text for talk in talks for one in talk.interactions for text in (one.query, one.answer)], 400
    )


def world_model(seed: int = 0, **changes: Any) -> ReactiveTransformer:
    """A random model that knows the tokenizer's ids, with a window that holds every interaction."""
    return tiny_model(tiny_config(vocab_size=400, max_length=64, **changes), seed)


def episode_set(turns: int = 4, count: int = 8, steps: int | None = None, split: Any = "train") -> EpisodeSet:
    """Conversations of the story world."""
    talks = StoryWorld(2).conversations(split, count, turns)
    made = RowEncoder(world_tokenizer(), 64, "fail").encode(talks)
    examples = [one[0] for one in made if isinstance(one, list)]
    return EpisodeSet(talks, examples, [f"world:{n}" for n in range(count)], steps or turns - 1)


def episodes(turns: int = 4, count: int = 6, steps: int | None = None) -> list[Episode]:
    """Some of them, with a seed each."""
    rows = episode_set(turns, count, steps)
    return [
        Episode.of(talk, example, derive_seed("test", row), row, rows.steps)
        for row, (talk, example) in enumerate(zip(rows.talks, rows, strict=True))
    ]


def experience_of(rollouts: list[Rollout], advantages: float = 1.0, on_policy: bool = False) -> Experience:
    """Held episodes as an update takes them, every answer with the same advantage."""
    written = written_batch(rollouts)
    ids, targets = answer_tensors(rollouts, written.ids.shape[1])
    answered = targets.any(dim=-1)
    return Experience(
        written=written,
        ids=ids,
        targets=targets,
        old=torch.zeros(ids.shape),
        reference=torch.zeros(ids.shape),
        rewards=torch.zeros(answered.shape),
        advantages=torch.full(answered.shape, advantages),
        scored=answered,
        states=torch.zeros(*answered.shape[:2], 1, 0, dtype=torch.int64),
        returns=torch.zeros(*answered.shape[:2], 1),
        on_policy=on_policy,
        total_answers=int(answered.sum()),
        total_written=int(answered.sum()),
        total_states=0,
    )


def rl_config(**changes: Any) -> MemoryRLConfig:
    """A stage of two conversations an update."""
    base = {
        "kind": "memory_rl",
        "steps": 3,
        "epochs": 1,
        "global_batch_size": 2,
        "answers": 3,
        "optimizer": {"learning_rate": 1e-3},
        "balance_weight": 0.0,
    }
    return MemoryRLConfig.model_validate({**base, **changes})


def rl_stage(
    rows: EpisodeSet | None = None, reference: ReactiveTransformer | None = None, **changes: Any
) -> MemoryRLStage:
    """A stage over conversations of the story world."""
    config, train = rl_config(**changes), rows or episode_set()
    sampler = EpisodeSampler(train, sampling(config, 3, 64), config.updates)
    judging = Judging(
        episode_set(split="validation"), world_tokenizer(), LocalScorer(config.reward, HashedEmbedding()), reference
    )
    return MemoryRLStage(config, sampler, judging)

"""A stage's job whose rewards can't be had on its last worker: `torchrun rewarding.py JOB.json`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.errors import RewardError
from rxt_platform.rl.rewards import HashedEmbedding, Reward, ScoredTurn
from rxt_platform.rl.scoring import LocalScorer
from rxt_platform.training.job import StageJob, run_stage


class Failing(LocalScorer):
    """Answers the two calls of the held-out evaluation and three collections, each in four groups; then not."""

    calls = 0

    def score(self, conversations: Sequence[Sequence[ScoredTurn]]) -> list[list[Reward]]:
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls > 2 + 3 * 4:
            raise RewardError("the critic is away")
        return super().score(conversations)

    def values(self, states: Sequence[Sequence[int]], version: int) -> list[float]:
        return [0.0] * len(states)

    def publish(self, version: int, critic: Any) -> None:
        pass


job = StageJob.model_validate_json(Path(sys.argv[1]).read_text())
assert isinstance(job.stage, EpisodeConfig)
try:
    run_stage(job, service=Failing(job.stage.reward, HashedEmbedding()))
except RewardError as error:
    print(f"rank {os.environ['RANK']}: {error}; on all ranks: {error.on_all_ranks}", flush=True)
    sys.exit(0)
sys.exit(1)

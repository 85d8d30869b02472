"""The small run's stage of reinforcement learning, as a job on a model that is there."""

from pathlib import Path

from rxt_platform.config.loading import load_run
from rxt_platform.orchestration.reinforce import reinforced
from tests.support import ROOT, SMALL, Jobs, make_jobs_of

STAGE = "mrl"
CRITIC = [
    "stages.mrl.critic={window: 48}",
    "stages.mrl.objective={kind: policy, advantage: impo, normalise: batch, entropy_weight: 0.01}",
]


def mrl_jobs(folder: Path, base: Path, *overrides: str) -> Jobs:
    """The small run's last stage alone, on a model that is there."""
    config = load_run(ROOT / "pipelines/configs/quickstart.yaml", [*SMALL, f"storage={folder}", *overrides])
    return make_jobs_of(reinforced(config, str(base)), folder)

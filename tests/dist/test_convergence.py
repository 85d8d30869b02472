"""A stage that has converged ends: at the same step however often it was killed, and as early as was asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rxt_platform.storage.directory import read_manifest
from tests.support import Jobs, make_jobs

pytestmark = pytest.mark.dist

EARLY = (
    "stages.memory_pretraining.epochs=3",  # 30 steps
    "stages.memory_pretraining.early_stopping={every: 2, patience: 2, threshold: 0.02}",
)


def ends(jobs: Jobs) -> int:
    return int(read_manifest(jobs.jobs["memory_pretraining"].output).metrics["steps"])


def by_hand(history: list[dict[str, float]], threshold: float) -> int:
    """The step at which the metric has not improved twice in a row, from what was logged."""
    best, stale = None, 0
    for row in history:
        if int(row["step"]) % 2:
            continue
        value = row["validation_loss"]
        if best is None or best - value > threshold:
            best, stale = value, 0
        else:
            stale += 1
        if stale == 2:
            return int(row["step"])
    raise AssertionError("never converged")


def test_a_converged_stage_ends_early_and_a_killed_one_at_the_same_step(straight_run: Jobs, tmp_path: Path) -> None:
    straight, killed = (make_jobs(tmp_path / name, *EARLY) for name in ("straight", "killed"))
    for jobs in (straight, killed):
        start = {"start": straight_run.jobs["memory_pretraining"].start}
        jobs.jobs["memory_pretraining"] = jobs.jobs["memory_pretraining"].model_copy(update=start)
    assert straight.run("memory_pretraining").returncode == 0
    end = ends(straight)
    history = straight.history("memory_pretraining")
    assert 6 <= end < 30
    assert end == history[-1]["step"] == by_hand(history, 0.02)

    killed.run_and_kill("memory_pretraining", step=end - 1)
    done = killed.run("memory_pretraining")
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_manifest(killed.jobs["memory_pretraining"].output).metrics["resumed_from_step"] >= 3
    assert ends(killed) == end
    assert killed.weights_sha256("memory_pretraining") == straight.weights_sha256("memory_pretraining")


def test_what_comes_before_the_last_phase_does_not_count(straight_run: Jobs, new_jobs: Callable[..., Jobs]) -> None:
    """With a threshold that nothing reaches, the stage ends `patience` measurements after its last change."""
    jobs = new_jobs("stages.memory_aware.early_stopping={every: 1, patience: 2, threshold: 100}")
    start = {"start": straight_run.jobs["memory_aware"].start}
    jobs.jobs["memory_aware"] = jobs.jobs["memory_aware"].model_copy(update=start)
    done = jobs.run("memory_aware", workers=2)
    assert done.returncode == 0, done.stderr[-2000:]
    # Unfrozen after 2 and 5 of 10 steps, whole conversations after 3: the first measurement that counts is step 6's.
    assert read_manifest(jobs.jobs["memory_aware"].output).metrics["steps"] == 8

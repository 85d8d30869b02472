"""A fault on one of two workers: all stop, or all go on; nothing wrong is written, and the error says whose fault."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rxt_platform.storage.directory import read_manifest, verify_directory
from tests.support import Jobs

pytestmark = pytest.mark.chaos

STAGE = "sft"  # 10 steps of 16 rows, a checkpoint after 3, 6 and 9
FP32 = [(stage, "fp32") for stage in range(4)]
NewJobs = Callable[..., Jobs]


def run_faulty(jobs: Jobs, kind: str, rank: int, step: int, workers: int = 2) -> subprocess.CompletedProcess[str]:
    """A stage with a fault in it, to its end."""
    return jobs.run(STAGE, workers, "chaos/faulty.py", kind, str(rank), str(step))


def new_sft(new_jobs: NewJobs, *overrides: str) -> Jobs:
    """A job of the stage from random weights."""
    jobs = new_jobs(*overrides)
    jobs.jobs[STAGE] = jobs.jobs[STAGE].model_copy(update={"start": None})
    return jobs


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The first error line of a process."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines, done.stderr[-3000:]
    return lines[0]


def checkpointed(jobs: Jobs) -> list[Path]:
    """The checkpoints of the stage; all of them whole and finite."""
    paths = sorted((jobs.jobs[STAGE].work / "checkpoints").glob("step-*"))
    for path in paths:
        verify_directory(path)
        for file in path.glob("*.safetensors"):
            assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values()), file
    return paths


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")],
)
def test_nan_loss_on_one_worker_stops_all_before_the_update(new_jobs: NewJobs, zero_stage: int, precision: str) -> None:
    jobs = new_sft(new_jobs, f"training.zero_stage={zero_stage}", f"training.precision={precision}")
    done = run_faulty(jobs, "nan-loss", rank=1, step=5)
    assert done.returncode == 1
    message = error_of(done)
    assert "step 5: the loss is nan: worker 1: rows story_world" in message
    assert "worker 0: rows" not in message
    assert "nothing was updated" in message
    assert [row["step"] for row in jobs.history(STAGE)] == [1, 2, 3, 4]
    assert [path.name for path in checkpointed(jobs)] == ["step-00000003"]
    assert not jobs.jobs[STAGE].output.exists()


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")],
)
def test_a_skipped_batch_changes_nothing_and_is_named(new_jobs: NewJobs, zero_stage: int, precision: str) -> None:
    """The gradient of one worker is NaN in step 5, its loss is finite; with a budget the training goes on."""
    settings = [f"training.zero_stage={zero_stage}", f"training.precision={precision}", "training.checkpoints.every=1"]
    jobs = new_sft(new_jobs, *settings, "training.checkpoints.keep=20", "training.skipped_batches=1")
    done = run_faulty(jobs, "nan-gradient", rank=1, step=5)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = checkpointed(jobs)
    assert [path.name[-2:] for path in paths] == [f"{step:02d}" for step in range(1, 10)]
    before, after, later = (
        {name: tensor for file in sorted(path.glob("rank-*")) for name, tensor in load_file(file).items()}
        for path in paths[3:6]
    )
    assert all(torch.equal(before[name], after[name]) for name in before), "step 5 changed something"
    assert not all(torch.equal(after[name], later[name]) for name in after)
    assert read_manifest(jobs.jobs[STAGE].output).metrics["skipped_batches"] == 1
    (skipped,) = json.loads((jobs.jobs[STAGE].output / "skipped.json").read_text())
    assert skipped["step"] == 4
    assert "the gradient's norm is" in skipped["reason"]
    assert len(skipped["rows"]) == 16
    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(jobs.jobs[STAGE].output / "model.safetensors").values()
    )


def test_more_bad_batches_than_allowed_are_an_error(new_jobs: NewJobs) -> None:
    jobs = new_sft(new_jobs)
    done = run_faulty(jobs, "nan-gradient", rank=0, step=4)
    assert done.returncode == 1
    message = error_of(done)
    assert "step 4: the gradient's norm is" in message
    assert "allow more than 0 training.skipped_batches; the batch's rows: story_world" in message
    assert [path.name for path in checkpointed(jobs)] == ["step-00000003"]


def test_exception_on_one_worker_is_attributed(new_jobs: NewJobs) -> None:
    jobs = new_sft(new_jobs)
    started = time.monotonic()
    done = run_faulty(jobs, "raise", rank=1, step=5)
    assert done.returncode != 0
    assert time.monotonic() - started < 120
    (failure,) = [
        json.loads(line) for line in (jobs.jobs[STAGE].work / "workers/failures-00001.jsonl").read_text().splitlines()
    ]
    assert failure["message"] == "an injected fault"
    assert (failure["rank"], failure["step"], failure["part"]) == (1, 5, "forward")


def test_stopped_worker_is_named_by_those_that_wait(new_jobs: NewJobs) -> None:
    """SIGSTOP of worker 1: the other one's collective fails after `hang_seconds` and it says who was silent."""
    jobs = new_sft(new_jobs, "training.hang_seconds=10")
    started = time.monotonic()
    done = run_faulty(jobs, "stop", rank=1, step=5)
    assert done.returncode != 0
    assert time.monotonic() - started < 180, "torchrun gives a stopped process 30 s"
    message = error_of(done)
    assert "worker 1 (process" in message
    assert "was last heard of" in message
    assert "(worker 0 noticed in step 5, backward)" in message


def test_spike_is_rolled_back_and_its_batches_left_out(new_jobs: NewJobs) -> None:
    guard = "training.spike_guard={window: 20, skip: 2, factor: 20}"
    jobs = new_sft(new_jobs, guard, "training.checkpoints.every=2", "stages.sft.global_batch_size=4")
    done = run_faulty(jobs, "spike", rank=1, step=28)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "back to step 26, on without steps [27, 28]" in done.stderr
    skipped = json.loads((jobs.jobs[STAGE].output / "skipped.json").read_text())
    assert [one["step"] for one in skipped] == [26, 27]
    assert all(one["reason"].startswith("spike in step 28") for one in skipped)
    assert [row["step"] for row in jobs.history(STAGE)] == list(range(1, 41))


def test_what_was_measured_after_the_rollback_s_checkpoint_does_not_count_twice(new_jobs: NewJobs) -> None:
    """A threshold that nothing reaches: the stage ends 33 measurements after its first, as without a spike."""
    guard = "training.spike_guard={window: 20, skip: 2, factor: 20}"
    early = "stages.sft.early_stopping={every: 1, patience: 33, threshold: 100}"
    jobs = new_sft(new_jobs, guard, early, "training.checkpoints.every=2", "stages.sft.global_batch_size=4")
    done = run_faulty(jobs, "spike", rank=1, step=28)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "back to step 26, on without steps [27, 28]" in done.stderr
    assert [row["step"] for row in jobs.history(STAGE)] == list(range(1, 35))
    assert read_manifest(jobs.jobs[STAGE].output).metrics["steps"] == 34


def test_rollbacks_come_to_an_end(new_jobs: NewJobs) -> None:
    """The loss stays high from step 28 on: what was left out stays left out, and the budget is kept."""
    guard = "training.spike_guard={window: 20, skip: 1, factor: 20, rollbacks: 2}"
    jobs = new_sft(new_jobs, guard, "training.checkpoints.every=5", "stages.sft.global_batch_size=4")
    done = run_faulty(jobs, "spikes", rank=1, step=28)
    assert done.returncode == 1
    assert "back to step 25, on without steps [28]" in done.stderr
    assert "back to step 25, on without steps [29]" in done.stderr
    assert "step 30: the loss is" in error_of(done)
    assert "2 rollbacks did not help" in error_of(done)

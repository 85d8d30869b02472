"""A small stage on real processes, its resume states, and runs that end without a result."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rxt_platform.config.training import TrainingConfig
from rxt_platform.storage.directory import MANIFEST, read_manifest, seal_directory, verify_directory
from rxt_platform.training.checkpoints import KIND, checkpoints_in, folder_name
from tests.support import ROOT, Jobs, environment

STAGE = "pretraining"  # 10 steps of about 20 ms


def checkpoints_of(jobs: Jobs, stage: str = STAGE) -> Path:
    """The folder of a stage's resume states."""
    return jobs.jobs[stage].work / "checkpoints"


def steps_in(jobs: Jobs, stage: str = STAGE) -> list[int]:
    """Of the resume states that are there, all of which must be whole."""
    present = checkpoints_in(checkpoints_of(jobs, stage))
    for path in present:
        verify_directory(path, KIND)
    return [int(path.name.removeprefix("step-")) for path in present]


def changed(jobs: Jobs, folder: Path, stage: str = STAGE, **training: Any) -> Jobs:
    """A job of its own folder, with other training settings; nothing is done yet."""
    job = jobs.jobs[stage]
    saved = {**job.training.checkpoints.model_dump(), **training.pop("checkpoints", {})}
    settings = TrainingConfig.model_validate({**job.training.model_dump(), **training, "checkpoints": saved})
    new = job.model_copy(update={"work": folder / "work", "output": folder / "output", "training": settings})
    new.work.mkdir(parents=True, exist_ok=True)
    return Jobs(jobs.config, {**jobs.jobs, stage: new}, folder)


def interrupted(jobs: Jobs, folder: Path, steps: list[int], **training: Any) -> Jobs:
    """The same as if the run had ended without a result, leaving the resume states of `steps`."""
    new = changed(jobs, folder, **training)
    for step in steps:
        shutil.copytree(checkpoints_of(jobs) / folder_name(step), checkpoints_of(new) / folder_name(step))
    shutil.copyfile(jobs.jobs[STAGE].work / "metrics.jsonl", new.jobs[STAGE].work / "metrics.jsonl")
    return new


def finish(jobs: Jobs, workers: int = 1, stage: str = STAGE) -> str:
    """Run a stage to its end; returns what it logged."""
    done = jobs.run(stage, workers)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def resumed_from(jobs: Jobs) -> int:
    """The step that the finished stage went on from."""
    return int(read_manifest(jobs.jobs[STAGE].output).metrics["resumed_from_step"])


def reseal(checkpoint: Path) -> None:
    """Give a changed checkpoint a manifest that fits."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    seal_directory(checkpoint.rename(checkpoint.parent / "changed"), checkpoint, KIND)


def altered(path: Path, change: Callable[[bytearray], bytearray | None]) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


def refused(jobs: Jobs, workers: int = 1) -> str:
    """A job that must end with status 2, without a result; its error line."""
    started = time.monotonic()
    done = jobs.run(STAGE, workers)
    assert time.monotonic() - started < 180
    assert done.returncode == (2 if workers == 1 else 1), done.stderr[-3000:]  # of several as torchrun's
    assert not jobs.jobs[STAGE].output.exists()
    assert "Traceback" not in done.stderr or workers > 1, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


@contextmanager
def started(jobs: Jobs, workers: int = 1) -> Iterator["subprocess.Popen[str]"]:
    """A stage's process, killed at the latest on leaving."""
    process = subprocess.Popen(
        jobs.command(STAGE, workers),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    """Poll while a process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.0005)

"""Where checkpoints are kept: disks that fail, what is kept how long, copies elsewhere."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rxt_platform.storage.directory import MANIFEST
from rxt_platform.training.checkpoints import ResumeState, checkpoints_in, folder_name
from tests.dist.checkpoints import (
    STAGE,
    altered,
    changed,
    checkpoints_of,
    finish,
    refused,
    resumed_from,
    started,
    steps_in,
    wait_until,
)
from tests.support import Jobs

pytestmark = pytest.mark.dist


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a full disk needs a file system that may be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(["remount", *options]), str(folder)], check=True)


def failed(jobs: Jobs, workers: int = 1) -> str:
    """A job that can't write a checkpoint: ends soon, with status 1 and one error; what it logged."""
    started = time.monotonic()
    done = jobs.run(STAGE, workers)
    assert time.monotonic() - started < 180, "the ranks wait for each other's parts"
    assert done.returncode == 1, done.stderr[-3000:]
    assert not jobs.jobs[STAGE].output.exists()
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("error: "))


def bytes_needed(jobs: Jobs, workers: int = 1) -> int:
    """By one worker for its part of a checkpoint."""
    totals = ResumeState.read(checkpoints_in(checkpoints_of(jobs))[0]).totals
    return sum(total.count for total in totals.values()) * 4 // workers


@pytest.mark.parametrize(
    ("room", "reason"),
    [(-4096, "no space left: [0-9,]+ bytes are free"), (4096, ".*No space left on device")],
    ids=["known before", "found out in the middle"],
)
def test_a_full_disk_stops_with_the_bytes_needed_and_the_one_before_is_whole(
    every_step: Jobs, tmp_path: Path, room: int, reason: str
) -> None:
    jobs = changed(every_step, tmp_path, checkpoints={"every": 3, "keep": 9})
    at, needed = checkpoints_of(jobs), bytes_needed(every_step)
    page = 4096
    one = sum(
        -(-path.stat().st_size // page) * page for path in (checkpoints_of(every_step) / folder_name(3)).iterdir()
    )
    with small_disk(at, one + -(-needed // page) * page + room):
        told = failed(jobs)
        before = f"The checkpoint before, {at / folder_name(3)}, is whole"
        expected = f"{at / folder_name(6)}: cannot be written: {reason}.*; this worker's part needs {needed:,} bytes. "
        assert re.search(re.escape(str(at / folder_name(6))) + expected.partition("step-00000006")[2], told), told
        assert before in told
        assert steps_in(jobs) == [3]
        remount(at, "size=1g")
        finish(jobs)
        assert resumed_from(jobs) == 3
        assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)
        assert sorted(path.name for path in at.iterdir()) == [folder_name(step) for step in (3, 6, 9)]


def test_a_disk_that_is_full_for_one_of_two_workers_ends_both_at_once(two_workers: Jobs, tmp_path: Path) -> None:
    """Each part alone would fit. The others do not wait `hang_seconds` for the part that does not come."""
    jobs = changed(two_workers, tmp_path, checkpoints={"keep": 9})
    at, needed = checkpoints_of(jobs), bytes_needed(two_workers, workers=2)
    one = sum(path.stat().st_size for path in (checkpoints_of(two_workers) / folder_name(3)).iterdir())
    with small_disk(at, one + int(1.5 * needed)):
        told = failed(jobs, workers=2)
        assert re.search(r"worker [01]: .*step-00000006: cannot be written: .*; this worker's part needs [0-9,]+", told)
        assert f"The checkpoint before, {at / folder_name(3)}, is whole" in told
        assert steps_in(jobs) == [3]


def test_a_folder_that_became_read_only_stops_and_keeps_what_is_there(every_step: Jobs, tmp_path: Path) -> None:
    jobs = changed(every_step, tmp_path, checkpoints={"every": 3})
    at = checkpoints_of(jobs)
    with small_disk(at, 2**30):
        shutil.copytree(checkpoints_of(every_step) / folder_name(3), at / folder_name(3))
        remount(at, "ro")
        told = failed(jobs)
        assert re.search(r"step-00000006: cannot be written: .*Read-only file system.*needs [0-9,]+ bytes", told), told
        assert f"The checkpoint before, {at / folder_name(3)}, is whole" in told
        assert steps_in(jobs) == [3]


def test_a_file_where_the_folder_should_be_stops_with_its_name(every_step: Jobs, tmp_path: Path) -> None:
    jobs = changed(every_step, tmp_path, checkpoints={"every": 3, "asynchronous": False})
    checkpoints_of(jobs).write_text("")
    done = jobs.run(STAGE)
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"error: {checkpoints_of(jobs) / folder_name(3)}: cannot be written: " in done.stderr
    assert "There is no whole one before it" in done.stderr


def test_written_at_once_or_while_training_goes_on_is_the_same(two_workers: Jobs, tmp_path: Path) -> None:
    jobs = changed(two_workers, tmp_path, checkpoints={"asynchronous": False})
    finish(jobs, workers=2)
    assert steps_in(jobs) == steps_in(two_workers) == [3, 6, 9]
    for step in (3, 6, 9):
        here, there = (checkpoints_of(one) / folder_name(step) for one in (jobs, two_workers))
        files = sorted(path.name for path in here.glob("*.safetensors"))
        assert files == ["buffers.safetensors", "rank-00000-00000.safetensors", "rank-00001-00000.safetensors"]
        for name in files:
            assert (here / name).read_bytes() == (there / name).read_bytes(), (step, name)


def test_the_last_ones_and_the_best_one_are_kept(every_step: Jobs, tmp_path: Path) -> None:
    """The highest held-out loss, which is not the last: the model learns."""
    best = {"metric": "validation_loss", "highest": True}
    jobs = changed(every_step, tmp_path, evaluate_every=1, checkpoints={"every": 1, "keep": 2, "best": best})
    finish(jobs)
    losses = [row["validation_loss"] for row in jobs.history(STAGE)[:9]]
    highest = losses.index(max(losses)) + 1
    assert highest < 8
    assert steps_in(jobs) == [highest, 8, 9]
    kept = ResumeState.read(checkpoints_of(jobs) / folder_name(highest))
    assert kept.metrics["validation_loss"] == max(losses)
    assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)
    output = jobs.jobs[STAGE].output
    assert json.loads((output / "best/metrics.json").read_text()) == {**kept.metrics, "step": highest}
    at = checkpoints_of(jobs) / folder_name(highest)
    pieces = load_file(at / "rank-00000-00000.safetensors")
    trained = {key.removeprefix("weight/0/"): piece for key, piece in pieces.items() if key.startswith("weight/0/")}
    buffers = load_file(at / "buffers.safetensors")
    assert trained
    assert buffers
    last, best_model = load_file(output / "model.safetensors"), load_file(output / "best/model.safetensors")
    assert best_model.keys() == last.keys() >= trained.keys() | buffers.keys()
    for name, weight in best_model.items():
        expected = trained.get(name, buffers.get(name, last[name]))
        assert torch.equal(weight.flatten(), expected.flatten()), name
    assert any(not torch.equal(best_model[name], last[name]) for name in trained)


def test_a_lost_disk_goes_on_from_the_uploaded_checkpoint(every_step: Jobs, tmp_path: Path) -> None:
    remote = tmp_path / "remote/work"  # named like the job's work folder
    jobs = changed(every_step, tmp_path, checkpoints={"every": 3, "keep": 1, "upload": f"file://{remote.parent}"})
    with started(jobs) as process:
        wait_until(lambda: (remote / folder_name(6) / MANIFEST).exists(), process)
        process.kill()
    shutil.rmtree(jobs.jobs[STAGE].work)
    shutil.rmtree(jobs.jobs[STAGE].output, ignore_errors=True)
    newest = max(path.parent.name for path in remote.glob(f"step-*/{MANIFEST}"))
    log = finish(jobs)
    assert f"fetching {newest} from file://{remote}" in log
    assert resumed_from(jobs) == int(newest.removeprefix("step-"))
    assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)


def test_a_damaged_uploaded_checkpoint_is_an_error_that_names_it(every_step: Jobs, tmp_path: Path) -> None:
    remote = tmp_path / "remote/work"  # named like the job's work folder
    shutil.copytree(checkpoints_of(every_step) / folder_name(3), remote / folder_name(3))
    altered(remote / folder_name(3) / "state.json", lambda content: content.replace(b'"step": 3', b'"step": 4'))
    jobs = changed(every_step, tmp_path, checkpoints={"upload": f"file://{remote.parent}"})
    assert f"file://{remote}/{folder_name(3)}/state.json: sha256 " in refused(jobs)


def test_an_upload_that_fails_does_not_stop_training(every_step: Jobs, tmp_path: Path) -> None:
    remote = tmp_path / "remote/work"  # named like the job's work folder
    remote.mkdir(parents=True)
    (remote / folder_name(3)).write_text("a file where the folder should be")
    jobs = changed(every_step, tmp_path, checkpoints={"every": 3, "upload": f"file://{remote.parent}"})
    log = finish(jobs)
    at = checkpoints_of(jobs)
    assert f"{at / folder_name(3)} was not copied to file://{remote}; training goes on" in log
    assert {6, 9} <= set(steps_in(jobs)), "3 too, if it was being copied when 9 was written"
    assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)

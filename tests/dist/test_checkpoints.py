"""Checkpoints on real processes: for any number of workers, whole or absent, and never a silent fresh start."""

import json
import math
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rxt_platform.config.training import TrainingConfig
from rxt_platform.storage.directory import MANIFEST, read_manifest, seal_directory, verify_directory
from rxt_platform.training.checkpoints import KIND, ResumeState, checkpoints_in, folder_name
from rxt_platform.training.sharding import KINDS
from tests.support import ROOT, Jobs, environment, make_jobs

pytestmark = pytest.mark.dist

STAGE = "pretraining"  # 10 steps of about 20 ms
SUM = re.compile(r"(\S+) sum (\S+) norm ([^\s,]+)")


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


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Stages that start from random weights and also have buffers to keep: the experts' selection biases."""
    jobs = make_jobs(tmp_path_factory.mktemp("jobs"), "model.decoder.experts.balancing=bias")
    for stage, job in jobs.jobs.items():
        jobs.jobs[stage] = job.model_copy(update={"start": None})
    return jobs


@pytest.fixture(scope="module")
def every_step(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The run of one worker with a resume state of each of its steps 1 to 9."""
    done = changed(jobs, tmp_path_factory.mktemp("every"), checkpoints={"every": 1, "keep": 9})
    finish(done)
    assert steps_in(done) == list(range(1, 10))
    return done


@pytest.fixture(scope="module")
def two_workers(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The run of two workers with resume states of its steps 3, 6 and 9."""
    done = changed(jobs, tmp_path_factory.mktemp("two"), checkpoints={"keep": 9})
    finish(done, workers=2)
    return done


def reseal(checkpoint: Path) -> None:
    """Give a changed checkpoint a manifest that fits."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    seal_directory(checkpoint.rename(checkpoint.parent / "changed"), checkpoint, KIND)


# Another number of workers, another ZeRO stage.


def sums_in(checkpoint: Path) -> dict[str, tuple[float, float]]:
    """Sum and norm of each kind over the checkpoint's files."""
    tensors = [pair for path in checkpoint.glob("rank-*.safetensors") for pair in load_file(path).items()]
    found = {}
    for kind in KINDS:
        values = [tensor.double() for key, tensor in tensors if key.startswith(f"{kind}/")]
        square = math.fsum(float(value.square().sum()) for value in values)
        found[kind] = (math.fsum(float(value.sum()) for value in values), math.sqrt(square))
    return found


def check_log(log: str, checkpoint: Path, before: tuple[int, int], now: tuple[int, int]) -> None:
    """The line that says that weights and moments are as they were saved, against the files themselves."""
    (line,) = [line for line in log.splitlines() if "as saved: " in line]
    told, _, sums = line.partition("; as saved: ")
    ways = f"written by {before[0]} workers under ZeRO-{before[1]}, loaded by {now[0]} under ZeRO-{now[1]}"
    assert told.endswith(f"{checkpoint}: {ways}")
    logged = {kind: (float(total), float(norm)) for kind, total, norm in SUM.findall(sums)}
    there = sums_in(checkpoint)
    assert logged.keys() == there.keys()
    for kind in KINDS:
        assert logged[kind] == pytest.approx(there[kind], rel=1e-7, abs=1e-9), kind
        assert there[kind][1] > 0


@pytest.mark.parametrize(
    ("precision", "ways", "tolerance"),
    [
        ("fp32", [(2, 2), (1, 1), (2, 3), (1, 0)], 1e-5),
        ("bf16", [(2, 2), (1, 0), (2, 3)], 2e-3),
    ],
)
def test_any_number_of_workers_and_zero_stage_goes_on_from_any_other(
    jobs: Jobs, tmp_path: Path, precision: str, ways: list[tuple[int, int]], tolerance: float
) -> None:
    """A stage with phases. The job is run (workers, ZeRO stage) after (workers, ZeRO stage), two steps further each."""
    stage = "memory_aware"
    straight = changed(jobs, tmp_path / "straight", stage, precision=precision)
    finish(straight, stage=stage)
    for number, (workers, zero_stage) in enumerate(ways):
        settings: dict[str, Any] = {"zero_stage": zero_stage, "precision": precision}
        turn = changed(jobs, tmp_path, stage, **settings, checkpoints={"every": 2, "keep": 9})
        checkpoint = checkpoints_of(turn, stage) / folder_name(2 * number)
        if number:  # as if it had ended here: without a result and what came later
            shutil.rmtree(turn.jobs[stage].output)
            for later in checkpoints_in(checkpoint.parent):
                if later.name > checkpoint.name:
                    shutil.rmtree(later)
        log = finish(turn, workers, stage)
        if number:
            check_log(log, checkpoint, ways[number - 1], ways[number])
        history, expected = turn.history(stage), straight.history(stage)
        assert [row["step"] for row in history] == [row["step"] for row in expected]
        for row, other in zip(history, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=tolerance), (ways[number], row["step"])


def test_going_back_in_the_middle_is_like_starting_there(every_step: Jobs, tmp_path: Path) -> None:
    """After a spike the engine is not new. Under ZeRO-3 every rank then holds small weights whole, beside its share."""
    jobs = interrupted(every_step, tmp_path, [3], zero_stage=3, checkpoints={"every": 100})
    *command, job = jobs.command(STAGE, workers=2)
    script = [str(ROOT / "tests/dist/gone_back.py"), job]
    done = subprocess.run(
        [*command[: command.index("rxt_platform.training") - 1], *script],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r'"losses": (\[.*?\])', done.stdout)
    assert len(found) == 2, done.stdout
    for start, end, start_again, end_again in map(json.loads, found):
        assert (start_again, end_again) == (start, end)
        assert end < start


# Damage.


def altered(path: Path, change: Callable[[bytearray], bytearray | None]) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


def test_damaged_ones_are_named_and_the_newest_whole_one_is_used(every_step: Jobs, tmp_path: Path) -> None:
    jobs = interrupted(every_step, tmp_path, list(range(3, 10)))
    at = {step: checkpoints_of(jobs) / folder_name(step) for step in range(3, 10)}
    shard = "rank-00000-00000.safetensors"
    altered(at[9] / shard, lambda content: content[:-100])
    altered(at[8] / shard, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    (at[7] / MANIFEST).unlink()
    (at[6] / "buffers.safetensors").unlink()
    altered(at[5] / "state.json", lambda content: content.replace(b'"step": 5', b'"step": 4'))
    (at[4] / "extra").write_text("")
    log = finish(jobs)
    size = (at[3] / shard).stat().st_size
    for reason in (
        f"{at[9] / shard}: {size - 100} bytes, the manifest says {size}",
        f"{at[8] / shard}: sha256 ",
        f"{at[7]}: no {MANIFEST}: not a complete artifact",
        f"{at[6]}: files missing: ['buffers.safetensors']",
        f"{at[5] / 'state.json'}: sha256 ",
        f"{at[4]}: files missing: [], not in the manifest: ['extra']",
    ):
        assert f"skipping a damaged checkpoint: {reason}" in log
    assert resumed_from(jobs) == 3
    assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)


class Payload:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def refused(jobs: Jobs, workers: int = 1) -> str:
    """A job that must end with status 2, without a result; its error line."""
    started = time.monotonic()
    done = jobs.run(STAGE, workers)
    assert time.monotonic() - started < 60
    assert done.returncode == (2 if workers == 1 else 1), done.stderr[-3000:]  # torchrun has a status of its own
    assert not jobs.jobs[STAGE].output.exists()
    assert "Traceback" not in done.stderr or workers > 1, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_only_damaged_ones_are_an_error_not_a_fresh_start(every_step: Jobs, tmp_path: Path) -> None:
    jobs = interrupted(every_step, tmp_path, [3, 6])
    three, six = checkpoints_in(checkpoints_of(jobs))
    (three / MANIFEST).unlink()
    (six / "state.json").unlink()
    told = refused(jobs)
    assert "no usable checkpoint: " in told
    assert f"{three}: no {MANIFEST}" in told
    assert f"{six}: files missing: ['state.json']" in told
    assert f"Delete {three.parent} to start this stage again" in told


def test_a_pickle_is_refused_and_not_executed(every_step: Jobs, tmp_path: Path) -> None:
    """Even when whoever put it there made a manifest for it."""
    jobs = interrupted(every_step, tmp_path, [3])
    (checkpoint,) = checkpoints_in(checkpoints_of(jobs))
    shard = checkpoint / "rank-00000-00000.safetensors"
    shard.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    reseal(checkpoint)
    assert f"{shard}: not a file of a checkpoint" in refused(jobs, workers=2)
    assert not (tmp_path / "executed").exists()


def test_another_runs_checkpoint_is_refused_and_the_difference_named(every_step: Jobs, tmp_path: Path) -> None:
    jobs = interrupted(every_step, tmp_path, [3])
    job = jobs.jobs[STAGE]
    spec = json.loads(json.dumps(job.provenance))
    spec["spec"]["stage"]["optimizer"]["learning_rate"] = 0.5
    jobs.jobs[STAGE] = job.model_copy(update={"identity": "another", "provenance": spec})
    told = refused(jobs, workers=2)
    at = checkpoints_of(jobs)
    assert f"{at / folder_name(3)}: made by another run (spec.stage.optimizer.learning_rate: 0.001 → 0.5)" in told
    assert f"go back to those settings, or delete {at} to start this stage again" in told


def larger_moments(checkpoint: Path) -> str:
    path = checkpoint / "rank-00000-00000.safetensors"
    tensors = load_file(path)
    key = "exp_avg_sq/0/decoder.head.bias"
    size = len(tensors[key])
    save_file({**tensors, key: torch.cat([tensors[key], torch.ones(3)])}, path)
    return f"{checkpoint}: of another model: elements of exp_avg_sq of decoder.head.bias: {size + 3} → {size}"


def other_moments(checkpoint: Path) -> str:
    path = checkpoint / "rank-00000-00000.safetensors"
    tensors = load_file(path)
    tensors["exp_avg_sq/0/decoder.head.bias"] *= 1.01
    save_file(tensors, path)
    return f"{checkpoint}: exp_avg_sq does not add up after loading: "


def no_buffers(checkpoint: Path) -> str:
    save_file({}, checkpoint / "buffers.safetensors")
    return f"{checkpoint}/buffers.safetensors: of another model: decoder.layers.0."


@pytest.mark.parametrize("change", [larger_moments, other_moments, no_buffers])
def test_another_models_checkpoint_is_refused(every_step: Jobs, tmp_path: Path, change: Callable[[Path], str]) -> None:
    """All with a manifest that fits: what is in the files does not."""
    jobs = interrupted(every_step, tmp_path, [3])
    (checkpoint,) = checkpoints_in(checkpoints_of(jobs))
    told = change(checkpoint)
    reseal(checkpoint)
    assert told in refused(jobs)


# Storage that does not do as asked.


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
    assert time.monotonic() - started < 60, "the ranks wait for each other's parts"
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


# Ends that come from outside.


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


def test_killed_while_writing_goes_on_from_the_one_before(every_step: Jobs, tmp_path: Path) -> None:
    """The process is halted at the first sight of an unfinished checkpoint, and killed if it is unfinished still."""
    jobs = changed(every_step, tmp_path)
    at = checkpoints_of(jobs)
    with started(jobs) as process:
        while True:
            wait_until(lambda: [*at.glob(".step-*.tmp")] and len(checkpoints_in(at)) >= 2, process)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if unfinished := list(at.glob(".step-*.tmp")):
                break
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
    newest = steps_in(jobs)[-1]
    assert [path.name.split(".")[1] for path in unfinished] == [folder_name(newest + 1)]
    finish(jobs)
    assert resumed_from(jobs) == newest
    assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)
    assert sorted(path.name for path in at.iterdir()) == [folder_name(step) for step in range(1, 10)]


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_leaves_a_checkpoint_of_that_step(
    two_workers: Jobs, every_step: Jobs, tmp_path: Path, workers: int
) -> None:
    """Evaluations between the steps give the signal time to come before the end."""
    straight = every_step if workers == 1 else two_workers
    jobs = changed(straight, tmp_path, checkpoints={"every": 100}, evaluate_every=1)
    with started(jobs, workers) as process:
        wait_until(lambda: len(jobs.history(STAGE)) >= 2, process)
        process.terminate()
        _, log = process.communicate(timeout=60)
    (step,) = steps_in(jobs)
    assert 2 <= step < 10
    assert process.returncode == (3 if workers == 1 else 1), log  # torchrun says in its own way that it was signalled
    assert f"error: stopped as asked after step {step} of 10; the same command goes on from there" in log
    assert not jobs.jobs[STAGE].output.exists()
    finish(jobs, workers)
    assert resumed_from(jobs) == step
    assert jobs.weights_sha256(STAGE) == straight.weights_sha256(STAGE)


# Settings.


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

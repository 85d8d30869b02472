"""Going on from a checkpoint on real processes: on any number of workers, and after any end."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rxt_platform.training.checkpoints import checkpoints_in, folder_name
from rxt_platform.training.sharding import KINDS
from tests.dist.checkpoints import (
    STAGE,
    changed,
    checkpoints_of,
    finish,
    interrupted,
    resumed_from,
    started,
    steps_in,
    wait_until,
)
from tests.support import Jobs

pytestmark = pytest.mark.dist

SUM = re.compile(r"(\S+) sum (\S+) norm ([^\s,]+)")


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
    done = jobs.run(STAGE, 2, "dist/gone_back.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r'"losses": (\[.*?\])', done.stdout)
    assert len(found) == 2, done.stdout
    for start, end, start_again, end_again in map(json.loads, found):
        assert (start_again, end_again) == (start, end)
        assert end < start


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
        _, log = process.communicate(timeout=120)
    (step,) = steps_in(jobs)
    assert 2 <= step < 10
    assert process.returncode == (3 if workers == 1 else 1), log  # torchrun says in its own way that it was signalled
    assert f"error: stopped as asked after step {step} of 10; the same command goes on from there" in log
    assert not jobs.jobs[STAGE].output.exists()
    finish(jobs, workers)
    assert resumed_from(jobs) == step
    assert jobs.weights_sha256(STAGE) == straight.weights_sha256(STAGE)

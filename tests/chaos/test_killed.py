"""Kills in the middle of a run: nothing finished is lost, the result is the same, no process stays."""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from rxt_platform.orchestration.plan import build_plan
from rxt_platform.training.checkpoints import checkpoints_in
from rxt_platform.training.job import STOP
from tests.chaos.freezing import freeze, thaw, wait_for
from tests.support import driver_command, environment, read_report, run_driver, small_run, weights_of

pytestmark = pytest.mark.chaos

STAGES = ("pretraining", "sft")


def work_of(storage: Path, stage: str) -> Path:
    """The work folder of a stage of the small pipeline."""
    (step,) = (step for step in build_plan(small_run(storage)) if step.name == stage)
    return step.work


def start_driver(storage: Path) -> subprocess.Popen[str]:
    """The first stages of the small pipeline, in the background."""
    return subprocess.Popen(
        driver_command(storage, stages=STAGES),
        env=environment(),
        cwd=storage,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_driver_then_the_same_command(finished_pipeline: Path, tmp_path: Path) -> None:
    """SIGKILL in stage 2: finished steps are reused, stage 2 resumes, the weights equal an uninterrupted run's.

    Its two workers are killed with it: left alone, they may reach the end of so small a stage before Ray ends them.
    """
    driver = start_driver(tmp_path)
    workers = freeze(work_of(tmp_path, "sft"))
    children = psutil.Process(driver.pid).children(recursive=True)
    assert {worker.pid for worker in workers} < {child.pid for child in children}
    for process in (driver, *workers):
        process.send_signal(signal.SIGKILL)
    driver.communicate()
    done = run_driver(tmp_path, stages=STAGES)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_report(tmp_path)
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert status == {
        "corpus": "reused",
        "tokenizer": "reused",
        "tokens": "reused",
        "pretraining": "reused",
        "sft": "resumed",
        "evaluation": "made",
    }
    assert weights_of(report, "sft") == weights_of(read_report(finished_pipeline), "sft")
    # Ray's agents look for their raylet once a minute.
    wait_for(lambda: not any(is_alive(child) for child in children), "Ray's processes to end", 180)


def test_killed_worker_is_replaced_and_the_result_is_the_same(finished_pipeline: Path, tmp_path: Path) -> None:
    driver = start_driver(tmp_path)
    workers = freeze(work_of(tmp_path, "pretraining"))
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    thaw(workers[:1])
    out, err = driver.communicate(timeout=600)
    assert driver.returncode == 0, out[-2000:] + err[-2000:]
    report = read_report(tmp_path)
    assert report["steps"][3]["status"] == "resumed"
    assert weights_of(report, "sft") == weights_of(read_report(finished_pipeline), "sft")
    history = (Path(report["steps"][3]["artifact"]) / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, 11))


def test_stopped_driver_leaves_a_checkpoint(finished_pipeline: Path, tmp_path: Path) -> None:
    """SIGTERM in stage 2: exit status 3 after a checkpoint of that very step; the same command goes on from it."""
    driver = start_driver(tmp_path)
    work = work_of(tmp_path, "sft")
    workers = freeze(work)
    driver.send_signal(signal.SIGTERM)
    wait_for((work / STOP).exists, "the driver to pass it on", 90)
    thaw(workers)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 3, out[-2000:] + err[-2000:]
    assert "stopped: sft-" in err
    assert "the same command goes on from there" in err
    newest = checkpoints_in(work / "checkpoints")[-1]
    assert f"stopped as asked after step {int(newest.name[5:])} of 10" in err
    done = run_driver(tmp_path, stages=STAGES)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_report(tmp_path)
    assert report["steps"][4]["status"] == "resumed"
    assert weights_of(report, "sft") == weights_of(read_report(finished_pipeline), "sft")


def is_alive(process: psutil.Process) -> bool:
    """Running, not a zombie that nobody has waited for."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

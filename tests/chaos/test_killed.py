"""Kills in the middle of a run: nothing finished is lost, the result is the same, no process stays."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rxt_platform.orchestration.plan import build_plan
from tests.support import driver_command, environment, read_report, run_driver, small_run, weights_of

pytestmark = pytest.mark.chaos


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Poll until something holds; the deadline names what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def logged_steps(storage: Path, stage: str) -> int:
    """Steps that the stage has logged."""
    (step,) = (step for step in build_plan(small_run(storage)) if step.name == stage)
    path = step.work / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def start_driver(storage: Path) -> subprocess.Popen[str]:
    """The small pipeline, in the background."""
    return subprocess.Popen(
        driver_command(storage),
        env=environment(),
        cwd=storage,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_driver_then_the_same_command(finished_pipeline: Path, tmp_path: Path) -> None:
    """SIGKILL in stage 3: finished steps are reused, stage 3 resumes, the weights equal an uninterrupted run's."""
    driver = start_driver(tmp_path)
    wait_for(lambda: logged_steps(tmp_path, "memory_pretraining") >= 5, "step 5 of stage 3", 240)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert children
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    # Ray's agents look for their raylet once a minute.
    wait_for(lambda: not any(is_alive(child) for child in children), "Ray's processes to end", 90)
    done = run_driver(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_report(tmp_path)
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert status == {
        "corpus": "reused",
        "tokenizer": "reused",
        "tokens": "reused",
        "pretraining": "reused",
        "sft": "reused",
        "memory_pretraining": "resumed",
        "memory_aware": "made",
        "evaluation": "made",
    }
    assert weights_of(report) == weights_of(read_report(finished_pipeline))


def test_killed_worker_is_replaced_and_the_result_is_the_same(finished_pipeline: Path, tmp_path: Path) -> None:
    driver = start_driver(tmp_path)
    wait_for(lambda: logged_steps(tmp_path, "pretraining") >= 5, "step 5 of stage 1", 240)
    workers = [
        child
        for child in psutil.Process(driver.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out[-2000:] + err[-2000:]
    report = read_report(tmp_path)
    assert report["steps"][3]["status"] == "resumed"
    assert weights_of(report) == weights_of(read_report(finished_pipeline))
    history = (Path(report["steps"][3]["artifact"]) / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, 11))


def test_stopped_driver_leaves_a_checkpoint(finished_pipeline: Path, tmp_path: Path) -> None:
    """SIGTERM in stage 2: exit status 3 after a checkpoint of that very step; the same command goes on from it."""
    driver = start_driver(tmp_path)
    wait_for(lambda: logged_steps(tmp_path, "sft") >= 4, "step 4 of stage 2", 240)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 3, out[-2000:] + err[-2000:]
    assert "stopped: sft-" in err
    assert "the same command goes on from there" in err
    (step,) = (step for step in build_plan(small_run(tmp_path)) if step.name == "sft")
    newest = sorted((step.work / "checkpoints").glob("step-*"))[-1]
    assert f"stopped as asked after step {int(newest.name[5:])} of 10" in err
    done = run_driver(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_report(tmp_path)
    assert report["steps"][4]["status"] == "resumed"
    assert weights_of(report) == weights_of(read_report(finished_pipeline))


def is_alive(process: psutil.Process) -> bool:
    """Running, not a zombie that nobody has waited for."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

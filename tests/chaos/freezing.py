"""A stage held still in the middle of it, so that a fault meets the same place on a fast and a slow machine."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rxt_platform.training.checkpoints import checkpoints_in


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Poll until something holds; the deadline names what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def freeze(work: Path, seconds: float = 480) -> list[psutil.Process]:
    """SIGSTOP a job's workers as soon as it has its first checkpoint; the workers by their ranks."""
    checkpoints = work / "checkpoints"
    wait_for(lambda: any(map(is_whole, checkpoints_in(checkpoints))), f"a checkpoint in {checkpoints}", seconds)
    return hold(work)


def hold(work: Path) -> list[psutil.Process]:
    """SIGSTOP a job's workers now; the workers by their ranks."""
    places = sorted((work / "workers").glob("rank-*.json"))
    workers = [psutil.Process(json.loads(path.read_text())["pid"]) for path in places]
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    assert workers, f"{work}: ended before it could be held"
    return workers


def is_whole(checkpoint: Path) -> bool:
    """Its manifest, written last, is there."""
    return (checkpoint / "manifest.json").exists()


def thaw(workers: list[psutil.Process]) -> None:
    """Let those of them that still are there go on."""
    for worker in workers:
        if worker.is_running():
            worker.send_signal(signal.SIGCONT)

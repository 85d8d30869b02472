"""Who is where, and who failed: what turns a killed, hung or failing worker into one error that names it.

Each rank keeps a small file with the step and the part of it that it is in, renewed every second by a thread; a process
that was stopped or killed stops renewing it. A rank that fails notes why. When a collective fails or times out, the
ranks that waited read the others' files and say whom they waited for.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rxt_platform.errors import ArtifactError, ResumeError, RxtError, StoppedError, TrainingError

logger = logging.getLogger(__name__)

_RENEWED = 1.0  # seconds
_OBSERVED = 3.0  # seconds in which a rank that failed leaves its note, and one that is alive renews its file
_COLLECTIVE = "collective failed"
_ATTEMPT = "attempt"  # file that names the current one
_SHARED = 60.0  # seconds until a file of one node is seen on another
_SUPERSEDED = 71  # exit status of a worker whose job goes on elsewhere


@dataclass(frozen=True)
class Failure:
    """Why a rank gave up."""

    attempt: str
    invocation: str
    rank: int
    host: str
    pid: int
    step: int  # being done, counted from 1
    part: str
    kind: str
    message: str
    time: float
    final: bool  # the same would happen again: no use in trying

    def __str__(self) -> str:
        what = self.message if self.final else f"{self.kind}: {self.message}"
        return f"worker {self.rank} (process {self.pid} on {self.host}), step {self.step}, {self.part}: {what}"


class Watch:
    """This rank's whereabouts and failures, in files under `directory` that all ranks see."""

    def __init__(self, directory: Path, rank: int, world: int, attempt: str = "", invocation: str = "") -> None:
        self.directory, self.rank, self.world = directory, rank, world
        self.attempt, self.invocation = attempt, invocation
        self.step, self.part = 0, "start"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="whereabouts", daemon=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def check_current(self) -> None:
        """Raises ResumeError when the job was started again elsewhere: this attempt's driver is gone."""
        current = _current_attempt(self.directory)
        if current not in ("", self.attempt):
            raise ResumeError(f"{self.directory.parent}: the job was started again as attempt {current}; this one ends")

    def close(self) -> None:
        """Stop renewing the file, and remove it."""
        self._ended.set()
        self._thread.join(timeout=5)
        self._file(self.rank).unlink(missing_ok=True)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Note what leaves the block as an exception; a failed collective is attributed to who caused it."""
        try:
            yield
        except StoppedError:
            raise
        except RxtError as error:
            self._note(error, final=True)
            raise
        except Exception as error:
            if not _is_of_a_collective(error):
                self._note(error, final=False)
                raise
            cause = self._cause()
            self._note(error, final=False)
            raise TrainingError(f"{cause} (worker {self.rank} noticed in step {self.step}, {self.part})") from error

    def _cause(self) -> str:
        """Which other rank a failed or timed-out collective was waiting for."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        before = {rank: self._whereabouts(rank) for rank in others}
        deadline = time.monotonic() + _OBSERVED
        while time.monotonic() < deadline:
            for failure in read_failures(self.directory):
                if failure.attempt == self.attempt and failure.rank != self.rank and failure.kind != _COLLECTIVE:
                    return str(failure)
            time.sleep(0.1)
        found = []
        for rank in others:
            here = self._whereabouts(rank)
            if here is None:
                found.append(f"worker {rank} left no trace")
                continue
            place = f"worker {rank} (process {here['pid']} on {here['host']})"
            at = f"in step {here['step']}, {here['part']}"
            if here == before[rank]:
                found.append(f"{place} was last heard of {time.time() - here['time']:.0f} s ago {at}")
            elif here["step"] < self.step:
                found.append(f"{place} is still {at}")
        return "; ".join(found) or "the connection between the workers broke"

    def _whereabouts(self, rank: int) -> dict[str, Any] | None:
        try:
            here: dict[str, Any] = json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None
        return here

    def _note(self, error: BaseException, final: bool) -> None:
        lines = str(error).strip().splitlines() or [""]
        failure = Failure(
            attempt=self.attempt,
            invocation=self.invocation,
            rank=self.rank,
            host=platform.node(),
            pid=os.getpid(),
            step=self.step,
            part=self.part,
            kind=_COLLECTIVE if _is_of_a_collective(error) else type(error).__name__,
            message=lines[0] if not final else " ".join(lines),
            time=time.time(),
            final=final,
        )
        try:
            with (self.directory / f"failures-{self.rank:05d}.jsonl").open("a") as file:
                file.write(json.dumps(asdict(failure)) + "\n")
        except OSError:
            logger.exception("worker %d could not note why it failed", self.rank)

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}.json"

    def _renew(self) -> None:
        path = self._file(self.rank)
        unfinished = path.with_suffix(".tmp")
        while True:
            here = {"rank": self.rank, "pid": os.getpid(), "host": platform.node(), "time": time.time()}
            try:
                unfinished.write_text(json.dumps({**here, "step": self.step, "part": self.part}))
                unfinished.rename(path)
            except OSError as error:  # a full disk must not end the training before the checkpoint says so
                logger.debug("whereabouts not renewed: %s", error)
            if self._ended.wait(_RENEWED):
                return
            if _current_attempt(self.directory) not in ("", self.attempt):
                logger.error("worker %d: the job was started again elsewhere; this attempt ends", self.rank)
                os._exit(_SUPERSEDED)


def claim(directory: Path, invocation: str = "", invoked: float = 0.0) -> str:
    """A new attempt's name; workers of earlier attempts, which a killed driver may have left running, end by it.

    Raises ResumeError when a command that was given later (at `invoked`, seconds since the epoch) has the job by now.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _ATTEMPT
    attempt = {"attempt": uuid.uuid4().hex[:8], "invocation": invocation, "invoked": invoked or time.time()}
    with contextlib.suppress(OSError, ValueError):
        there = json.loads(path.read_text())
        if there["invocation"] != invocation and there["invoked"] > attempt["invoked"]:
            raise ResumeError(f"{directory.parent}: a later command has taken this job over; this one ends")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(attempt))
    unfinished.rename(path)
    return str(attempt["attempt"])


def wait_for_claim(directory: Path, attempt: str) -> None:
    """Every rank must see what rank 0 wrote. Raises ArtifactError when this one's folder is another."""
    deadline = time.monotonic() + _SHARED
    while _current_attempt(directory) != attempt:
        if time.monotonic() > deadline:
            raise ArtifactError(
                f"{directory}: not the folder that worker 0 writes to, as seen from {platform.node()}: "
                "set 'storage' to a folder that all nodes share"
            )
        time.sleep(0.1)


def silent_worker(directory: Path) -> str | None:
    """Of a job that ended without a word: the worker that was heard of last long before the others."""
    found = []
    for path in directory.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    if not found:
        return None
    first = min(found, key=lambda here: here["time"])
    place = f"worker {first['rank']} (process {first['pid']} on {first['host']})"
    return f"{place} was lost in step {first['step']}, {first['part']}, without a word"


def _current_attempt(directory: Path) -> str:
    try:
        return str(json.loads((directory / _ATTEMPT).read_text())["attempt"])
    except (OSError, ValueError):  # removed with the work folder, or out of reach for a moment
        return ""


def read_failures(directory: Path, invocation: str | None = None) -> list[Failure]:
    """What ranks noted, oldest first; those of one invocation if given."""
    failures = []
    for path in directory.glob("failures-*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                failures.append(Failure(**json.loads(line)))
            except (ValueError, TypeError):
                continue  # a line that was being written when its process was killed
    chosen = [one for one in failures if invocation is None or one.invocation == invocation]
    return sorted(chosen, key=lambda one: one.time)


def root_cause(failures: list[Failure]) -> Failure | None:
    """Of the newest attempt's failures the one that led to the others."""
    if not failures:
        return None
    newest = [one for one in failures if one.attempt == failures[-1].attempt]
    return next((one for one in newest if one.kind != _COLLECTIVE), newest[0])


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, not that something is wrong here."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset by peer",
        "recv operation",
        "send operation",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

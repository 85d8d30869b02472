"""One computing thread with a bounded queue before it and a deadline for each job; the event loop never computes."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rxt_platform.serving.schema import Refusal
from rxt_platform.serving.worker import OnTime

logger = logging.getLogger(__name__)

_STUCK = 3.0  # deadlines


class Lane:
    """Runs jobs one after the other."""

    def __init__(self, max_queued: int, timeout_s: float) -> None:
        self._max_queued, self._timeout_s = max_queued, timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._lock = threading.Lock()
        self._inside = 0
        self._started: float | None = None
        self._mean_s = 0.1

    async def run(self, job: Callable[[OnTime], Any]) -> Any:
        """The job's result. Refuses at once when the queue is full (503), and when the deadline passes (504).

        A job that waits past its deadline is not begun; one that computes is told by its `on_time`.
        """
        with self._lock:
            if self._inside > self._max_queued:
                wait = self._mean_s * self._inside
                raise Refusal(503, "busy", f"{self._inside} requests at work or waiting here", retry_after_s=wait)
            self._inside += 1
        deadline = time.monotonic() + self._timeout_s
        future = self._thread.submit(self._timed, job, deadline)
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._timeout_s)
        except TimeoutError:
            raise self._late() from None
        except (Refusal, asyncio.CancelledError):
            raise
        except Exception as error:  # whatever the computing did wrong: the caller learns that, the log what
            logger.exception("a request failed")
            raise Refusal(500, "internal", f"the service failed: {type(error).__name__}; see its log") from error

    def check(self) -> None:
        """Raises RuntimeError when a job computes far beyond its deadline: nothing will come of this replica."""
        started = self._started
        if started is not None and (seconds := time.monotonic() - started) > _STUCK * self._timeout_s:
            raise RuntimeError(f"a job has been computing for {seconds:.0f} s; its deadline is {self._timeout_s:g} s")

    def _timed(self, job: Callable[[OnTime], Any], deadline: float) -> Any:
        def on_time() -> None:
            if time.monotonic() > deadline:
                raise self._late()

        on_time()
        self._started = started = time.monotonic()
        try:
            return job(on_time)
        finally:
            self._started = None
            self._mean_s += 0.2 * (time.monotonic() - started - self._mean_s)

    def _leave(self, _: Future[Any]) -> None:
        with self._lock:
            self._inside -= 1

    def _late(self) -> Refusal:
        return Refusal(504, "deadline", f"no answer within {self._timeout_s:g} s: send fewer rows, or add replicas")

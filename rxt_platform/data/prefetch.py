"""Batches made ahead of the step by one thread, in order, so that the step does not wait for data."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rxt_platform.data.batches import Batch
from rxt_platform.errors import DataError

_DEPTH = 3  # batches that wait
_DEADLINE = 600.0  # seconds for one batch


@contextmanager
def prefetched(make: Callable[[int], Batch], first: int, last: int) -> Iterator[Callable[[], Batch]]:
    """Yields a function that returns `make(first)`, `make(first + 1)`, ... up to `make(last - 1)`.

    What `make` raises is raised by that call; so is DataError when a batch takes longer than ten minutes. The thread
    ends with the block, whether all batches were taken or not.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(_DEPTH)
    done = threading.Event()

    def put(value: Batch | BaseException) -> None:
        while not done.is_set():
            try:
                ready.put(value, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for step in range(first, last):
                if done.is_set():
                    return
                put(make(step))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that takes batches
            put(error)

    def take() -> Batch:
        try:
            value = ready.get(timeout=_DEADLINE)
        except queue.Empty:
            raise DataError(
                f"no batch came within {_DEADLINE:g} s: can the storage of the token shards be read?"
            ) from None
        if isinstance(value, BaseException):
            raise value
        return value

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield take
    finally:
        done.set()
        thread.join(timeout=10)  # a read that hangs must not hold up the error that says so

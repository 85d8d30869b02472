"""SIGTERM and Ctrl-C while a pipeline runs: training ends with a checkpoint, anything else at once; twice ends all."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rxt_platform.errors import StoppedError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopper:
    """Turns the first signal into a request, the second into KeyboardInterrupt."""

    def __init__(self) -> None:
        self._ask: Callable[[], None] | None = None
        self._asked = self._listens = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in the block; outside the main thread, where Python allows no handlers, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._listens = True
        self.listen_again()
        try:
            yield
        finally:
            self._listens = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen_again(self) -> None:
        """After `ray.init`, which puts a handler of its own in place: SIGTERM would abort the process."""
        if self._listens:
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)

    @contextmanager
    def gently(self, ask: Callable[[], None]) -> Iterator[None]:
        """In the block a signal calls `ask` and the block is expected to end by itself."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._ask is None:
            raise StoppedError(f"stopped by {name}; the same command goes on where it was")
        logger.warning("%s: training stops after a checkpoint; once more to stop at once", name)
        self._ask()

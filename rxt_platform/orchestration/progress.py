"""What a person sees while a step runs: a live line in a terminal, a plain line now and then in a log."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

logger = logging.getLogger(__name__)

_PLAIN_SECONDS = 15.0

Row = dict[str, float]


class Console:
    """Writes lines; the live one is overwritten by the next."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._shown = 0
        self._last_plain = 0.0

    def line(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def progress(self, step_name: str, row: Row) -> None:
        """Where a training step is."""
        step, steps = int(row["step"]), int(row["steps"])
        left = (steps - step) * row.get("step_seconds", 0.0)
        told = f"reward {row['reward']:.3f}" if "reward" in row else f"loss {row.get('loss', float('nan')):.4f}"
        text = (
            f"  {step_name}  {step}/{steps}  {told}  {row.get('tokens_per_second', 0):,.0f} tokens/s  {left:.0f} s left"
        )
        if self.live:
            self._clear()
            self.stream.write(text)
            self.stream.flush()
            self._shown = len(text)
        elif time.monotonic() - self._last_plain > _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self.line(text)

    def _clear(self) -> None:
        if self._shown:
            self.stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0


class HistoryFollower:
    """Follows a step's `metrics.jsonl` from a thread and hands new rows on, until the `with` block ends."""

    def __init__(self, path: Path, on_rows: Callable[[list[Row]], None], interval: float = 1.0) -> None:
        self._path, self._on_rows, self._interval = path, on_rows, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="history", daemon=True)
        self._last_step = -1.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._pass_on()

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._pass_on()
            except Exception:  # showing progress must not end, or hide the end of, what it shows
                logger.exception("progress of %s could not be passed on", self._path)

    def _pass_on(self) -> None:
        """Hand over complete lines that are newer than the last; a resumed job writes its steps again."""
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        new = [row for row in rows if row["step"] > self._last_step]
        if new:
            self._last_step = new[-1]["step"]
            self._on_rows(new)

"""What the engine measures of itself: where a step's time goes, tokens/s, utilisation, memory; spans and traces."""

import json
import logging
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rxt_platform.config.training import ProfileConfig
from rxt_platform.training.watch import Watch

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Part = Literal[
    "data", "generation", "reward", "collection", "forward", "backward", "optimizer", "checkpoint", "evaluation"
]

PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer", "checkpoint")
DATA_SHEET_TFLOPS = {"H100 80GB HBM3": 989.0, "H200": 989.0}
"""Dense bf16, from the vendor's data sheets; other devices are measured."""


class Parts:
    """Named stretches of time of a step; on a GPU they are known once the device has come so far."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Any, Any]] = []

    def add(self, name: str, start: Any, end: Any) -> None:
        """Clock readings or events."""
        self._spans.append((name, start, end))

    def seconds(self) -> dict[str, float]:
        """Of each part."""
        found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._spans:
            if isinstance(start, float):
                elapsed = end - start
            else:
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1e3
            found[name] = found.get(name, 0.0) + elapsed
        return found


class StepClock:
    """Splits time into parts. On a GPU by events, read only when a step is logged, so that nothing waits for them."""

    def __init__(self, device: torch.device, watch: Watch) -> None:
        self._cuda = device.type == "cuda"
        self._watch = watch
        self._parts = Parts()

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """What the block does is part `name` of the step; failures in it say so."""
        self._watch.part = name
        started = self._now()
        yield
        self._parts.add(name, started, self._now())

    def take(self) -> Parts:
        """The parts since the last call."""
        taken, self._parts = self._parts, Parts()
        return taken

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Spans:
    """One JSON line for each step of this rank: when it began, how long each part took, and how many tokens it had.

    Written in blocks. A resumed job adds to the file: repeated steps stand in it again, under another attempt.
    """

    def __init__(self, path: Path, rank: int, attempt: str) -> None:
        self._path, self._rank, self._attempt = path, rank, attempt
        self._waiting: list[tuple[dict[str, Any], Parts]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, start: float, parts: Parts, tokens: int, rows: Sequence[int] | None = None) -> None:
        """A finished step (from 1) that began at `start` (seconds since the epoch); `rows` are those of this rank."""
        span: dict[str, Any] = {
            "rank": self._rank,
            "attempt": self._attempt,
            "step": step,
            "start": start,
            "tokens": tokens,
        }
        if rows is not None:
            span["rows"] = list(rows)
        self._waiting.append((span, parts))

    def flush(self) -> None:
        """Write what has gathered."""
        waiting, self._waiting = self._waiting, []
        lines = [
            json.dumps({**span, "seconds": {name: round(value, 6) for name, value in parts.seconds().items()}})
            for span, parts in waiting
        ]
        if lines:
            try:
                with self._path.open("a") as file:
                    file.write("\n".join(lines) + "\n")
            except OSError as error:  # a record only; what must not be lost complains by itself
                logger.warning("%s: %d spans are lost: %s", self._path, len(lines), error)


class Meter:
    """Means over the steps since the last logged one, and rates."""

    def __init__(self, peak_flops: float, device: torch.device) -> None:
        self._peak, self._device = peak_flops, device
        self._begin()

    def _begin(self) -> None:
        self._started = time.monotonic()
        self._steps = self._applied = 0
        self._tokens = self._flops = 0
        self._sums: Metrics = {}
        self._parts: list[Parts] = []

    def add(self, metrics: Metrics, tokens: int, flops: int) -> None:
        """A step that updated the weights."""
        self._steps, self._applied = self._steps + 1, self._applied + 1
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def add_skipped(self) -> None:
        """A step that did not."""
        self._steps += 1

    def add_time(self, parts: Parts) -> None:
        """Where a step's time went."""
        self._parts.append(parts)

    def take(self) -> Metrics:
        """Means of the metrics; seconds of each part a step; tokens/s over all workers; utilisation of this one."""
        together: Metrics = {}
        for one in self._parts:
            for name, value in one.seconds().items():
                together[name] = together.get(name, 0.0) + value
        seconds = time.monotonic() - self._started - together.get("evaluation", 0.0)
        steps = max(self._steps, 1)
        means = {name: value / max(self._applied, 1) for name, value in self._sums.items()}
        parts = {f"{name}_seconds": value / steps for name, value in together.items()}
        found = {
            **means,
            **parts,
            "step_seconds": seconds / steps,
            "tokens_per_second": self._tokens / seconds,
            "utilisation": self._flops / seconds / self._peak,
            "peak_memory_bytes": float(peak_memory(self._device)),
        }
        self._begin()
        return found


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held at once: on the GPU by tensors, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device, precision: Literal["fp32", "bf16"], given_tflops: float | None) -> float:
    """FLOP/s that utilisation is a share of: given, the data sheet's, or the best of some matrix products timed now."""
    if given_tflops is not None:
        return given_tflops * 1e12
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for chip, tflops in DATA_SHEET_TFLOPS.items():
            if chip in name:
                return tflops * 1e12
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(a, b) for _ in range(5))


def _seconds(a: Tensor, b: Tensor) -> float:
    started = time.perf_counter()
    float((a @ b)[0, 0])  # waits for the device
    return time.perf_counter() - started


class Profiler:
    """Traces some steps with torch.profiler, for chrome://tracing or Perfetto; does nothing if not asked for."""

    def __init__(self, config: ProfileConfig | None, path: Path, device: torch.device) -> None:
        self._config, self._path = config, path
        self._steps = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True) if config else None

    def before_step(self) -> None:
        """Begins and ends the trace at its steps."""
        if self._config is None or self._profiler is None:
            return
        if self._steps == self._config.first:
            self._profiler.start()
        self._steps += 1

    def after_step(self) -> None:
        """Writes the trace after its last step."""
        if self._config is not None and self._steps == self._config.first + self._config.steps:
            self.close()

    def close(self) -> None:
        """Writes a trace that is under way."""
        if self._config is not None and self._profiler is not None and self._steps > self._config.first:
            self._profiler.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None

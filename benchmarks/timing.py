"""What the benchmarks share: options of the machine, interleaved timing, and results that say where they came from.

Machines are noisy, so the arms of a comparison alternate in one run: a ratio is the median over the repeats of the
quotient of two measurements made next to each other.
"""

import functools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from rxt_platform.training.distributed import use_cpus

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """Where a benchmark runs, and in which precision."""

    device: torch.device
    dtype: torch.dtype
    threads: int

    def synchronise(self) -> None:
        """Wait until the device has done all it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def now(self) -> float:
        """Seconds on a clock that is read once the device is idle."""
        self.synchronise()
        return time.perf_counter()

    def environment(self) -> dict[str, str | int]:
        """What a figure can't be read without."""
        return {
            "device": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "torch": torch.__version__,
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
        }


def machine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --device, --dtype, --threads (given to the command as `machine`), --json and --seed."""

    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
    @click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="torch's CPU threads")
    @click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write the results here")
    @click.option("--seed", default=0, show_default=True, help="of weights and inputs")
    @functools.wraps(command)
    def wrapped(device: str, dtype: str, threads: int, seed: int, **rest: Any) -> None:
        use_cpus(threads)
        torch.manual_seed(seed)
        command(machine=Machine(torch.device(device), DTYPES[dtype], threads), seed=seed, **rest)

    return wrapped


def interleaved(
    arms: Mapping[str, Callable[[], object]], repeats: int, machine: Machine, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every arm in every repeat; within a repeat the arms run one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(-warmup, repeats):
        for name, run in arms.items():
            started = machine.now()
            run()
            elapsed = machine.now() - started
            if repeat >= 0:
                seconds[name].append(elapsed)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of first / second over measurements that were made next to each other."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def report(
    benchmark: str,
    machine: Machine,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    json_file: Path | None,
) -> dict[str, Any]:
    """Print the line that says where the figures were measured; write them all to `json_file`, and return them."""
    environment = machine.environment()
    print("\n" + " · ".join(f"{name} {value}" for name, value in environment.items()))
    found = {"benchmark": benchmark, "environment": environment, "settings": settings, "results": results}
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def gemm_flops(machine: Machine, size: int = 1024) -> tuple[Callable[[], object], float]:
    """A square matrix product to be timed as an arm, and its FLOPs: the peak where no data sheet's figure is given."""
    size = size if machine.device.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, device=machine.device, dtype=machine.dtype) for _ in range(2))
    return lambda: a @ b, 2 * math.pow(size, 3)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with a + when tracked files differ from it; $COMMIT where the tree is a copy without git."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")

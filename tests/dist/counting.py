"""A training process that counts the collectives of its steps: `counting.py JOB.json OUT`, alone or under torchrun."""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "all_to_all_single")


def counted(name: str, original: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """A collective that counts the elements it was given."""

    @functools.wraps(original)
    def wrapped(*inputs: Any, **options: Any) -> Any:
        counts["calls"] += 1
        counts["elements"] += max(one.numel() for one in (*inputs, *options.values()) if isinstance(one, Tensor))
        return original(*inputs, **options)

    return wrapped


def main() -> int:
    """Run the job; write what its training steps reduced."""
    counts: Counter[str] = Counter()
    for name in REDUCTIONS:  # before DeepSpeed takes them
        setattr(dist, name, counted(name, getattr(dist, name), counts))
    from rxt_platform.training.__main__ import main as train
    from rxt_platform.training.step import StepRunner

    run = StepRunner.run
    steps: list[dict[str, int]] = []

    def observed(self: StepRunner, *inputs: Any, **options: Any) -> Any:
        counts.clear()
        outcome = run(self, *inputs, **options)
        steps.append(dict(counts))
        return outcome

    StepRunner.run = observed  # type: ignore[method-assign]
    job, out = sys.argv[1:]
    sys.argv = [sys.argv[0], job]
    status = train()
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(steps))
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

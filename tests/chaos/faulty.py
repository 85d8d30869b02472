"""A training process with a fault in it: `faulty.py JOB.json KIND RANK STEP`, alone or under torchrun.

The fault comes from outside: the package has no hooks for it. KIND: `nan-loss`, `nan-gradient`, `raise`, `stop`
(SIGSTOP of itself), `spike` (a loss that is far too high), `spikes` (in every step from there on).
"""

import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from rxt_platform.training import engine
from rxt_platform.training.__main__ import main
from rxt_platform.training.step import StepRunner


def infect(kind: str, rank: int, step: int) -> None:
    """Make rank `rank` fail in step `step` (from 1), each time that it comes there."""
    forward, run = engine.StageProgram.forward, StepRunner.run
    now = 0

    def counted(self: StepRunner, number: int, *rest: Any, **options: Any) -> Any:
        nonlocal now
        now = number + 1
        outcome = run(self, number, *rest, **options)
        now = 0
        return outcome

    def faulty(self: engine.StageProgram, *rest: Any, **options: Any) -> Any:
        report = forward(self, *rest, **options)
        lasting = kind == "spikes" and now >= step
        if not (now == step or lasting) or dist.get_rank() != rank:
            return report
        if kind == "raise":
            raise ValueError("an injected fault")
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "nan-loss":
            report.loss = report.loss * float("nan")
        elif kind == "nan-gradient":
            report.loss.register_hook(lambda gradient: gradient * float("nan"))
        elif kind in ("spike", "spikes"):
            report.loss = report.loss * 100
        return report

    StepRunner.run = counted  # type: ignore[method-assign]
    engine.StageProgram.forward = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    _, job, fault, at_rank, at_step = sys.argv
    infect(fault, int(at_rank), int(at_step))
    sys.argv = [sys.argv[0], job]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

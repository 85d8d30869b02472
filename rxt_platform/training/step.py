"""One optimizer step on a global batch: every rank's part forward and backward, agreement among the ranks, update."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.layers import rebalance
from rxt_platform.stages.base import LossReport, Stage, TrainingBatch, phase_at
from rxt_platform.training.guards import SpikeError, SpikeGuard
from rxt_platform.training.measures import Metrics, StepClock
from rxt_platform.training.strategy import Strategy


@dataclass(frozen=True)
class Wishes:
    """What a rank asks for; added up over the ranks in the reduction of every step."""

    stop: bool = False
    checkpoint: bool = False
    write_failed: bool = False

    def numbers(self) -> list[float]:
        """To be summed."""
        return [float(self.stop), float(self.checkpoint), float(self.write_failed)]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Wishes":
        """From the sums."""
        return cls(*(number > 0 for number in numbers))


@dataclass
class Outcome:
    """Of one step: its metrics over all ranks, or why its update was left out; and what some rank asks for."""

    metrics: Metrics
    flops: int
    tokens: int
    rows: list[int] = field(default_factory=list)  # that this rank trained on
    norms: Metrics = field(default_factory=dict)  # of each component's gradient, where asked for
    skipped: str | None = None
    wishes: Wishes = Wishes()


class StepRunner:
    """Makes a stage's steps on this rank, `micro` rows a forward."""

    def __init__(
        self, stage: Stage, strategy: Strategy, flops: ForwardFlops, micro: int, device: torch.device, clock: StepClock
    ) -> None:
        self.stage, self.strategy, self.flops = stage, strategy, flops
        self.micro, self.device, self.clock = micro, device, clock
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def run(self, step: int, batch: TrainingBatch, guard: SpikeGuard, wishes: Wishes, norms: bool) -> Outcome:
        """One optimizer step on the global batch; the metrics are those of the whole batch."""
        phase = phase_at(self.stage.phases(), step)
        rate = self.strategy.set_rates(step, self.stage.sampler.total_steps, phase)
        sums: LossReport | None = None
        losses: list[tuple[TrainingBatch, Tensor]] = []
        flops = 0
        parts = list(batch.shares(self.rank, self.world, self.micro))
        for number, part in enumerate(parts, start=1):
            flops += self.stage.flops(self.flops, part, phase)
            with self.clock.part("forward"):
                report = self.strategy.engine(part.to(self.device), phase)
            with self.clock.part("backward"):
                self.strategy.backward(report.loss, last=number == len(parts))
            losses.append((part, report.loss.detach()))
            sums = report.detached() if sums is None else sums.plus(report)
        assert sums is not None
        with self.clock.part("optimizer"):
            metrics, wishes = self._over_ranks(sums, wishes)
            outcome = Outcome(metrics, flops, batch.tokens, wishes=wishes)
            outcome.rows = [row for part in parts for row in part.rows.tolist()]
            if not math.isfinite(metrics["objective"]):
                self.strategy.discard()
                outcome.skipped = f"the loss is {metrics['objective']}: {self._blame(losses)}"
                return outcome
            try:
                guard.check(step, metrics["objective"])
            except SpikeError:
                self.strategy.discard()
                raise
            by_component = self.strategy.sharded.gradient_norms() if norms else {}
            norm = self.strategy.update()
            if not math.isfinite(norm):
                outcome.skipped = f"the gradient's norm is {norm}, the loss {metrics['objective']:.4g}"
                return outcome
            if sums.usage is not None:
                rebalance(self.strategy.model, sums.usage)
        outcome.metrics = {**metrics, **expert_load(sums.usage), "gradient_norm": norm, "learning_rate": rate}
        outcome.norms = {f"gradient_norm.{name}": value for name, value in by_component.items()}
        return outcome

    def leave_out(self, wishes: Wishes) -> Outcome:
        """A step whose batch is not trained on; the ranks still agree on what to do."""
        _, wishes = self._over_ranks(LossReport(torch.zeros((), device=self.device)), wishes)
        return Outcome({}, 0, 0, skipped="left out", wishes=wishes)

    def _over_ranks(self, report: LossReport, wishes: Wishes) -> tuple[Metrics, Wishes]:
        """The metrics summed over the ranks, and what any of them wishes.

        One reduction a step; it also replaces `report.usage` [M, E] by its sum.
        """
        names = ["objective", *report.metrics]
        asked = wishes.numbers()
        flags = torch.tensor(asked, device=report.loss.device)
        parts = [torch.stack([report.loss.float(), *report.metrics.values()]), flags]
        if report.usage is not None:
            parts.append(report.usage.flatten())
        all_of_it = torch.cat(parts)
        dist.all_reduce(all_of_it)
        if report.usage is not None:
            report.usage = all_of_it[len(names) + len(asked) :].view_as(report.usage)
        values = all_of_it[: len(names) + len(asked)].tolist()
        return dict(zip(names, values, strict=False)), Wishes.of(values[len(names) :])

    def _blame(self, losses: Iterable[tuple[TrainingBatch, Tensor]]) -> str:
        """Which rows' losses are not finite, and on which ranks. All ranks must call it."""
        rows = [row for part, loss in losses if not math.isfinite(float(loss)) for row in part.rows.tolist()]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, rows)
        named = [
            f"worker {rank}: rows {', '.join(self.stage.sampler.place(row) for row in rows)}"
            for rank, rows in enumerate(everyone)
            if rows
        ]
        return "; ".join(named) or "each worker's part alone is finite"


def expert_load(usage: Tensor | None) -> Metrics:
    """Tokens of the busiest and of the idlest expert, as multiples of a fair share, from `usage` [M, E].

    1 and 1 when balanced; E / k and 0 when all tokens go to the same k experts. Nothing without experts.
    """
    if usage is None:
        return {}
    load = usage / usage.mean(dim=1, keepdim=True).clamp(min=1e-9)
    return {"expert_load_max": float(load.max()), "expert_load_min": float(load.min())}

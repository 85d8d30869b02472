"""The training engine: one stage on DeepSpeed ZeRO, on any number of workers, resumable (DESIGN 2-4, 8, 9).

Every rank forms the same global batch and trains on its rows; losses and metrics of parts add up, so two workers
compute what one does. All randomness comes from (seed, step, row). The engine knows no stage by name.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rxt_platform.config.run import TrainingConfig
from rxt_platform.config.stages import StageConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.prefetch import prefetched
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.errors import TrainingError
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import LossReport, Phase, Stage, phase_at
from rxt_platform.training import checkpoints
from rxt_platform.training.optimizer import build_optimizer, schedule, set_learning_rates

logger = logging.getLogger(__name__)

Metrics = dict[str, float]

FORWARD_OVERHEAD = {"cpu": 128, "cuda": 4096}
"""Positions that could be computed in the time that a forward and its backward take to start. Measured with `tiny` on a
CPU; on a GPU a guess: `micro_batch_size` overrides what follows from it."""


@dataclass(frozen=True)
class EngineSettings:
    """How a stage is trained here."""

    training: TrainingConfig
    checkpoint_directory: Path
    identity: str
    device: torch.device


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear of, called on every rank: metrics of logged steps, and the step resumed from."""

    on_metrics: Callable[[int, int, Metrics], None] = lambda step, steps, metrics: None
    on_start: Callable[[int, int], None] = lambda step, steps: None


@dataclass
class TrainResult:
    """Held-out metrics before and after, and what the training took."""

    before: Metrics
    after: Metrics
    steps: int
    seconds: float
    resumed_from: int
    state: dict[str, Tensor] = field(default_factory=dict)  # full weights, on rank 0


class StageProgram(nn.Module):
    """A stage's loss as a module's forward, so that DeepSpeed sees every use of the parameters."""

    def __init__(self, stage: Stage, model: ReactiveTransformer) -> None:
        super().__init__()
        self.stage = stage
        self.model = model

    def forward(self, batch: Batch, phase: Phase, held_out: bool = False) -> LossReport:
        """Loss of a part of a global batch."""
        report = self.stage.evaluate if held_out else self.stage.loss
        return report(self.model, batch, phase)


class Engine:
    """One stage's training: `run()` takes it from its newest checkpoint, or its start, to its end."""

    def __init__(self, model: ReactiveTransformer, stage: Stage, settings: EngineSettings) -> None:
        self.stage, self.settings = stage, settings
        self.phases = stage.phases()
        self.steps = stage.sampler.total_steps
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        rows = stage.config.global_batch_size
        if rows % self.world:
            raise TrainingError(f"global_batch_size {rows} can't be shared by {self.world} workers")
        self.rows = rows // self.world
        self.micro = forward_rows(stage.config, stage.sampler, self.world, settings.training, settings.device.type)
        self.accumulation = self.rows // self.micro
        self.optimizer = build_optimizer(model, stage.config.optimizer, self.phases)
        # What no phase trains comes out as it went in, also where DeepSpeed holds it in bf16.
        self.untrained = {
            name: parameter.detach().clone().cpu()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }
        if settings.training.compile:
            model.compile_layers()
        self.engine = self._deepspeed(StageProgram(stage, model))

    def _deepspeed(self, program: StageProgram) -> Any:
        import deepspeed

        training = self.settings.training
        config = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.stage.config.optimizer.gradient_clip,
            "zero_optimization": {"stage": training.zero_stage},
            "bf16": {"enabled": training.precision == "bf16"},
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(model=program, optimizer=self.optimizer, config=config)
        return engine

    def run(self, validation: list[Batch], hooks: Hooks) -> TrainResult:
        """Train to the end. Raises TrainingError when a loss is not finite."""
        training, directory = self.settings.training, self.settings.checkpoint_directory
        state = checkpoints.load(self.engine, directory, self.settings.identity, training.zero_stage)
        first = state.step if state else 0
        before = dict(state.before) if state else self.evaluate(validation)
        hooks.on_start(first, self.steps)
        spent = state.seconds if state else 0.0
        started = time.monotonic()
        window = _Window()
        with prefetched(self.stage.sampler.global_batch, first, self.steps) as next_batch:
            for step in range(first, self.steps):
                asked = time.monotonic()
                batch = next_batch()
                waited = time.monotonic() - asked
                window.add({**self._step(step, batch), "data_wait_seconds": waited})
                done = step + 1
                if done % training.log_every == 0 or done == self.steps:
                    hooks.on_metrics(done, self.steps, window.summary())
                    window = _Window()
                if done % training.checkpoint_every == 0 and done < self.steps:
                    seconds = spent + time.monotonic() - started
                    self._save(done, seconds, before)
        seconds = spent + time.monotonic() - started
        after = self.evaluate(validation)
        return TrainResult(before, after, self.steps, seconds, first, self.full_state())

    def _save(self, done: int, seconds: float, before: Metrics) -> None:
        training = self.settings.training
        state = checkpoints.ResumeState(done, seconds, self.settings.identity, self.world, training.zero_stage, before)
        checkpoints.save(self.engine, self.settings.checkpoint_directory, state, training.keep_checkpoints)

    def _step(self, step: int, batch: Batch) -> Metrics:
        """One optimizer step on the global batch; the metrics are those of the whole batch."""
        phase = phase_at(self.phases, step)
        rate = schedule(self.stage.config.optimizer, step, self.steps)
        set_learning_rates(self.optimizer, self.stage.config.optimizer, rate, phase)
        norm = math.nan
        metrics: Metrics = {}
        sums: LossReport | None = None
        for part in batch.shares(self.rank, self.world, self.micro):
            report = self.engine(part.to(self.settings.device), phase)
            # DeepSpeed averages over micro-batches and ranks; parts of our loss add up.
            self.engine.backward(report.loss * (self.world * self.accumulation))
            sums = report.detached() if sums is None else sums.plus(report)
            if self.engine.is_gradient_accumulation_boundary():
                metrics = self._over_ranks(sums)
                if not math.isfinite(metrics["objective"]):
                    rows = ", ".join(self.stage.sampler.place(row) for row in batch.rows.tolist())
                    raise TrainingError(
                        f"step {step + 1}: the loss is {metrics['objective']}; nothing was updated; lower the learning "
                        f"rate or look at the batch's rows: {rows}"
                    )
            norm = self._update(step)
        assert sums is not None
        if sums.usage is not None:
            self.engine.module.model.rebalance(sums.usage)
        return {
            **metrics,
            **expert_load(sums.usage),
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": batch.tokens,
        }

    def _update(self, step: int) -> float:
        """Let DeepSpeed step; at the end of an accumulation that updates the weights. Returns the gradient norm.

        A norm that is not finite raises TrainingError; DeepSpeed's ZeRO stages have then skipped the update.
        """
        norm: float | None = None
        if self.settings.training.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
            grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            _check_norm(step, norm)
        self.engine.step()
        if norm is None and self.engine.get_global_grad_norm() is not None:
            norm = float(self.engine.get_global_grad_norm())
            _check_norm(step, norm)
        return math.nan if norm is None else norm

    def _over_ranks(self, report: LossReport) -> Metrics:
        """The metrics summed over the ranks, and `report.usage` [M, E] replaced by its sum, in one reduction."""
        names = ["objective", *report.metrics]
        values = torch.stack([report.loss.float(), *report.metrics.values()])
        both = values if report.usage is None else torch.cat([values, report.usage.flatten()])
        dist.all_reduce(both)
        if report.usage is not None:
            report.usage = both[len(names) :].view_as(report.usage)
        return dict(zip(names, both[: len(names)].tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self, validation: list[Batch]) -> Metrics:
        """Metrics over all held-out rows, each weighted by what it is a mean of; every rank computes them all."""
        self.engine.eval()
        sums: Metrics = {}
        weights: Metrics = {}
        usage: Tensor | None = None
        for batch in validation:
            report = self.engine(batch.to(self.settings.device), self.phases[-1], held_out=True)
            counts = {name: float(getattr(batch, self.stage.mean_over[name])) for name in report.metrics}
            _add(sums, {name: float(value) * counts[name] for name, value in report.metrics.items()})
            _add(weights, counts)
            if report.usage is not None:
                usage = report.usage if usage is None else usage + report.usage
        self.engine.train()
        return {**{name: value / max(weights[name], 1.0) for name, value in sums.items()}, **expert_load(usage)}

    def full_state(self) -> dict[str, Tensor]:
        """All weights, gathered from the ranks' partitions: fp32 masters, and what was never trained as it was."""
        from deepspeed.utils import safe_get_full_fp32_param

        training = self.settings.training
        model: ReactiveTransformer = self.engine.module.model
        if training.zero_stage < 3 and training.precision == "fp32":
            return dict(model.state_dict())
        import deepspeed

        state = {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}
        for name, parameter in model.named_parameters():
            if name in self.untrained:
                state[name] = self.untrained[name]
                continue
            with deepspeed.zero.GatheredParameters(parameter, enabled=training.zero_stage == 3):
                full = safe_get_full_fp32_param(parameter)
                state[name] = (parameter if full is None else full).detach().float().cpu().clone()
        return state


def forward_rows(config: StageConfig, sampler: BatchSampler, world: int, training: TrainingConfig, device: str) -> int:
    """Rows that a forward takes on each of `world` workers: what the user says, or what costs least.

    In bf16 all of a worker's rows: DeepSpeed would sum the gradients of several forwards in bf16.
    """
    rows = config.global_batch_size // world
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    return rows if training.precision == "bf16" else sampler.forward_rows(rows, world, FORWARD_OVERHEAD[device])


class _Window:
    """Means over the steps since the last logged one."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.steps = 0
        self.sums: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        _add(self.sums, metrics)
        self.steps += 1

    def summary(self) -> Metrics:
        seconds = time.monotonic() - self.started
        means = {name: value / self.steps for name, value in self.sums.items() if name != "tokens"}
        return {**means, "tokens_per_second": self.sums["tokens"] / seconds, "step_seconds": seconds / self.steps}


def expert_load(usage: Tensor | None) -> Metrics:
    """Tokens of the busiest and of the idlest expert, as multiples of a fair share, from `usage` [M, E].

    1 and 1 when balanced; E / k and 0 when all tokens go to the same k experts. Nothing without experts.
    """
    if usage is None:
        return {}
    load = usage / usage.mean(dim=1, keepdim=True).clamp(min=1e-9)
    return {"expert_load_max": float(load.max()), "expert_load_min": float(load.min())}


def _check_norm(step: int, norm: float) -> None:
    if not math.isfinite(norm):
        raise TrainingError(f"step {step + 1}: the gradient norm is {norm}; the weights were not updated")


def _add(totals: Metrics, values: Metrics) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value

"""The training engine: one stage on DeepSpeed ZeRO, on any number of workers, resumable (DESIGN 2-4, 8, 9).

Every rank forms the same global batch and trains on its rows; losses and metrics of parts add up, so two workers
compute what one does. All randomness comes from (seed, step, row). The engine knows no stage by name.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rxt_platform.config.run import batch_problem
from rxt_platform.config.stages import StageConfig
from rxt_platform.config.training import SpikeConfig, TrainingConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.prefetch import prefetched
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.errors import ResumeError, StoppedError, TrainingError
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.layers import checkpoint_layers, compile_layers
from rxt_platform.rl.critic import RewardService
from rxt_platform.stages.base import Model, Phase, RowStage, Stage, TrainingBatch, phase_at
from rxt_platform.stages.memory_rl import EpisodeStage, MemoryRLStage
from rxt_platform.training import checkpoints
from rxt_platform.training.checkpoints import ResumeState, Skipped
from rxt_platform.training.collector import Collector
from rxt_platform.training.distributed import on_rank_zero, raise_together
from rxt_platform.training.guards import Plateau, SpikeError, SpikeGuard
from rxt_platform.training.measures import Meter, Metrics, Profiler, Spans, StepClock, peak_flops
from rxt_platform.training.step import StepRunner, Wishes, expert_load
from rxt_platform.training.strategy import Strategy
from rxt_platform.training.watch import Watch
from rxt_platform.training.writer import CheckpointWriter, WriterSettings

logger = logging.getLogger(__name__)

_SPIKE = "spike"  # how the reasons of batches begin that a rollback left out
FORWARD_OVERHEAD = {"cpu": 128, "cuda": 4096}
"""Positions that could be computed in the time that a forward and its backward take to start. Measured with `tiny` on a
CPU; on a GPU a guess: `micro_batch_size` overrides what follows from it."""


@dataclass(frozen=True)
class EngineSettings:
    """How a stage is trained here. `work` is the folder that all ranks share; `spec` is what `identity` is made of."""

    training: TrainingConfig
    work: Path
    identity: str
    spec: dict[str, Any]
    device: torch.device
    watch: Watch
    service: RewardService | None = None  # the critic that MRL asks, if it is not in this process


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear of, called on every rank, and whether it wants a checkpoint now, or to stop.

    Metrics are told after logged steps, the wishes are asked for before every step; it is enough if one rank has one.
    """

    on_metrics: Callable[[int, int, Metrics], None] = lambda step, steps, metrics: None
    on_start: Callable[[int, int], None] = lambda step, steps: None
    stop_requested: Callable[[], bool] = lambda: False
    checkpoint_requested: Callable[[], bool] = lambda: False


@dataclass
class TrainResult:
    """Held-out metrics before and after, and what the training took."""

    before: Metrics
    after: Metrics
    steps: int
    tokens: int  # real ones of all updates
    seconds: float
    resumed_from: int
    skipped: list[Skipped]
    state: dict[str, Tensor] = field(default_factory=dict)  # full weights, on rank 0
    best: tuple[Metrics, dict[str, Tensor]] | None = None  # metrics and weights of the best checkpoint, where asked for


class StageProgram(nn.Module):
    """A stage's loss as a module's forward, so that DeepSpeed sees every use of the parameters."""

    def __init__(self, stage: Stage, model: Any) -> None:
        super().__init__()
        self.stage = stage
        self.model = model

    def forward(self, batch: Any, phase: Phase, held_out: bool = False, answers: bool = False) -> Any:
        """Loss of a part of a global batch (LossReport); or with `answers` only what it is made of, of episodes."""
        if answers:
            assert isinstance(self.stage, MemoryRLStage)
            return self.stage.answers(self.model, batch, phase)
        if held_out:
            return cast("RowStage", self.stage).evaluate(self.model, batch, phase)
        return self.stage.loss(self.model, batch, phase)


class Engine:
    """One stage's training: `run()` takes it from its newest checkpoint, or its start, to its end."""

    def __init__(self, model: Model, stage: Stage, settings: EngineSettings) -> None:
        training = settings.training
        self.stage, self.model, self.settings, self.training = stage, model, settings, training
        self.phases = stage.phases()
        self.steps = self.end = stage.sampler.total_steps  # `end` comes sooner if the stage converges
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if problem := batch_problem(stage.config, training, self.world):
            raise TrainingError(problem)
        self.skipped: list[Skipped] = []  # steps without an update, those to come included
        micro = forward_rows(stage.config, stage.sampler, self.world, training, settings.device.type)
        flops = ForwardFlops.of(model)  # before ZeRO-3 cuts the parameters
        if training.activation_checkpointing:
            checkpoint_layers(model)
        if training.compile:
            compile_layers(model)
        program = StageProgram(stage, model)
        forwards = stage.config.global_batch_size // self.world // micro
        self.strategy = Strategy(program, model, training, stage.config.optimizer, self.phases, forwards)
        self.program = self.strategy.engine
        self.directory = settings.work / "checkpoints"
        watch = settings.watch
        written = WriterSettings(self.directory, training.checkpoints, watch)
        self.writer = CheckpointWriter(self.strategy.sharded, model, written)
        self.clock = StepClock(settings.device, watch)
        self.stepper = StepRunner(stage, self.strategy, flops, micro, settings.device, self.clock)
        self.spans = Spans(settings.work / "spans" / f"rank-{self.rank:05d}.jsonl", self.rank, watch.attempt)
        trace = settings.work / "profile" / f"rank-{self.rank:05d}.json"
        self.profiler = Profiler(training.profile, trace, settings.device)
        self.collector = None
        if isinstance(stage, EpisodeStage):
            self.collector = Collector(stage, self.strategy, settings.device, self.clock, micro, settings.service)
        self.meter = Meter(peak_flops(settings.device, training.precision, training.peak_tflops), settings.device)

    def run(self, validation: list[Batch], hooks: Hooks) -> TrainResult:
        """Train to the end.

        Raises TrainingError for a loss or gradient that is not finite, StoppedError after a stop was asked for and a
        checkpoint written, ArtifactError when a checkpoint can't be written; all ranks raise alike.
        """
        try:
            state = self._resume() or self._first_state(validation)
            first = state.step
            hooks.on_start(first, self.steps)
            if self._spike_guard is not None and first == 0:
                self.writer.save(state)
            while state.step < self.end:
                try:
                    state = self._train(state, validation, hooks)
                except SpikeError as spike:
                    state = self._roll_back(spike)
                    hooks.on_start(state.step, self.steps)
            self._settle_writer()
            with self.clock.part("evaluation"):
                after = self.evaluate(validation)
                weights = self.strategy.full_state()
            result = TrainResult(
                dict(state.before), after, self.end, state.tokens, state.seconds, first, state.skipped, weights
            )
            best = self.training.checkpoints.best
            if best is not None and self.rank == 0:
                result.best = checkpoints.best_weights(self.directory, best, weights)
            return result
        finally:
            self.writer.close()
            self.profiler.close()
            self.spans.flush()

    @property
    def _spike_guard(self) -> SpikeConfig | None:
        """Of losses that mean something: those of reinforcement learning don't."""
        return None if self.collector is not None else self.training.spike_guard

    def _first_state(self, validation: list[Batch]) -> ResumeState:
        with self.clock.part("evaluation"):
            before = self.evaluate(validation)
        stopping = self.stage.config.early_stopping
        if stopping is not None and stopping.metric not in before:
            measured = f"early_stopping.metric {stopping.metric!r}: no held-out row has one; there are"
            raise_together(TrainingError(f"{measured} {', '.join(sorted(before)) or 'none'}"))
        settings = self.settings
        zero = self.training.zero_stage
        return ResumeState(0, 0.0, settings.identity, settings.spec, self.world, zero, before, {}, {})

    def _resume(self) -> ResumeState | None:
        """Go on from the newest complete checkpoint, here or in the remote storage; None when none was ever written."""
        path = on_rank_zero(lambda: checkpoints.find(self.directory, self.writer.remote))
        return None if path is None else self._load(path)

    def _load(self, path: Path) -> ResumeState:
        settings = self.settings
        state = checkpoints.load(path, self.strategy.sharded, self.model, settings.identity, settings.spec)
        known = {one.step for one in self.skipped}
        self.skipped += [one for one in state.skipped if one.step not in known]
        return state

    def _roll_back(self, spike: SpikeError) -> ResumeState:
        """The last checkpoint from before the batches that are left out from now on; newer ones are removed.

        What was left out so far stays so. A run that is killed here meets the same spikes again, and decides alike.
        """
        guard = self._spike_guard
        assert guard is not None
        if len({one.reason for one in self.skipped if one.reason.startswith(_SPIKE)}) >= guard.rollbacks:
            raise_together(TrainingError(f"{spike}; {guard.rollbacks} rollbacks did not help: lower the learning rate"))
        left_out = range(max(0, spike.step - guard.skip + 1), spike.step + 1)
        self._settle_writer()

        def choose() -> Path:
            path = checkpoints.newest_complete(self.directory, below=left_out.start + 1)
            if path is None:
                raise ResumeError(f"{spike}; no checkpoint is left from before step {left_out.start + 1}")
            self.writer.forget_after(path)
            return path

        state = self._load(on_rank_zero(choose))
        known = {one.step for one in self.skipped}
        for step in left_out:
            if step not in known:
                rows = self._places(self.stage.sampler.global_batch(step))
                self.skipped.append(Skipped(step, f"{_SPIKE} in {spike}", rows))
        logger.warning("%s; back to step %d, on without steps %s", spike, state.step, [step + 1 for step in left_out])
        return state

    def _train(self, state: ResumeState, validation: list[Batch], hooks: Hooks) -> ResumeState:
        """Steps from a state to the end of the stage. Raises SpikeError with the engine's weights as they were."""
        training, began = self.training, time.monotonic()
        guard, plateau = SpikeGuard(self._spike_guard, state.recent), state.plateau
        stopping = self.stage.config.early_stopping
        skipped, metrics, tokens = self.skipped, dict(state.metrics), state.tokens
        changes = {phase.start for phase in self.phases} | set(self.stage.sampler.changes)
        left_out = {one.step for one in skipped if one.step >= state.step}

        def now(done: int) -> ResumeState:
            updates = self.strategy.sharded.updates()
            return replace(
                state,
                step=done,
                seconds=state.seconds + time.monotonic() - began,
                world_size=self.world,
                zero_stage=training.zero_stage,
                metrics=dict(metrics),  # the writer's thread reads it later
                updates=updates,
                skipped=list(skipped),
                recent=guard.recent,
                plateau=plateau,
                tokens=tokens,
            )

        def save(done: int) -> None:
            self._settle_writer()  # of the one before; all ranks learn whether it failed
            self.writer.save(now(done))

        resumable, due, over, wishes = self.stage.sampler.resumable_every, False, False, Wishes()
        self.meter.take()
        self.clock.take()
        with prefetched(self.stage.sampler.global_batch, state.step, self.steps) as next_batch:
            for step in range(state.step, self.steps):
                started, done = time.time(), step + 1
                self.settings.watch.step = done
                self.profiler.before_step()
                if step in changes:
                    guard.recent, plateau = [], Plateau()  # other rows or other components: the loss may jump
                with self.clock.part("data"):
                    batch: TrainingBatch = next_batch()
                if self.collector is not None:
                    batch = self.collector.batch(step, batch, phase_at(self.phases, step))
                wishes = Wishes(
                    hooks.stop_requested() or wishes.stop,  # one that had to wait is not forgotten
                    hooks.checkpoint_requested() or wishes.checkpoint,
                    self.writer.failed,
                )
                if step in left_out:
                    outcome = self.stepper.leave_out(wishes)
                else:
                    outcome = self.stepper.run(step, batch, guard, wishes, norms=done % training.log_every == 0)
                wishes = outcome.wishes
                if outcome.skipped is not None:
                    self.meter.add_skipped()
                    if step not in left_out:
                        skipped.append(Skipped(step, outcome.skipped, self._places(batch)))
                        self._check_budget(skipped)
                else:
                    guard.add(outcome.metrics["objective"])
                    tokens += outcome.tokens
                    collected: Metrics = {} if self.collector is None else self.collector.metrics
                    self.meter.add({**outcome.metrics, **collected}, outcome.tokens, outcome.flops)
                if wishes.write_failed:
                    self._settle_writer()
                held_out = self._held_out(done, validation)
                metrics |= {f"validation_{name}": value for name, value in held_out.items()}
                if stopping is not None and done % stopping.every == 0 and held_out:
                    plateau = plateau.after(_of_rank_zero(held_out[stopping.metric]), stopping)
                    over = over or (done > max(changes) and (plateau.stale >= stopping.patience or plateau.reached))
                if over and done % resumable == 0:
                    self.end = done
                due = due or done % training.checkpoints.every == 0 or wishes.checkpoint
                if due and done % resumable == 0 and done < self.end and not wishes.stop:
                    with self.clock.part("checkpoint"):
                        save(done)
                    due, wishes = False, replace(wishes, checkpoint=False)
                parts = self.clock.take()
                self.meter.add_time(parts)
                self.spans.add(done, started, parts, outcome.tokens, outcome.rows if training.log_rows else None)
                self.profiler.after_step()
                if done % training.log_every == 0 or done == self.end:
                    evaluated = {name: value for name, value in metrics.items() if name.startswith("validation_")}
                    metrics = {**self._logged(), **outcome.norms, **evaluated}
                    hooks.on_metrics(done, self.steps, {**metrics, "skipped_batches": float(len(skipped))})
                if done == self.end:
                    break
                if wishes.stop and done % resumable == 0:
                    self._stop(now(done))
        return now(self.end)

    def _logged(self) -> Metrics:
        """The means since the last logged step; spans are written, and a newer attempt ends this one."""
        self.spans.flush()
        self.settings.watch.check_current()
        return self.meter.take()

    def _held_out(self, done: int, validation: list[Batch]) -> Metrics:
        """Held-out metrics if they are due after so many steps, else {}; those of the last step come later."""
        stopping = self.stage.config.early_stopping
        periods = (self.training.evaluate_every, stopping and stopping.every)
        if done == self.steps or not any(period and done % period == 0 for period in periods):
            return {}
        with self.clock.part("evaluation"):
            held_out = self.evaluate(validation)
        self._check_best(held_out)
        return held_out

    def _stop(self, state: ResumeState) -> None:
        """Checkpoint, wait until it and its copy are safe, and end."""
        self._settle_writer()
        self.writer.save(state)
        self._settle_writer()
        self.writer.close(finish_uploads=True)
        message = f"stopped as asked after step {state.step} of {self.steps}; the same command goes on from there"
        raise_together(StoppedError(f"{message}{on_rank_zero(self.writer.told_of_copies)}"))

    def _check_best(self, held_out: Metrics) -> None:
        best, measured = self.training.checkpoints.best, {f"validation_{name}" for name in held_out}
        if best is not None and best.metric not in measured:
            known = ", ".join(sorted(measured))
            raise_together(TrainingError(f"checkpoints.best.metric {best.metric!r} is not among the metrics: {known}"))

    def _places(self, batch: TrainingBatch) -> list[str]:
        return [self.stage.sampler.place(row) for row in batch.rows.tolist()]

    def _check_budget(self, skipped: list[Skipped]) -> None:
        """The update of the newest one was left out: is that allowed? All ranks raise alike."""
        newest = skipped[-1]
        told = f"step {newest.step + 1}: {newest.reason}; nothing was updated"
        rows = f"the batch's rows: {', '.join(newest.rows)}"
        allowed = self.training.skipped_batches
        if sum(not one.reason.startswith(_SPIKE) for one in skipped) > allowed:
            raise_together(
                TrainingError(
                    f"{told}; lower the learning rate, look at the rows, or allow more than {allowed} "
                    f"training.skipped_batches; {rows}"
                )
            )
        logger.warning("%s and training goes on; %s", told, rows)

    def _settle_writer(self) -> None:
        """Wait for the checkpoint under way; if any rank failed to write it, all raise the same error."""
        problem = None
        try:
            self.writer.wait()
        except Exception as error:  # every rank must learn of it before any raises
            logger.exception("the checkpoint could not be written")
            problem = error
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, problem and (type(problem).__name__, str(problem)))
        told = [f"worker {rank}: {one[1]}" for rank, one in enumerate(everyone) if one is not None]
        if told:
            raise_together(TrainingError("; ".join(told)))

    @torch.no_grad()
    def evaluate(self, validation: list[Batch]) -> Metrics:
        """Metrics over all held-out rows, each weighted by what it is a mean of.

        Every rank computes them all, but for conversations that are held: of those each holds its share.
        """
        if self.collector is not None:
            return self.collector.evaluate(validation)
        self.program.eval()
        mean_over = cast("RowStage", self.stage).mean_over
        sums: Metrics = {}
        weights: Metrics = {}
        usage: Tensor | None = None
        for batch in validation:
            report = self.program(batch.to(self.settings.device), self.phases[-1], held_out=True)
            counts = {name: float(getattr(batch, mean_over[name])) for name in report.metrics}
            _add(sums, {name: float(value) * counts[name] for name, value in report.metrics.items()})
            _add(weights, counts)
            if report.usage is not None:
                usage = report.usage if usage is None else usage + report.usage
        self.program.train()
        return {**{name: value / max(weights[name], 1.0) for name, value in sums.items()}, **expert_load(usage)}


def forward_rows(config: StageConfig, sampler: BatchSampler, world: int, training: TrainingConfig, device: str) -> int:
    """Rows that a forward takes on each of `world` workers: what the user says, or what costs least.

    In bf16 without ZeRO all of a worker's rows: DeepSpeed would sum the gradients of several forwards in bf16.
    """
    rows = config.global_batch_size // world
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    if training.precision == "bf16" and training.zero_stage == 0:
        return rows
    return sampler.forward_rows(rows, world, FORWARD_OVERHEAD[device])


def _of_rank_zero(value: float) -> float:
    """Rank 0's: the last bit may differ between machines, and all ranks must decide alike."""
    return on_rank_zero(lambda: value)


def _add(totals: Metrics, values: Metrics) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value

"""How the engine trains: parallelism, precision, checkpoints, guards and measurements. None of it is a stage's own."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec


class BestConfig(Spec):
    """Which checkpoint is kept because of a held-out metric; its weights are in the model's folder, as `best/`."""

    metric: str = Field("validation_loss", pattern="^validation_", description="measured every training.evaluate_every")
    highest: bool = Field(False, description="the best is the highest, not the lowest")


class CheckpointConfig(Spec):
    """Resume states inside a stage."""

    every: int = Field(200, gt=0, description="steps between two")
    keep: int = Field(2, gt=0, description="the newest so many are kept")
    best: BestConfig | None = Field(None, description="also keep the best one by a metric")
    asynchronous: bool = Field(
        True, description="write from a copy in memory while training goes on; costs 12 bytes a parameter and worker"
    )
    upload: str | None = Field(
        None,
        description="URI of a folder (file://, s3://, gs://) that every checkpoint is also copied to",
    )


class SpikeConfig(Spec):
    """A loss far above the recent ones: back to the last good checkpoint, and on without the batches that led there.

    In the supervised stages: the loss of reinforcement learning says nothing of how well it goes.
    """

    factor: float = Field(
        12.0, gt=1, description="a spike is further above the median of the window than so many median deviations"
    )
    window: int = Field(50, ge=20, description="steps that the loss is compared with")
    skip: int = Field(2, ge=1, description="batches left out: the spike's and those right before it")
    rollbacks: int = Field(3, ge=1, description="so many are allowed in a stage; then it fails")


class ProfileConfig(Spec):
    """A trace of some steps by torch.profiler, written beside the metrics of each rank."""

    first: int = Field(10, ge=0, description="steps of this job before the trace begins")
    steps: int = Field(3, gt=0)


class TrainingConfig(Spec):
    """How the engine trains: what all stages share."""

    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps fp32 master weights")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="0: plain data parallel; 1: optimizer state, 2: gradients, 3: weights too are shared out"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="kept in CPU memory: the optimizer's state and step (ZeRO 1 to 3), the weights too (ZeRO 3)"
    )
    activation_checkpointing: bool = Field(
        False, description="compute a layer's activations again in the backward pass: less memory for long episodes"
    )
    compile: bool = Field(
        False, description="compile the layers with torch.compile: minutes at the start, faster steps on a GPU"
    )
    log_every: int = Field(10, gt=0, description="steps between metrics in the log and in MLflow")
    evaluate_every: int | None = Field(
        None, gt=0, description="steps between held-out metrics; without, only at the end"
    )
    checkpoints: CheckpointConfig = CheckpointConfig()
    hang_seconds: Annotated[float, Field(ge=5)] = Field(
        600.0, description="a worker that the others have waited for so long has hung: the job fails, and resumes"
    )
    skipped_batches: int = Field(
        0, ge=0, description="batches whose loss or gradient is not finite that a stage may leave out; then it fails"
    )
    spike_guard: SpikeConfig | None = None
    peak_tflops: float | None = Field(
        None, gt=0, description="of one worker's device, for the utilisation (MFU); without, a matrix product is timed"
    )
    profile: ProfileConfig | None = None
    log_rows: bool = Field(False, description="write the row numbers of every step into the spans, to audit a run")

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload: {self.offload} needs zero_stage >= {least}, not {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        best = self.checkpoints.best
        if best is not None and self.evaluate_every is None:
            raise ValueError(f"checkpoints.best.metric {best.metric!r} is never measured: set evaluate_every")
        return self

    @model_validator(mode="after")
    def _rollbacks_find_a_checkpoint(self) -> Self:
        guard, kept = self.spike_guard, self.checkpoints
        if guard is not None and guard.skip > kept.every * (kept.keep - 1):
            raise ValueError(
                f"spike_guard.skip {guard.skip}: the checkpoints kept (the last {kept.keep}, every {kept.every} steps) "
                "need not reach back so far: raise checkpoints.keep"
            )
        return self

    @model_validator(mode="after")
    def _offload_updates_always(self) -> Self:
        if self.offload != "none" and (self.skipped_batches or self.spike_guard is not None):
            raise ValueError(
                "offload: DeepSpeed cannot leave out an update reliably there: no skipped_batches, no spike_guard"
            )
        return self

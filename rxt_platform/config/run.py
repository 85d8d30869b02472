"""A whole run: data, model, stages, resources, tracking. One YAML file becomes one RunConfig."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.data import DataConfig
from rxt_platform.config.model import ModelConfig
from rxt_platform.config.stages import StageConfig

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*")
_SMALLEST_VOCABULARY = 267
_SHARED_FOLDERS = {"artifacts", "work", "mlartifacts", "mlflow.db"}
_OTHER_STEPS = {"corpus", "tokenizer", "tokens", "evaluation"}


class ResourcesConfig(Spec):
    """What each training job gets. None of it changes results."""

    workers: int = Field(1, gt=0)
    cpus_per_worker: int = Field(1, gt=0)
    use_gpu: bool = False
    max_failures: int = Field(2, ge=0, description="worker losses that a job survives by resuming")


class TrainingConfig(Spec):
    """How the engine trains: what all stages share."""

    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    compile: bool = Field(
        False, description="compile the layers with torch.compile: minutes at the start, faster steps on a GPU"
    )
    checkpoint_every: int = Field(200, gt=0, description="steps between resume states")
    keep_checkpoints: int = Field(2, gt=0)
    log_every: int = Field(10, gt=0, description="steps between metrics in the log and in MLflow")

    @model_validator(mode="after")
    def _bf16_needs_zero(self) -> Self:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage >= 1: stage 0 takes another optimizer path and its losses differ")
        return self


class EvaluationConfig(Spec):
    """What is measured at the end, on held-out conversations."""

    conversations: int = Field(200, gt=0, description="held-out conversations, at most")
    samples: int = Field(3, ge=0, description="conversations that are answered freely and shown in the report")


class TrackingConfig(Spec):
    """MLflow. Without a `uri`, an SQLite file and a folder in the run's storage."""

    uri: str | None = None
    experiment: str = "rxt_platform"


class RunConfig(Spec):
    """One run of the pipeline: a chain of stages over one corpus."""

    name: str
    seed: int = Field(0, ge=0)
    storage: str = Field("runs", description="folder for artifacts, checkpoints, reports and the MLflow file")
    model: ModelConfig
    data: DataConfig
    stages: dict[str, StageConfig] = Field(
        min_length=1, description="in training order; each starts from the one before"
    )
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _names_are_safe(self) -> Self:
        for name in (self.name, *self.stages):
            if not _NAME.fullmatch(name):
                raise ValueError(f"name {name!r} may only hold letters, digits, '.', '_', '-' (it names a folder)")
        if self.name in _SHARED_FOLDERS:
            raise ValueError(f"name {self.name!r} is taken by what all runs of a storage share")
        if taken := sorted(_OTHER_STEPS & self.stages.keys()):
            raise ValueError(f"stage name {taken[0]!r} is taken by another step of every run")
        return self

    @model_validator(mode="after")
    def _only_the_first_stage_starts_elsewhere(self) -> Self:
        for name, stage in list(self.stages.items())[1:]:
            if stage.start_from is not None:
                raise ValueError(
                    f"stages.{name}.start_from: only the first stage can start from another model (the run takes over "
                    "its tokenizer); leave out the stages before"
                )
        return self

    @model_validator(mode="after")
    def _stages_have_rows(self) -> Self:
        for name, stage in self.stages.items():
            if getattr(self.data, stage.section) is None:
                raise ValueError(f"stages.{name} trains on {stage.section}: name a source as data.{stage.section}")
        return self

    @model_validator(mode="after")
    def _vocabulary_holds_all_bytes(self) -> Self:
        if self.model.vocab_size < _SMALLEST_VOCABULARY:
            raise ValueError(
                f"model.vocab_size {self.model.vocab_size}: byte-level BPE needs at least {_SMALLEST_VOCABULARY} "
                "(256 bytes and 11 special tokens)"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        workers = self.resources.workers
        for name, stage in self.stages.items():
            rows, micro = stage.global_batch_size, stage.micro_batch_size
            unit = workers * (micro or 1)
            if rows % unit:
                near = [str(size) for size in (rows // unit * unit, rows // unit * unit + unit) if size]
                raise ValueError(
                    f"stages.{name}.global_batch_size {rows} can't be shared by {workers} workers"
                    f"{f' in micro-batches of {micro}' if micro else ''}: nearest {' or '.join(near)}"
                )
        return self

"""A whole run: data, model, stages, resources, tracking. One YAML file becomes one RunConfig."""

import re
from typing import Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.data import DataConfig
from rxt_platform.config.model import ModelConfig
from rxt_platform.config.mrl import CriticPretrainingConfig, EpisodeConfig
from rxt_platform.config.rewards import RewardConfig
from rxt_platform.config.serving import ServiceConfig
from rxt_platform.config.stage_base import ConversationStage
from rxt_platform.config.stages import MemoryAwareConfig, MemoryPretrainingConfig, StageConfig
from rxt_platform.config.training import TrainingConfig

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*")
_SMALLEST_VOCABULARY = 267
_SHARED_FOLDERS = {"artifacts", "work", "mlartifacts", "mlflow.db"}
BASELINE = "baseline."  # the names of its steps begin so
_OTHER_STEPS = {"corpus", "tokenizer", "tokens", "evaluation"}


class ResourcesConfig(Spec):
    """What each training job gets. None of it changes results."""

    workers: int = Field(1, gt=0)
    cpus_per_worker: int = Field(1, gt=0)
    use_gpu: bool = False
    max_failures: int = Field(2, ge=0, description="worker losses that a job survives by resuming")


class EvaluationConfig(Spec):
    """What is measured at the end, on held-out conversations."""

    conversations: int = Field(200, gt=0, description="held-out conversations, at most, of all sources")
    samples: int = Field(3, ge=0, description="conversations whose answers are shown in the report")
    free_running: bool = Field(True, description="also measure with the model's own answers written into its memory")
    latency_conversations: int = Field(4, ge=0, description="conversations that are timed, one by one")
    reward: RewardConfig = RewardConfig()
    reward_model: str | None = Field(
        None, description="directory of the model whose token embedding measures meaning, instead of hashed characters"
    )


class BaselineConfig(Spec):
    """The stateless baseline: a decoder of the same total size that reads the whole history, without any memory.

    It trains on the rows of the stages that a model without memory can take part in.
    """

    window: int = Field(2048, gt=0, description="longest conversation in tokens, with the answer to its last turn")


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
    baseline: BaselineConfig | None = Field(
        None, description="also train a stateless model on the same rows, by the same stages, and compare both"
    )
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()
    critic_service: ServiceConfig | None = Field(
        None, description="rewards and values of MRL come from a Ray Serve deployment; without, from the workers"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _names_are_safe(self) -> Self:
        for name in (self.name, *self.stages):
            if not _NAME.fullmatch(name):
                raise ValueError(f"name {name!r} may only hold letters, digits, '.', '_', '-' (it names a folder)")
        if self.name in _SHARED_FOLDERS:
            raise ValueError(f"name {self.name!r} is taken by what all runs of a storage share")
        reserved = [name for name in self.stages if name in _OTHER_STEPS or name.startswith(BASELINE)]
        if reserved:
            raise ValueError(f"stage name {reserved[0]!r} is taken by another step of every run")
        return self

    @model_validator(mode="after")
    def _baseline_can_be_trained(self) -> Self:
        if self.baseline is None:
            return self
        if self.baseline.window < self.model.max_length:
            raise ValueError(
                f"baseline.window {self.baseline.window} is less than one interaction (model.max_length "
                f"{self.model.max_length})"
            )
        if next(iter(self.stages.values())).start_from is not None:
            raise ValueError(
                "baseline: the first stage starts from another model, whose tokens the baseline has not seen; leave "
                "out start_from or the baseline"
            )
        for name, stage in self.stages.items():
            if trains_without_memory(stage) and stage.early_stopping is not None:
                raise ValueError(
                    f"baseline: stages.{name}.early_stopping would end the model's stage and the baseline's at "
                    "different steps, and both must see the same rows; leave one of the two out"
                )
        if not any(trains_without_memory(stage) for stage in self.stages.values()):
            raise ValueError("baseline: no stage can be trained without a memory")
        return self

    @model_validator(mode="after")
    def _a_decoder_alone_has_an_embedding(self) -> Self:
        name, stage = next(iter(self.stages.items()))
        if getattr(stage, "trains", "both") == "decoder" and stage.start_from is None:
            raise ValueError(
                f"stages.{name}: trains: decoder reads the encoder's embedding, which would be random: train the "
                "encoder first, or start from a model"
            )
        return self

    @model_validator(mode="after")
    def _episodes_are_held_by_a_trained_model(self) -> Self:
        name, stage = next(iter(self.stages.items()))
        if isinstance(stage, EpisodeConfig) and stage.start_from is None:
            raise ValueError(
                f"stages.{name}: {stage.kind} needs a model that can answer: put the supervised stages before it, or "
                "give start_from"
            )
        return self

    @model_validator(mode="after")
    def _the_best_is_measured_in_every_stage(self) -> Self:
        best = self.training.checkpoints.best
        for name, stage in self.stages.items():
            if best is None or not isinstance(stage, EpisodeConfig):
                continue
            if (metric := best.metric.removeprefix("validation_")) not in stage.metrics:
                raise ValueError(
                    f"training.checkpoints.best.metric {best.metric!r} is not measured in stages.{name}, only "
                    f"{', '.join(f'validation_{one}' for one in stage.metrics)}: run those stages by themselves "
                    "(pipelines/mrl.py), or leave `best` out"
                )
            if best.highest == (metric == "critic_error"):
                raise ValueError(
                    f"training.checkpoints.best: set highest: {str(not best.highest).lower()} for {metric}"
                )
        return self

    @model_validator(mode="after")
    def _critics_judge_what_they_have_learned_to(self) -> Self:
        learned: tuple[str, bool] | None = None
        for name, stage in self.stages.items():
            if not isinstance(stage, EpisodeConfig):
                learned = None
            elif stage.critic is not None:
                of_answers = isinstance(stage, CriticPretrainingConfig) and stage.learns == "preferences"
                if learned is not None and learned[1] != of_answers:
                    raise ValueError(
                        f"stages.{name}: its critic comes from {learned[0]}, which "
                        f"{'learned preferences between answers' if learned[1] else 'learned values of questions'}: "
                        "that is something else; leave one of the two out"
                    )
                learned = name, of_answers
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        there = len(self.data.conversations)
        for name, stage in self.stages.items():
            asked = stage.sources if isinstance(stage, ConversationStage) else None
            if missing := [one for one in asked or [] if not 0 <= one < there]:
                raise ValueError(
                    f"stages.{name}.sources: {missing[0]}: data.conversations has {there} sources, numbered from 0"
                )
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
            if problem := batch_problem(stage, self.training, workers):
                raise ValueError(f"stages.{name}.{problem}")
        return self


def trains_without_memory(stage: StageConfig) -> bool:
    """Whether the stateless baseline takes part in a stage: all but those of encoder or memory attention alone."""
    if isinstance(stage, MemoryPretrainingConfig | EpisodeConfig):
        return False
    return isinstance(stage, MemoryAwareConfig) or stage.trains != "encoder"


def batch_problem(stage: StageConfig, training: TrainingConfig, workers: int) -> str | None:
    """Why a stage's batches can't be shared by so many workers, with the nearest sizes that can; None if they can."""
    rows, micro = stage.global_batch_size, stage.micro_batch_size
    if micro and micro * workers < rows and training.precision == "bf16" and not training.zero_stage:
        return (
            f"micro_batch_size {micro}: without ZeRO, the gradients of several forwards would be summed in bf16: use "
            "training.zero_stage 1, or leave micro_batch_size out"
        )
    unit = workers * (micro or 1)
    if rows % unit == 0:
        return None
    near = [str(size) for size in (rows // unit * unit, rows // unit * unit + unit) if size]
    parts = f" in micro-batches of {micro}" if micro else ""
    message = f"global_batch_size {rows} can't be shared by {workers} workers{parts}: nearest {' or '.join(near)}"
    if micro and rows % workers == 0:
        share = rows // workers
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        below, above = [size for size in sizes if size < micro], [size for size in sizes if size > micro]
        message += f"; or micro_batch_size {' or '.join(str(size) for size in (*below[-1:], *above[:1]))}"
    return message

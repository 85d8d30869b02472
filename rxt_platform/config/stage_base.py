"""What every training stage is told: optimisation, batches, when it ends, what it starts from."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.data import Section

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Component = Literal[
    "embedding",
    "encoder",
    "mlm_head",
    "decoder",
    "memory_cross_attention",
    "head",
    "memory_attention",
    "critic",
    "critic_head",
]
"""`head` is the decoder's, `mlm_head` the masked encoder's; `critic` is an encoder of its own, in MRL only."""


class StartFrom(Spec):
    """A model made elsewhere that a stage starts from, instead of the stage before it."""

    artifact: str = Field(description="directory of a model artifact")
    sha256: str | None = Field(None, description="the artifact's content hash, if it must be exactly that one")


class OptimizerConfig(Spec):
    """AdamW with a learning rate that warms up linearly and decays over the stage."""

    learning_rate: float = Field(gt=0)
    learning_rate_scale: dict[Component, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="factor on the learning rate of single components; 1 if not given"
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up: half a cosine; stable, then a linear decay (WSD); or no decay"
    )
    warmup: Share = Field(0.05, description="share of the steps")
    decay: Share = Field(0.2, description="share of the steps that WSD's decay takes")
    final: Share = Field(0.0, description="what the rate decays to, as a share of learning_rate")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    gradient_clip: float = Field(1.0, gt=0, description="largest global gradient norm")

    @model_validator(mode="after")
    def _warmup_ends_before_the_decay(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than all steps")
        return self


class EarlyStopping(Spec):
    """The stage ends when a held-out metric has not improved for a while: it has converged.

    Counted from the last change of phase or lesson on. The learning rate's schedule is that of the whole stage, and
    what is handed on are its last weights; `training.checkpoints.best` keeps the best ones beside them.
    """

    every: int = Field(gt=0, description="steps between two measurements")
    patience: int = Field(3, gt=0, description="measurements without an improvement after which the stage ends")
    threshold: float = Field(0.0, ge=0, description="a smaller improvement on the best is none")
    metric: str = Field("loss", description="a held-out metric of the stage")
    highest: bool = Field(False, description="the best is the highest, not the lowest")
    reach: float | None = Field(None, description="the stage also ends when the metric is as good as this")


class StageBase(Spec, ABC):
    """What every stage has."""

    section: ClassVar[Section]  # of the corpus that it trains on

    epochs: float = Field(gt=0, description="passes over the stage's rows; fractions are allowed")
    global_batch_size: int = Field(gt=0, description="rows of one optimizer step, over all workers")
    micro_batch_size: int | None = Field(
        None, gt=0, description="rows of one forward on one worker, all of like length; by default what costs least"
    )
    optimizer: OptimizerConfig
    early_stopping: EarlyStopping | None = None
    start_from: StartFrom | None = None

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """What is measured on held-out rows; the first is the one that a stage is told by."""

    @model_validator(mode="after")
    def _stopping_is_measured(self) -> Self:
        if self.early_stopping is not None and self.early_stopping.metric not in self.metrics:
            raise ValueError(
                f"early_stopping.metric {self.early_stopping.metric!r} is not measured: use {', '.join(self.metrics)}"
            )
        return self


class ConversationStage(StageBase):
    """What stages of conversations have."""

    section: ClassVar[Section] = "conversations"

    sources: list[int] | None = Field(
        None, min_length=1, description="which of data.conversations (from 0) it trains on; all if not given"
    )

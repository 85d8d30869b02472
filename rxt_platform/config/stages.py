"""What a training stage is told: one class for each kind, each with its own optimisation settings (REF section 3)."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.data import Section

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Component = Literal["embedding", "encoder", "decoder", "memory_cross_attention", "memory_attention", "heads"]


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


class StageBase(Spec):
    """What every stage has."""

    section: ClassVar[Section]  # of the corpus that it trains on

    epochs: float = Field(gt=0, description="passes over the stage's rows; fractions are allowed")
    global_batch_size: int = Field(gt=0, description="rows of one optimizer step, over all workers")
    micro_batch_size: int | None = Field(
        None, gt=0, description="rows of one forward on one worker, all of like length; by default what costs least"
    )
    optimizer: OptimizerConfig
    start_from: StartFrom | None = None


class JointLossConfig(Spec):
    """Decoder and masked encoder trained together; the decoder reads the encoder's states as memory (REF 3.1)."""

    mask_probability: Share = Field(0.15, description="share of the encoder's tokens that it must guess")
    mask_random: Share = Field(
        0.0, description="share of these that are shown as another token instead of [MASK]; 0.1 in BERT's 80/10/10"
    )
    mask_kept: Share = Field(0.0, description="share of these that are shown as they are; 0.1 in BERT's 80/10/10")
    memory_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the states read as memory")
    memory_dropout: Share = Field(0.0, description="share of memory positions that the decoder may not read")
    decoder_only: Share = Field(
        0.3, description="share of rows whose decoder reads an empty memory, so that its self-attention learns too"
    )
    encoder_weight: float = Field(1.0, ge=0)
    decoder_weight: float = Field(1.0, ge=0)
    balance_weight: float = Field(0.01, ge=0, description="weight of the experts' load balance")

    @model_validator(mode="after")
    def _shares_are_of_one_whole(self) -> Self:
        if self.mask_random + self.mask_kept > 1:
            raise ValueError(f"mask_random {self.mask_random:g} and mask_kept {self.mask_kept:g} are more than 1")
        return self


class JointPretrainingConfig(StageBase):
    """Stage 1: joint language-model pre-training on texts."""

    section: ClassVar[Section] = "texts"

    kind: Literal["joint_pretraining"]
    packing: int = Field(
        0,
        ge=0,
        description="windows of the model that a row is long, filled with texts that don't see each other (a row of "
        "`global_batch_size` is then such a pack); 0: one text a row, which a CPU computes faster",
    )
    loss: JointLossConfig = JointLossConfig()


class InteractionSFTConfig(StageBase):
    """Stage 2: joint supervised fine-tuning on single interactions; the decoder's loss counts answers only."""

    section: ClassVar[Section] = "interactions"

    kind: Literal["interaction_sft"]
    loss: JointLossConfig = JointLossConfig()


class LabelWeights(Spec):
    """How much of the new interaction the memory's target holds at each write (REF 3.3).

    Write 0: `first`; write i >= 1: `base - decay * i`, moved by up to `random_factor` either way; the rest is what the
    memory held before.
    """

    first: Share = 0.9
    base: Share = 0.5
    decay: Share = 0.05
    random_factor: Share = 0.15


class MemoryPretrainingConfig(StageBase):
    """Stage 3: memory attention learns to hold what the (frozen) encoder says; negative cosine to mixed targets."""

    section: ClassVar[Section] = "conversations"

    kind: Literal["memory_pretraining"]
    label_weights: LabelWeights = LabelWeights()
    input_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the encoder states")
    label_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the targets")


class Lesson(Spec):
    """A part of the curriculum: for `epochs`, conversations are cut to their first `turns` turns."""

    turns: int = Field(ge=2)
    epochs: float = Field(gt=0)


class MemoryAwareConfig(StageBase):
    """Stage 4: whole conversations in one forward, gradient through the memory writes (REF 3.4, DESIGN 4)."""

    section: ClassVar[Section] = "conversations"

    kind: Literal["memory_aware"]
    bptt_window: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        "all", description="memory writes that a gradient crosses"
    )
    curriculum: list[Lesson] = Field(
        default_factory=list, description="short conversations first; after the last lesson they are whole"
    )
    unfreeze_memory_attention: float = Field(0.0, ge=0, description="epochs with the decoder alone (N)")
    unfreeze_encoder: float = Field(0.0, ge=0, description="further epochs until the encoder trains too (K)")
    balance_weight: float = Field(0.01, ge=0, description="weight of the experts' load balance")

    @model_validator(mode="after")
    def _schedules_end(self) -> Self:
        """A schedule longer than the stage would leave parts untrained without a word."""
        lessons = sum(lesson.epochs for lesson in self.curriculum)
        frozen = self.unfreeze_memory_attention + self.unfreeze_encoder
        for name, epochs in (("curriculum", lessons), ("unfreeze_memory_attention + unfreeze_encoder", frozen)):
            if epochs >= self.epochs:
                raise ValueError(f"{name} takes {epochs:g} epochs, the stage has {self.epochs:g}: it would never end")
        return self


StageConfig = Annotated[
    JointPretrainingConfig | InteractionSFTConfig | MemoryPretrainingConfig | MemoryAwareConfig,
    Field(discriminator="kind"),
]

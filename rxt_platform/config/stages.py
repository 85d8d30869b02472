"""What a training stage is told: one class for each kind, each with its own optimisation settings (REF section 3)."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.data import Section
from rxt_platform.config.mrl import CriticPretrainingConfig, MemoryRLConfig
from rxt_platform.config.stage_base import ConversationStage, Share, StageBase

Trains = Literal["both", "encoder", "decoder"]


class JointLossConfig(Spec):
    """Decoder and masked encoder trained together; the decoder reads the encoder's states as memory (REF 3.1)."""

    mask_probability: Share = Field(0.15, description="share of the encoder's tokens that it must guess")
    mask_random: Share = Field(
        0.0,
        description="share of these that are shown as another token of the model's vocabulary instead of [MASK]; 0.1 "
        "in BERT's 80/10/10",
    )
    mask_kept: Share = Field(0.0, description="share of these that are shown as they are; 0.1 in BERT's 80/10/10")
    memory_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the states read as memory")
    memory_dropout: Share = Field(0.0, description="share of memory positions that the decoder may not read")
    decoder_only: Share = Field(
        0.3, description="share of rows whose decoder reads an empty memory, so that its self-attention learns too"
    )
    freeze_memory_path: bool = Field(
        False,
        description="in these rows what memory cross-attention adds is a constant: no gradient goes through it, so "
        "that it learns from encoder states only",
    )
    encoder_weight: float = Field(1.0, ge=0)
    decoder_weight: float = Field(1.0, ge=0)
    balance_weight: float = Field(0.01, ge=0, description="weight of the experts' load balance")
    random_memory: float = Field(
        0.02, ge=0, description="`trains: decoder`: standard deviation of the random memory that it reads"
    )

    @model_validator(mode="after")
    def _shares_are_of_one_whole(self) -> Self:
        if self.mask_random + self.mask_kept > 1:
            raise ValueError(f"mask_random {self.mask_random:g} and mask_kept {self.mask_kept:g} are more than 1")
        return self

    @model_validator(mode="after")
    def _shares_of_nothing(self) -> Self:
        if not self.mask_probability and (self.mask_random or self.mask_kept):
            raise ValueError("mask_random and mask_kept have no effect with mask_probability 0")
        if self.freeze_memory_path and not self.decoder_only:
            raise ValueError("freeze_memory_path has no effect with decoder_only 0")
        return self


_OF_THE_ENCODER = {"mask_probability", "mask_random", "mask_kept"}
_OF_BOTH = {"memory_noise", "memory_dropout", "decoder_only", "freeze_memory_path", "encoder_weight", "decoder_weight"}
_WITHOUT_EFFECT: dict[Trains, set[str]] = {
    "both": {"random_memory"},
    "encoder": {*_OF_BOTH, "balance_weight", "random_memory"},
    "decoder": {*_OF_BOTH, *_OF_THE_ENCODER},
}


class JointBase(StageBase):
    """Stages 1 and 2: encoder and decoder on single texts or interactions."""

    trains: Trains = Field(
        "both",
        description="both: jointly. The older separate way (REF 3.0): encoder: the masked encoder and the embedding; "
        "decoder: the decoder over the encoder's frozen embedding, its memory cross-attention frozen too, over a "
        "random memory near zero",
    )
    loss: JointLossConfig = JointLossConfig()

    @property
    def metrics(self) -> tuple[str, ...]:
        """`loss` and `accuracy` are the decoder's, where it trains."""
        masked = ("masked_loss", "masked_accuracy") if self.trains == "both" else ()
        balance = ("balance",) if self.trains != "encoder" else ()
        return ("loss", "accuracy", *balance, *masked)

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        plain = JointLossConfig()
        for name in sorted(_WITHOUT_EFFECT[self.trains]):
            if getattr(self.loss, name) != getattr(plain, name):
                raise ValueError(f"loss.{name} has no effect with trains: {self.trains}; leave it out")
        return self


class JointPretrainingConfig(JointBase):
    """Stage 1: joint language-model pre-training on texts."""

    section: ClassVar[Section] = "texts"

    kind: Literal["joint_pretraining"]
    packing: int = Field(
        0,
        ge=0,
        description="windows of the model that a row is long, filled with texts that don't see each other (a row of "
        "`global_batch_size` is then such a pack); 0: one text a row, which a CPU computes faster",
    )


class InteractionSFTConfig(JointBase):
    """Stage 2: joint supervised fine-tuning on single interactions; the decoder's loss counts answers only."""

    section: ClassVar[Section] = "interactions"

    kind: Literal["interaction_sft"]


_CHANGE = (
    "weight of the mean squared change of the memory by each write, times the root of the write's number (REF 3.3)"
)


class LabelWeights(Spec):
    """How much of the new interaction the memory's target holds at each write (REF 3.3).

    Write 0: `first`; write i >= 1: `base - decay * i`, moved by up to `random_factor` either way; the rest is what the
    memory held before.
    """

    first: Share = 0.9
    base: Share = 0.5
    decay: Share = 0.05
    random_factor: Share = 0.15


class MemoryPretrainingConfig(ConversationStage):
    """Stage 3: memory attention learns to hold what the (frozen) encoder says; negative cosine to mixed targets."""

    kind: Literal["memory_pretraining"]
    label_weights: LabelWeights = LabelWeights()
    input_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the encoder states")
    label_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on the targets")
    memory_change_weight: float = Field(0.0, ge=0, description=_CHANGE)
    system_prompts: bool = Field(True, description="a conversation's system prompt is the first thing written")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The negative cosine, and the relative change of a write."""
        return ("loss", "memory_change")


class Lesson(Spec):
    """A part of the curriculum: for `epochs`, conversations are cut to their first `turns` turns."""

    turns: int = Field(ge=2)
    epochs: float = Field(gt=0)


class MemoryAwareConfig(ConversationStage):
    """Stage 4: whole conversations in one forward, gradient through the memory writes (REF 3.4, DESIGN 4)."""

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
    memory_change_weight: float = Field(0.0, ge=0, description=_CHANGE)
    reset_probability: Share = Field(
        0.0,
        description="before each turn but the first, so often all that a conversation has written is forgotten, its "
        "system prompt excepted",
    )
    system_prompts: bool = Field(
        True,
        description="a conversation's system prompt is written before its first turn (in evaluations always)",
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of answer tokens, of the experts, and the relative change of a write."""
        return ("loss", "accuracy", "balance", "memory_change")

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
    JointPretrainingConfig
    | InteractionSFTConfig
    | MemoryPretrainingConfig
    | MemoryAwareConfig
    | CriticPretrainingConfig
    | MemoryRLConfig,
    Field(discriminator="kind"),
]

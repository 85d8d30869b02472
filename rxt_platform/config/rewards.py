"""What an answer is worth: the parts of the composite MRL reward and their weights (REF 4)."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec

Factor = Annotated[float, Field(ge=0)]
_TOLERANCE = 1e-9


def _check_sum(names: str, total: float) -> None:
    if abs(total - 1) > _TOLERANCE:
        raise ValueError(f"{names} = {total:.10g}, but parts of a whole sum to 1: change the others too")


class Parts(Spec):
    """Factors that are parts of one whole: they must sum to 1."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        parts: dict[str, float] = self.model_dump()
        _check_sum(" + ".join(parts), sum(parts.values()))
        return self


class RewardWeights(Parts):
    """The parts of the reward (w_B, w_C, w_L, w_R).

    An answer to a question without an answer key has no recall: what the other parts are worth is then divided by the
    sum of their weights. If that is 0, such an answer has no reward at all.
    """

    bleu: Factor = 0.4
    cosine: Factor = Field(0.5, description="closeness in meaning")
    length: Factor = Field(0.1, description="words of the answer, up to the target")
    recall: Factor = Field(0.0, description="1 if the answer holds all that the answer key asks for, else 0")


class BleuFactors(Parts):
    """What the answer's BLEU is taken to."""

    reference: Factor = Field(0.5, description="the reference answer")
    saved: Factor = Field(0.5, description="the saved interaction: that of the turn before")


class FirstCosineFactors(Parts):
    """What the first follow-up's answer is close to."""

    saved: Factor = 0.5
    reference: Factor = 0.5


class LaterCosineFactors(Parts):
    """What a later follow-up's answer is close to."""

    saved: Factor = 0.5
    reference: Factor = 0.3
    running_mean: Factor = Field(0.2, description="the running mean of all saved interactions")


class TopicChangeFactors(Parts):
    """What the answer to a change of topic is measured by."""

    reference: Factor = Field(0.5, description="being like the reference answer")
    unlike_saved: Factor = Field(0.5, description="being unlike the saved interaction")


class LengthConfig(Spec):
    """How long an answer should be: below the target it is worth words / target."""

    target: int | None = Field(None, gt=0, description="words; null: those of the reference answer")
    penalise_longer: bool = Field(False, description="above the target it is worth target / words, otherwise 1")


class RewardConfig(Spec):
    """Composite reward of a follow-up, 0 to `scale`: scale * (w_B * BLEU + w_C * cosine + w_L * length + w_R * recall).

    `topic_change_*` are for turns that change the topic, `later_cosine` also for those that come back to the first one.
    """

    weights: RewardWeights = RewardWeights()
    bleu_weights: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=4)] = Field(
        (0.5, 0.5), description="of 1-grams, 2-grams, ...; they sum to 1"
    )
    bleu: BleuFactors = BleuFactors()
    first_cosine: FirstCosineFactors = FirstCosineFactors()
    later_cosine: LaterCosineFactors = LaterCosineFactors()
    topic_change_bleu: TopicChangeFactors = TopicChangeFactors()
    topic_change_cosine: TopicChangeFactors = TopicChangeFactors()
    length: LengthConfig = LengthConfig()
    running_mean_decay: float = Field(0.2, ge=0, lt=1, description="share of the running mean that a turn keeps")
    scale: float = Field(10.0, gt=0)

    @model_validator(mode="after")
    def _bleu_weights_sum_to_one(self) -> Self:
        _check_sum("bleu_weights", sum(self.bleu_weights))
        return self

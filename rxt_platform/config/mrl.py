"""Memory Reinforcement Learning (REF 4): episodes, rewards, objective, critic; one stage for each part of a curriculum.

A curriculum is a chain of such stages with more and more steps. Each is a step of the pipeline, and hands on to the
next when its reward has reached `early_stopping.reach`, no longer rises, or its epochs are over.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec
from rxt_platform.config.rewards import RewardConfig
from rxt_platform.config.stage_base import ConversationStage, Share

Strategy = Literal["cumulative", "long_range", "mixed"]


class PolicyObjective(Spec):
    """The clipped policy objective (arXiv:1707.06347) on answer tokens, with the answer's advantage."""

    kind: Literal["policy"] = "policy"
    advantage: Literal["group", "impo", "gae"] = Field(
        "group",
        description="group: reward less the mean of the other answers to the same question, no critic; impo: reward "
        "less the critic's value; gae: over the turns of an episode, with the critic",
    )
    by_deviation: bool = Field(False, description="group: divide by the deviation of the question's answers")
    normalise: Literal["none", "batch", "step"] = Field(
        "none", description="advantages to mean 0 and deviation 1: over all answers, or over those of a turn"
    )
    discount: float = Field(0.99, ge=0, le=1, description="gae: of a turn's reward for the answer before")
    decay: float = Field(0.95, ge=0, le=1, description="gae: lambda")
    clip: float = Field(0.2, gt=0, lt=1, description="how far an answer's token may become likelier or less likely")
    kl_weight: float = Field(0.0, ge=0, description="of KL to the model that the stage started from, over its memory")
    entropy_weight: float = Field(0.0, ge=0)
    inter_step_weight: float = Field(
        0.0, ge=0, description="of KL from the answer before, position by position, to the answer (REF 4)"
    )

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        for name, advantage in (("by_deviation", "group"), ("discount", "gae"), ("decay", "gae")):
            if self.advantage != advantage and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with advantage: {self.advantage}; leave it out")
        return self

    @property
    def regularised(self) -> bool:
        """Whether answers get a gradient that are worth as much as was expected."""
        return bool(self.kl_weight or self.entropy_weight or self.inter_step_weight)


class PreferenceObjective(Spec):
    """DMPO (REF 3.5): of two answers over the memory of the accepted ones before, the better shall be likelier.

    Accepted and rejected are the best and the worst of the sampled answers to a question, by their rewards. They are
    sampled over the memory of the first answers, and compared over that of the accepted ones.
    """

    kind: Literal["dmpo"]
    beta: float = Field(0.1, gt=0)
    anchor_weight: float = Field(
        0.0, ge=0, description="anchored DMPO: of the change in likelihood of a neutral answer, the one in the middle"
    )


Objective = Annotated[PolicyObjective | PreferenceObjective, Field(discriminator="kind")]


class CriticConfig(Spec):
    """The critic: an encoder of its own under a value head, reading the interaction before and the next query."""

    window: int | None = Field(None, gt=0, description="tokens that it reads; twice the model's window by default")
    weight: float = Field(
        0.01,
        gt=0,
        description="of its loss. Adam does not mind a loss's scale, but a small one leaves the clipping of the "
        "gradient to the policy",
    )


class EpisodeConfig(ConversationStage):
    """What stages of episodes share: how conversations are held, and what an answer is worth."""

    steps: int = Field(gt=0, description="follow-ups of an episode; longer conversations are cut")
    strategy: Strategy = Field(
        "cumulative",
        description="long_range: the first follow-up changes the topic, the last one asks for the first interaction; "
        "mixed: as the conversation's answer keys say",
    )
    answers: int = Field(8, gt=0, description="sampled to each question, over the same memory")
    temperature: float = Field(1.0, gt=0)
    max_answer_tokens: int | None = Field(None, gt=0, description="until the model's window is full by default")
    memory: Literal["free_running", "teacher_forced"] = Field(
        "free_running", description="what is written: the model's own answer (the first one sampled), or the reference"
    )
    carry_over: Share = Field(
        0.0, description="share of episodes that begin over a memory in which another conversation was written"
    )
    carry_over_from: float = Field(0.0, ge=0, description="epochs before the first of these")
    reward: RewardConfig = RewardConfig()
    meaning: Literal["hashed", "tokens", "encoder"] = Field(
        "hashed",
        description="what the reward's cosine compares: hashed characters, or the token embedding or the encoder of "
        "the model that the stage starts from, frozen",
    )
    minibatches: int = Field(1, gt=0, description="updates that one collection of episodes is split into")
    update_epochs: int = Field(1, gt=0, description="times that a collection is trained on")
    critic: CriticConfig | None = None
    held_out: int = Field(64, gt=0, description="held-out conversations that are held to measure reward and recall")

    @property
    def value_scale(self) -> float:
        """What the critic's values start between 0 and."""
        return self.reward.scale

    @model_validator(mode="after")
    def _more_is_better(self) -> Self:
        stopping = self.early_stopping
        if stopping is not None and stopping.highest == (stopping.metric == "critic_error"):
            raise ValueError(
                f"early_stopping: of {stopping.metric} the best is the {'lowest' if stopping.highest else 'highest'}: "
                f"set highest: {str(not stopping.highest).lower()}"
            )
        return self

    @property
    def updates(self) -> int:
        """Optimizer steps on each collection of episodes."""
        return self.minibatches * self.update_epochs


class MemoryRLConfig(EpisodeConfig):
    """MRL: the policy learns from the rewards of its own answers, with gradient through the memory's writes."""

    kind: Literal["memory_rl"]
    objective: Objective = PolicyObjective()
    bptt_window: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        "all", description="memory writes that a gradient crosses"
    )
    balance_weight: float = Field(0.01, ge=0, description="weight of the experts' load balance")
    memory_change_weight: float = Field(0.0, ge=0, description="of the mean squared change by each write (REF 4)")
    critic_warmup: float = Field(0.0, ge=0, description="epochs in which only the critic learns")
    unfreeze_encoder: float = Field(
        0.0, ge=0, description="then epochs with memory attention and memory cross-attention alone"
    )
    unfreeze_all: float = Field(0.0, ge=0, description="then epochs with the encoder too, until all trains")

    @property
    def value_scale(self) -> float:
        """Of immediate rewards the reward's own; of what GAE adds up over the turns, as much as that can be."""
        if isinstance(self.objective, PolicyObjective) and self.objective.advantage == "gae":
            return self.reward.scale * sum(self.objective.discount**turn for turn in range(self.steps))
        return self.reward.scale

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of sampled answers the reward; of greedy ones the share of asked facts that they hold, and the reward."""
        return ("reward", "recall", "greedy_reward", *(("critic_correlation",) if self.critic else ()))

    @model_validator(mode="after")
    def _objective_has_what_it_needs(self) -> Self:
        objective = self.objective
        if isinstance(objective, PreferenceObjective):
            if self.answers < 2:
                raise ValueError(f"answers {self.answers}: objective dmpo compares answers: sample 2 or more")
            if objective.anchor_weight and self.answers < 3:
                raise ValueError(f"answers {self.answers}: an anchor needs a third one: sample 3 or more")
            return self
        if objective.advantage == "group" and self.answers < 2:
            raise ValueError(f"answers {self.answers}: advantage group compares answers: sample 2 or more")
        if objective.advantage == "gae" and self.answers != 1:
            raise ValueError(f"answers {self.answers}: advantage gae follows one answer a turn: use answers 1")
        if objective.advantage != "group" and self.critic is None:
            raise ValueError(f"advantage {objective.advantage} asks a critic: give `critic: {{}}`, or use group")
        return self

    @model_validator(mode="after")
    def _schedules_end(self) -> Self:
        """A schedule longer than the stage would leave parts untrained without a word."""
        frozen = self.critic_warmup + self.unfreeze_encoder + self.unfreeze_all
        if frozen >= self.epochs:
            names = "critic_warmup + unfreeze_encoder + unfreeze_all"
            raise ValueError(f"{names} takes {frozen:g} epochs, the stage has {self.epochs:g}: it would never end")
        if self.critic_warmup and self.critic is None:
            raise ValueError("critic_warmup has no effect without a critic: give `critic: {}`")
        return self


class CriticPretrainingConfig(EpisodeConfig):
    """The critic alone learns what the model's answers will be worth, before MRL asks it (REF 4)."""

    kind: Literal["critic_pretraining"]
    critic: CriticConfig = CriticConfig()
    learns: Literal["rewards", "preferences"] = Field(
        "rewards",
        description="rewards: the value of a question, by regression; preferences: the worth of an answer, which it "
        "then reads too, so that the better of two gets the higher value (a learned reward)",
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """On held-out conversations the correlation of values and rewards; the value's error, of rewards alone."""
        return ("critic_correlation", "reward") + (("critic_error",) if self.learns == "rewards" else ())

    @model_validator(mode="after")
    def _answers_to_compare(self) -> Self:
        if self.learns == "preferences" and self.answers < 2:
            raise ValueError(f"answers {self.answers}: learns: preferences compares answers: sample 2 or more")
        return self

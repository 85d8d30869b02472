"""What the service is asked and answers, by handle and by HTTP, and how it says no."""

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rxt_platform.rl.rewards import ScoredTurn

APP = "critic"  # the application's name, by which handles find it
REFUSED = "refused"  # key of an answer by handle that is none: what a handle raises, Ray would log with its traceback

Request = TypeVar("Request", bound="_Wire")


class Refusal(Exception):
    """A request that is not answered: HTTP status, a code for programs, a message that names the place and the fix."""

    def __init__(
        self, status: int, code: str, message: str, retry_after_s: float | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after_s, self.details = retry_after_s, details

    def body(self) -> dict[str, Any]:
        """As it is answered."""
        wait = {} if self.retry_after_s is None else {"retry_after_s": round(self.retry_after_s, 3)}
        return {"error": self.code, "message": self.message, **wait, **self.details}


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Turn(_Wire):
    """A turn of an episode. Every turn but the first is a follow-up, whose answer gets a reward."""

    query: str
    reference: str = Field(description="the answer as it should be")
    generated: str = Field(description="the answer that the model gave")
    saved: str | None = Field(
        None, description="query and answer of the turn before, which the memory holds; a follow-up needs it"
    )
    spans: list[str] | None = Field(None, description="what the answer must recall, if it is known")
    mode: Literal["standard", "long_range", "topic_change"] = "standard"

    def scored(self) -> ScoredTurn:
        """As the reward takes it."""
        fields = {**self.model_dump(), "spans": None if self.spans is None else tuple(self.spans)}
        return ScoredTurn(**fields)


class ScoreRequest(_Wire):
    """Episodes whose answers are to be rewarded."""

    episodes: list[list[Turn]] = Field(min_length=1)


class ValueRequest(_Wire):
    """States whose values are asked for: token ids, or texts, which become `[BOS]text[EOS]`."""

    version: int | None = Field(None, ge=0, description="of the critic's weights; null: the newest")
    input_ids: list[list[int]] | None = None
    texts: list[str] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.input_ids is None) == (self.texts is None):
            raise ValueError("give input_ids or texts, one of them")
        if not (self.input_ids or self.texts):
            raise ValueError("no rows: nothing to value")
        return self


class RewardParts(_Wire):
    """What an answer is worth, and the parts of it, each 0 to 1."""

    total: float | None = Field(description="0 to the configured scale; null where nothing of it could be measured")
    bleu: float
    cosine: float
    length: float
    recall: float | None = Field(None, description="null where it is not known what must be recalled")


class ScoreAnswer(_Wire):
    """Rewards of each episode's follow-ups."""

    version: str = Field(description="of the rewards: changes with their configuration and embedding")
    rewards: list[list[RewardParts]]


class ValueAnswer(_Wire):
    """Values of the states, in their order, all by one version."""

    version: int
    values: list[float]


class Info(_Wire):
    """What the service has and allows."""

    model: str | None = Field(description="directory or folder that the critic's weights come from")
    versions: list[int] = Field(description="of the critic, ascending")
    rewards: str = Field(description="version of the rewards")
    vocab_size: int | None = Field(description="token ids go from 0 to one less")
    window: int | None = Field(description="longest row in tokens")
    limits: dict[str, float] = Field(description="the service's own")


class Refused(_Wire):
    """Why there is no answer. More keys may say where."""

    model_config = ConfigDict(extra="allow")
    error: str = Field(description="a code for programs")
    message: str


TURN = {"query": "What is Tom's dog called?", "reference": "Rex.", "generated": "It is called Rex."}
EXAMPLES: Mapping[type[BaseModel], Any] = {
    ScoreRequest: {
        "episodes": [
            [
                {"query": "Tom has a dog called Rex.", "reference": "Nice!", "generated": "Nice!"},
                {**TURN, "saved": "Tom has a dog called Rex. Nice!", "spans": ["Rex"]},
            ]
        ]
    },
    ValueRequest: {"version": 0, "texts": ["Tom has a dog called Rex.", "What is Tom's dog called?"]},
}


def parse(model: type[Request], raw: Any) -> Request:
    """A request from its plain values. Refuses (422) what is not one, naming the place."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        first = found[0]
        at = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" or not at else f", got {_short(first['input'])}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        raise Refusal(422, "invalid", f"{at}: {message}{got}{more}" if at else f"{message}{more}", at=at) from None


def _short(value: Any) -> str:
    """A value's beginning: requests can be large."""
    text = str(value)[:60] if isinstance(value, str) else repr(value)[:60] if isinstance(value, int | float) else ""
    return repr(text) if isinstance(value, str) else text or f"a {type(value).__name__}"

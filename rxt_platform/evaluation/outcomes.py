"""What an evaluation sees, turn by turn: plain records, of which all measures of answers are made. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSums:
    """Target tokens: summed cross-entropy (nats), how many were predicted right, how many there are."""

    loss: float
    correct: int
    count: int


@dataclass(frozen=True)
class Question:
    """A turn that asks for what earlier turns told, and whether the answer was right.

    `own` is the answer over a memory that holds the model's own answers, `reset` the one without memory. `task` and
    `long_range` come from the answer key, None without one, as is `told_by_user`: whether the asked facts stand in the
    queries since then. If not, they stand in reference answers, and a model that gave others was never told them.
    """

    distance: int
    task: str | None
    long_range: bool | None
    told_by_user: bool | None
    right: bool
    reset: bool
    own: bool | None


@dataclass(frozen=True)
class TurnOutcome:
    """One turn (from 1) of one conversation (from 0).

    `tokens` and `tokens_reset` are of the reference answer; `answer` is the greedy one where the memory holds the
    reference answers of the turns before, `own_answer` where it holds the model's own (None: not asked for). `spans` is
    what an answer key asks for.
    """

    conversation: int
    turn: int
    query: str
    reference: str
    tokens: TokenSums
    tokens_reset: TokenSums
    answer: str
    own_answer: str | None
    question: Question | None
    spans: tuple[str, ...] | None

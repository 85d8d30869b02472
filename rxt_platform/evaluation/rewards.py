"""The composite MRL reward of the answers that a model gave (REF 4, 6), a mean over conversations."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.outcomes import TurnOutcome
from rxt_platform.rl.rewards import ScoredTurn, TextEmbedding, score_conversations

_AT_ONCE = 64  # conversations whose texts are embedded together
_COMPONENTS = ("bleu", "cosine", "length")


def reward_entry(
    outcomes: Sequence[TurnOutcome],
    config: RewardConfig,
    embedding: TextEmbedding,
    bootstrap: Bootstrap,
    own: bool = False,
) -> dict[str, Any]:
    """{mean, interval, min, max, components {bleu, cosine, length, and recall if it has a weight}, conversations,
    scores}.

    A conversation's reward is the mean over its follow-ups, as far as they have one; `scores` are those of all
    conversations that have some, `min` and `max` the extremes. Every turn is scored in standard mode. With `own`, of
    the answers over a memory that holds the model's own earlier answers.
    """
    components = (*_COMPONENTS, "recall") if config.weights.recall else _COMPONENTS
    talks: dict[int, list[TurnOutcome]] = defaultdict(list)
    for outcome in outcomes:
        talks[outcome.conversation].append(outcome)
    numbers = [number for number in sorted(talks) if len(talks[number]) > 1]
    scores: dict[int, float] = {}
    parts: dict[str, list[float]] = {name: [] for name in components}
    for start in range(0, len(numbers), _AT_ONCE):
        some = numbers[start : start + _AT_ONCE]
        scored = score_conversations([_scored(talks[number], own) for number in some], config, embedding)
        for number, rewards in zip(some, scored, strict=True):
            if (score := _mean([one.total for one in rewards])) is None:
                continue
            scores[number] = score
            for name in components:
                if (part := _mean([getattr(one, name) for one in rewards])) is not None:
                    parts[name].append(part)
    found = list(scores.values())
    totals = bootstrap.totals(((number, (score, 1)) for number, score in scores.items()), 2)
    return {
        "mean": _mean(found),
        "interval": bootstrap.interval(totals[:, 0], totals[:, 1]) if found else None,
        "min": min(found, default=None),
        "max": max(found, default=None),
        "components": {name: _mean(values) for name, values in parts.items()},
        "conversations": len(found),
        "scores": found,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those there are; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _scored(turns: Sequence[TurnOutcome], own: bool) -> list[ScoredTurn]:
    """A conversation's turns, each with the reference interaction before it.

    Also where the memory holds the model's own answers: else a model would be paid for saying the same again.
    """
    scored: list[ScoredTurn] = []
    saved = None
    for one in turns:
        answer = one.own_answer if own and one.own_answer is not None else one.answer
        scored.append(ScoredTurn(one.query, one.reference, answer, saved, one.spans))
        saved = f"{one.query} {one.reference}"
    return scored

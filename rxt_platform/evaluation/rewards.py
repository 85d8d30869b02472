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
    """{mean, interval, min, max, components {bleu, cosine, length}, conversations, scores}.

    A conversation's reward is the mean over its follow-ups; `scores` are those of all conversations that have some,
    `min` and `max` the extremes. With `own`, of the answers over a memory that holds the model's own earlier answers.
    """
    talks: dict[int, list[TurnOutcome]] = defaultdict(list)
    for outcome in outcomes:
        talks[outcome.conversation].append(outcome)
    numbers = [number for number in sorted(talks) if len(talks[number]) > 1]
    rows = []
    for start in range(0, len(numbers), _AT_ONCE):
        scored = [_scored(talks[number], own) for number in numbers[start : start + _AT_ONCE]]
        for rewards in score_conversations(scored, config, embedding):
            parts = [(one.total, one.bleu, one.cosine, one.length) for one in rewards]
            rows.append(np.mean(parts, axis=0).tolist())
    if not rows:
        nothing = dict.fromkeys(("mean", "interval", "min", "max"))
        return {**nothing, "components": dict.fromkeys(_COMPONENTS), "conversations": 0, "scores": []}
    scores = [row[0] for row in rows]
    mean, *components = np.mean(rows, axis=0).tolist()
    totals = bootstrap.totals(((number, (score, 1)) for number, score in zip(numbers, scores, strict=True)), 2)
    return {
        "mean": mean,
        "interval": bootstrap.interval(totals[:, 0], totals[:, 1]),
        "min": min(scores),
        "max": max(scores),
        "components": dict(zip(_COMPONENTS, components, strict=True)),
        "conversations": len(rows),
        "scores": scores,
    }


def _scored(turns: Sequence[TurnOutcome], own: bool) -> list[ScoredTurn]:
    """A conversation's turns, each with the reference interaction before it.

    Also where the memory holds the model's own answers: else a model would be paid for saying the same again.
    """
    scored: list[ScoredTurn] = []
    saved = None
    for one in turns:
        answer = one.own_answer if own and one.own_answer is not None else one.answer
        scored.append(ScoredTurn(one.query, one.reference, answer, saved))
        saved = f"{one.query} {one.reference}"
    return scored

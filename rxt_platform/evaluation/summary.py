"""The figures that are made of outcomes: answer tokens and recall, each with its interval, and samples. No torch.

Everything is a ratio of sums over conversations. A number for which there was nothing to measure is None.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rxt_platform.evaluation.intervals import Bootstrap, gain_interval, share_interval
from rxt_platform.evaluation.outcomes import Question, TokenSums, TurnOutcome

_FARTHEST = 16  # questions from farther away are one group
_LARGEST_EXPONENT = 700.0  # exp of more is no float

Entry = dict[str, Any]
Asked = tuple[int, Question]
"""A question, after the number of its conversation."""


def token_entry(sums: Iterable[tuple[int, TokenSums]], bootstrap: Bootstrap) -> Entry:
    """{loss, perplexity, accuracy, count, intervals} of target tokens that are given with their conversation."""
    totals = bootstrap.totals(((number, (one.loss, one.correct, one.count)) for number, one in sums), 3)
    loss, correct, count = totals.sum(axis=0).tolist()
    names = ("loss", "perplexity", "accuracy")
    if not count:
        return {**dict.fromkeys(names), "count": 0, "intervals": dict.fromkeys(names)}
    of_loss = bootstrap.interval(totals[:, 0], totals[:, 2])
    of_accuracy = share_interval(totals[:, 1], totals[:, 2])
    of_perplexity = of_loss and [_perplexity(bound) for bound in of_loss]
    values = (loss / count, _perplexity(loss / count), correct / count)
    intervals = (of_loss, of_perplexity, of_accuracy)
    return {
        **dict(zip(names, values, strict=True)),
        "count": int(count),
        "intervals": dict(zip(names, intervals, strict=True)),
    }


def answer_tokens(outcomes: Sequence[TurnOutcome], bootstrap: Bootstrap) -> Entry:
    """`answer_tokens` and `memory_reset` over all turns, `follow_up_gain`, and `by_turn`."""
    turns: dict[int, list[TurnOutcome]] = defaultdict(list)
    for outcome in outcomes:
        turns[outcome.turn].append(outcome)
    by_turn = [{"turn": turn, **_both(turns[turn], bootstrap, "with_memory")} for turn in sorted(turns)]
    for row in by_turn:
        row["count"] = row["with_memory"]["count"]
    gain = _follow_up_gain(outcomes, bootstrap)
    return {**_both(outcomes, bootstrap, "answer_tokens"), "follow_up_gain": gain, "by_turn": by_turn}


def _follow_up_gain(outcomes: Sequence[TurnOutcome], bootstrap: Bootstrap) -> Entry:
    """{nats, interval, count}: what is saved on each answer token, but of first turns, by what was told before."""
    rows = (
        (one.conversation, (one.tokens_reset.loss - one.tokens.loss, one.tokens.count))
        for one in outcomes
        if one.turn > 1
    )
    saved, counts = bootstrap.totals(rows, 2).T
    if not counts.any():
        return {"nats": None, "interval": None, "count": 0}
    nats = float(saved.sum() / counts.sum())
    return {"nats": nats, "interval": bootstrap.interval(saved, counts), "count": int(counts.sum())}


def _both(outcomes: Sequence[TurnOutcome], bootstrap: Bootstrap, name: str) -> Entry:
    return {
        name: token_entry(((one.conversation, one.tokens) for one in outcomes), bootstrap),
        "memory_reset": token_entry(((one.conversation, one.tokens_reset) for one in outcomes), bootstrap),
    }


def recall_tables(outcomes: Sequence[TurnOutcome], bootstrap: Bootstrap, own: bool = False) -> Entry:
    """`recall` by distance, `recall_by_task`, `recall_long_range`, `recall_by_teller` and `recall_overall`.

    With `own`, of the answers over a memory that holds the model's own earlier answers.
    """
    asked = [(one.conversation, one.question) for one in outcomes if one.question is not None]
    tasks = {item.task for _, item in asked if item.task is not None}
    groups: Mapping[str, Mapping[str, list[Asked]]] = {
        "recall": {
            **{str(distance): [one for one in asked if one[1].distance == distance] for distance in _near(asked)},
            f"{_FARTHEST + 1}+": [one for one in asked if one[1].distance > _FARTHEST],
        },
        "recall_by_task": {task: [one for one in asked if one[1].task == task] for task in sorted(tasks)},
        "recall_long_range": {
            str(far).lower(): [one for one in asked if one[1].long_range is far] for far in (True, False)
        },
        "recall_by_teller": {
            teller: [one for one in asked if one[1].told_by_user is user]
            for teller, user in (("user", True), ("model", False))
        },
    }
    tables = {
        name: {label: recall_entry(group, bootstrap, own) for label, group in groups[name].items() if group}
        for name in groups
    }
    return {**tables, "recall_overall": recall_entry(asked, bootstrap, own)}


def _near(asked: Sequence[Asked]) -> list[int]:
    return sorted({item.distance for _, item in asked if item.distance <= _FARTHEST})


def recall_entry(asked: Sequence[Asked], bootstrap: Bootstrap, own: bool = False) -> Entry:
    """Shares of questions answered right, and memory gain, their difference (DESIGN 5).

    {with_memory, reset, gain, count, intervals: {with_memory, reset, gain}}.
    """
    names = ("with_memory", "reset", "gain")
    if not asked:
        return {**dict.fromkeys(names), "count": 0, "intervals": dict.fromkeys(names)}

    def row(item: Question) -> tuple[float, ...]:
        remembered = bool(item.own if own else item.right)
        return remembered, item.reset, 1

    totals = bootstrap.totals(((number, row(item)) for number, item in asked), 3)
    right, reset, counts = totals.T
    shares = [float(hits.sum()) / len(asked) for hits in (right, reset, right - reset)]
    intervals = (share_interval(right, counts), share_interval(reset, counts), gain_interval(right, reset, counts))
    return {
        **dict(zip(names, shares, strict=True)),
        "count": len(asked),
        "intervals": dict(zip(names, intervals, strict=True)),
    }


def spread_samples(outcomes: Sequence[TurnOutcome], conversations: int, samples: int) -> list[list[dict[str, str]]]:
    """Some conversations, evenly spread: each turn's query, reference and answer; of a memory that holds the model's
    own answers, if that was tried."""
    chosen = {index * conversations // samples for index in range(samples)} if samples < conversations else None
    shown: dict[int, list[dict[str, str]]] = defaultdict(list)
    for one in outcomes:
        if chosen is None or one.conversation in chosen:
            answer = one.answer if one.own_answer is None else one.own_answer
            shown[one.conversation].append({"query": one.query, "reference": one.reference, "answer": answer})
    return [shown[number] for number in sorted(shown)]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, _LARGEST_EXPONENT))

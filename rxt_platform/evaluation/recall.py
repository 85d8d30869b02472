"""When an answer counts as recalled, and the figures made of it. Text and numbers only, no torch."""

import math
import re


def recall_of(outcomes: list[tuple[bool, bool]]) -> dict[str, float]:
    """Shares of (right with memory, right with memory reset) outcomes, and memory gain, their difference (DESIGN 5)."""
    count = len(outcomes)
    remembered, forgotten = (sum(outcome[i] for outcome in outcomes) / count for i in (0, 1))
    return {"with_memory": remembered, "reset": forgotten, "gain": remembered - forgotten, "count": count}


def mean_recall(recall: dict[str, dict[str, float]]) -> dict[str, float]:
    """Recall over all questions of all entries (by distance or task), each question counted once."""
    count = sum(entry["count"] for entry in recall.values())
    if not count:
        return {"with_memory": math.nan, "reset": math.nan, "gain": math.nan, "count": 0}
    means = {
        name: sum(entry[name] * entry["count"] for entry in recall.values()) / count
        for name in ("with_memory", "reset", "gain")
    }
    return {**means, "count": count}


def matches(answer: str, reference: str, spans: tuple[str, ...] | None) -> bool:
    """Exact match of all asked facts (`spans`, whole words anywhere in the answer) or of the whole answer."""
    if spans is None:
        return _words(answer) == _words(reference)
    return all(f" {_words(span)} " in f" {_words(answer)} " for span in spans)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))

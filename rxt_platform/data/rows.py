"""The rows that supervised and memory training read: an interaction (one query with its answer), a conversation
(interactions in order) and the answer key of a question about an earlier turn, with their published JSON layout.

A bad row raises `ValueError` that names the column; the caller, who knows it, adds the file and the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ANSWER_KEY_COLUMNS = ("answer_span", "distance", "long_range")


@dataclass(frozen=True)
class Recall:
    """The answer key of a question about a fact that an earlier turn told."""

    span: str
    """The words of the answer that are the asked fact; they occur verbatim in the answer."""
    distance: int
    """Turns from the one that told the fact to the question; 1 means it was told in the turn right before."""
    long_range: bool
    """Whether turns lie between telling and asking, none of which is about the same character."""


@dataclass(frozen=True)
class Interaction:
    """One turn: what the user says and what the model answers."""

    query: str
    answer: str
    recall: Recall | None = None
    """Set only where the query asks for a fact that an earlier turn told."""


@dataclass(frozen=True)
class Conversation:
    """Interactions in order; the memory carries from each one to the next."""

    interactions: tuple[Interaction, ...]

    def __post_init__(self) -> None:
        if not self.interactions:
            raise ValueError("a conversation needs at least one interaction, got none")


def interaction_to_row(interaction: Interaction) -> dict[str, Any]:
    """The JSON object of one interaction; a question also carries its three answer-key columns."""
    row: dict[str, Any] = {"query": interaction.query, "answer": interaction.answer}
    if interaction.recall is not None:
        row["answer_span"] = interaction.recall.span
        row["distance"] = interaction.recall.distance
        row["long_range"] = interaction.recall.long_range
    return row


def interaction_from_row(row: Mapping[str, Any], column: str = "") -> Interaction:
    """Read one interaction. `column` is where the object sits in its row (`interactions[2]`), for the message.

    Unknown columns are ignored. Raises `ValueError` that names the bad column.
    """
    _require_object(row, column)
    query = _text(row, "query", column)
    answer = _text(row, "answer", column)
    return Interaction(query, answer, _recall(row, answer, column))


def conversation_to_row(conversation: Conversation) -> dict[str, Any]:
    """The published layout: the first interaction is the row's own query and answer, the others are listed."""
    first, *others = conversation.interactions
    return {**interaction_to_row(first), "interactions": [interaction_to_row(other) for other in others]}


def conversation_from_row(row: Mapping[str, Any]) -> Conversation:
    """Read a conversation in any of three layouts; unknown columns are ignored.

    `{query, answer, interactions}` (published), `{interactions}` alone (newer: the list holds every turn) or
    `{query, answer}` (a conversation of one turn). Raises `ValueError` that names the bad column.
    """
    _require_object(row, "")
    interactions: list[Interaction] = []
    columns: list[str] = []
    if "query" in row or "answer" in row or "interactions" not in row:
        interactions.append(interaction_from_row(row))
        columns.append("")
    for index, item in enumerate(_listed(row)):
        columns.append(f"interactions[{index}]")
        interactions.append(interaction_from_row(item, columns[-1]))
    if not interactions:
        raise _bad("interactions", "", "empty")
    for turn, interaction in enumerate(interactions):
        if interaction.recall is not None and interaction.recall.distance > turn:
            # Accepted silently, it would count as a memory failure although nothing was told.
            distance = interaction.recall.distance
            raise _bad("distance", columns[turn], f"{distance} turns back is before the conversation starts")
    return Conversation(tuple(interactions))


def _listed(row: Mapping[str, Any]) -> list[Any]:
    if "interactions" not in row:
        return []
    listed = row["interactions"]
    if listed is None:
        raise _bad("interactions", "", "null")
    if not isinstance(listed, list):
        raise _bad("interactions", "", f"expected a list, got {type(listed).__name__}")
    return listed


def _recall(row: Mapping[str, Any], answer: str, column: str) -> Recall | None:
    """The answer key, or None. Arrow and Parquet fill absent columns with null, so null here means absent."""
    present = [name for name in _ANSWER_KEY_COLUMNS if row.get(name) is not None]
    if not present:
        return None
    for name in _ANSWER_KEY_COLUMNS:
        if name not in present:
            raise _bad(name, column, f"missing ({', '.join(_ANSWER_KEY_COLUMNS)} come together or not at all)")
    span, distance, long_range = _text(row, "answer_span", column), row["distance"], row["long_range"]
    if span not in answer:
        raise _bad("answer_span", column, f"{span!r} does not occur in the answer {answer!r}")
    if isinstance(distance, bool) or not isinstance(distance, int):
        raise _bad("distance", column, f"expected a whole number, got {type(distance).__name__}")
    if distance < 1:
        raise _bad("distance", column, f"expected at least 1, got {distance}")
    if not isinstance(long_range, bool):
        raise _bad("long_range", column, f"expected true or false, got {type(long_range).__name__}")
    if long_range and distance < 2:
        raise _bad("long_range", column, "true, but distance 1 leaves no turn between telling and asking")
    return Recall(span, distance, long_range)


def _text(row: Mapping[str, Any], name: str, column: str) -> str:
    if name not in row:
        raise _bad(name, column, "missing")
    value = row[name]
    if value is None:
        raise _bad(name, column, "null")
    if not isinstance(value, str):
        raise _bad(name, column, f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise _bad(name, column, "empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape what no UTF-8 file can hold
        raise _bad(name, column, "half of a surrogate pair: not Unicode text") from None
    return value


def _require_object(row: Any, column: str) -> None:
    if isinstance(row, Mapping):
        return
    where = f"column '{column}'" if column else "row"
    raise ValueError(f"{where}: {'null' if row is None else f'expected an object, got {type(row).__name__}'}")


def _bad(name: str, column: str, problem: str) -> ValueError:
    return ValueError(f"column '{f'{column}.{name}' if column else name}': {problem}")

"""Row kinds: what one row of a data set is, typed, with the JSON layouts that are read and written (REF 7).

    text          {text}
    interaction   {query, answer}
    conversation  {query, answer, interactions: [{query, answer}, ...]}    the first interaction is the row's own
                  {interactions: [{query, answer}, ...]}                   newer: the list holds every turn
                  both may have {system}: a prompt that is in the memory before the first turn
    hybrid        an interaction, or a conversation of them, with {internal, query | tool_use, think, answer, tool_call}
    preference    {interactions: [{internal, query | tool_use, accepted, rejected, neutral}, ...]}, each of the three
                  {think, answer, tool_call}

Unknown columns are ignored. A question may carry an answer key: {answer_span, distance, long_range, task}. A bad row
raises `RowError`, which names the column; the caller, who knows it, adds the file and the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rxt_platform.data.recall import matches

RowKind = Literal["text", "interaction", "conversation", "hybrid", "preference"]
ROW_VERSION = 2
"""Raised by every change to a layout that is written."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
HYBRID_COLUMNS = ("internal", "tool_use", "think", "tool_call")
_ANSWER_KEY = ("answer_span", "distance", "long_range")
_CHOICES = ("accepted", "rejected", "neutral")
_QUOTED = 100  # characters of a text that a message quotes


class RowError(ValueError):
    """A row that can't be used: `column` is where (`interactions[2].query`), `reason` why."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"column '{column}': {reason}" if column else f"row: {reason}")
        self.column = column
        self.reason = reason


@dataclass(frozen=True)
class Recall:
    """The answer key of a question about what earlier turns told."""

    spans: tuple[str, ...]
    """The words of the answer that are the asked facts, in its order; each occurs verbatim in the answer."""
    distance: int
    """Turns from the one that told the fact (of several, the earliest) to the question; 1 is the turn right before."""
    long_range: bool
    """Whether turns lie between telling and asking, none of which is about the same character."""
    task: str = "recall"
    """What the question takes: the story world's `TASKS`, or a name of the data set's own."""


@dataclass(frozen=True)
class Interaction:
    """One turn: what the user says and what the model answers.

    A `hybrid` one may hold more: instructions that the user does not see (`internal`), a tool's result in place of the
    user's message (`from_tool`), reasoning before the answer and a tool call after it; then `answer` may be empty.
    """

    query: str
    answer: str
    recall: Recall | None = None
    hybrid: bool = False
    from_tool: bool = False
    internal: str | None = None
    think: str | None = None
    tool_call: str | None = None

    @property
    def reply(self) -> str:
        """What is said in the end: the answer, or the tool call where there is none."""
        return self.answer or self.tool_call or ""


@dataclass(frozen=True)
class Conversation:
    """Interactions in order; the memory carries from each one to the next, and holds `system` before the first."""

    interactions: tuple[Interaction, ...]
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.interactions:
            raise ValueError("a conversation needs at least one interaction, got none")


@dataclass(frozen=True)
class PreferenceTurn:
    """A turn with an accepted and a rejected reply, and possibly one in between; a reply is a hybrid interaction."""

    accepted: Interaction
    rejected: Interaction
    neutral: Interaction | None = None


@dataclass(frozen=True)
class PreferenceEpisode:
    """Turns in order; the accepted replies are what memory holds."""

    turns: tuple[PreferenceTurn, ...]


Row = str | Conversation | PreferenceEpisode
"""A text, a conversation (an interaction is one of a single turn) or a preference episode."""


def guess_kind(columns: Iterable[str]) -> RowKind | None:
    """The kind that rows with these columns (those inside `interactions` included) are of; None when of none."""
    names = set(columns)
    if names & {"accepted", "rejected"}:
        return "preference"
    if "answer" in names and names & set(HYBRID_COLUMNS):
        return "hybrid"
    if "interactions" in names:
        return "conversation"
    if {"query", "answer"} <= names:
        return "interaction"
    return "text" if "text" in names else None


def parse_row(kind: RowKind, row: Any) -> Row:
    """Read and check a row of `kind`. Raises RowError."""
    _require_object(row, "")
    if kind == "text":
        return text_of(row, "text", "")
    if kind == "preference":
        return _preference(row)
    if kind == "interaction" and row.get("interactions"):
        raise RowError("interactions", "given, but rows of this source are single interactions")
    if kind != "hybrid" and (column := hybrid_column(row)):
        raise RowError(column, "given, but rows of this source are not hybrid ones")
    if kind == "interaction":
        return Conversation((interaction_from_row(row),))
    return conversation_from_row(row, hybrid=kind == "hybrid")


def hybrid_column(row: Any) -> str:
    """The first column with content that only a hybrid row has, also in its interactions; empty if there is none."""
    if not isinstance(row, Mapping):
        return ""
    own = next((name for name in HYBRID_COLUMNS if row.get(name) not in (None, "")), "")
    listed = row.get("interactions")
    for index, item in enumerate(listed if isinstance(listed, list) and not own else []):
        if isinstance(item, Mapping) and (inner := hybrid_column({**item, "interactions": None})):
            return f"interactions[{index}].{inner}"
    return own


def row_to_json(row: Row) -> dict[str, Any]:
    """The JSON object of a row, in the published layout."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, Conversation):
        return conversation_to_row(row)
    return {"interactions": [_preference_to_row(turn) for turn in row.turns]}


def interaction_to_row(interaction: Interaction) -> dict[str, Any]:
    """The JSON object of one interaction; a question also carries its answer key."""
    row: dict[str, Any] = {"tool_use" if interaction.from_tool else "query": interaction.query}
    if interaction.hybrid:
        row |= {"internal": interaction.internal, "think": interaction.think, "answer": interaction.answer or None}
        row["tool_call"] = interaction.tool_call
    else:
        row["answer"] = interaction.answer
    if (recall := interaction.recall) is not None:
        row["answer_span"] = recall.spans[0] if len(recall.spans) == 1 else list(recall.spans)
        row |= {"distance": recall.distance, "long_range": recall.long_range, "task": recall.task}
    return row


def interaction_from_row(row: Any, column: str = "", hybrid: bool = False) -> Interaction:
    """Read one interaction; `column` is where the object sits in its row (`interactions[2]`). Raises RowError."""
    _require_object(row, column)
    if hybrid:
        return _hybrid(row, row, column)
    query, answer = text_of(row, "query", column), text_of(row, "answer", column)
    return Interaction(query, answer, _recall(row, answer, column))


def conversation_to_row(conversation: Conversation) -> dict[str, Any]:
    """The published layout: the first interaction is the row's own query and answer, the others are listed."""
    first, *others = conversation.interactions
    row = {**interaction_to_row(first), "interactions": [interaction_to_row(other) for other in others]}
    return row if conversation.system is None else {"system": conversation.system, **row}


def conversation_from_row(row: Any, hybrid: bool = False) -> Conversation:
    """Read a conversation: `{query, answer, interactions}`, `{interactions}` alone, or `{query, answer}` (one turn).

    Raises RowError.
    """
    _require_object(row, "")
    interactions: list[Interaction] = []
    columns: list[str] = []
    own = {"query", "answer", *(HYBRID_COLUMNS if hybrid else ())}
    if any(row.get(name) is not None for name in own) or "interactions" not in row:
        interactions.append(interaction_from_row(row, hybrid=hybrid))
        columns.append("")
    for index, item in enumerate(_listed(row)):
        columns.append(f"interactions[{index}]")
        interactions.append(interaction_from_row(item, columns[-1], hybrid))
    if not interactions:
        raise RowError("interactions", "empty")
    for turn, interaction in enumerate(interactions):
        if interaction.recall is not None and interaction.recall.distance > turn:
            # Accepted silently, it would count as a memory failure although nothing was told.
            distance = interaction.recall.distance
            raise _bad("distance", columns[turn], f"{distance} turns back is before the conversation starts")
    return Conversation(tuple(interactions), _optional(row, "system", ""))


def text_of(row: Mapping[str, Any], name: str, column: str) -> str:
    """The text in column `name` of an object at `column`; raises RowError unless it is text that says something."""
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
    if control := _CONTROL.search(value):
        raise _bad(name, column, f"control character U+{ord(control[0]):04X} at position {control.start()}")
    return value


def _hybrid(row: Mapping[str, Any], reply: Mapping[str, Any], column: str, at: str = "") -> Interaction:
    """A hybrid interaction: what was said in `row`, the reply in `reply` (at `column`, its reply at `at`)."""
    said = [name for name in ("query", "tool_use") if row.get(name) not in (None, "")]
    if len(said) != 1:
        raise _bad("query", column, "missing (or 'tool_use')" if not said else "given together with 'tool_use'")
    query = text_of(row, said[0], column)
    internal = _optional(row, "internal", column)
    think, answer, call = (_optional(reply, name, at or column) for name in ("think", "answer", "tool_call"))
    if answer is None and call is None:
        raise _bad("answer", at or column, "missing (or 'tool_call')")
    recall = _recall(row, answer or "", column)
    return Interaction(query, answer or "", recall, True, said[0] == "tool_use", internal, think, call)


def _optional(row: Mapping[str, Any], name: str, column: str) -> str | None:
    """A text that may be absent, null or empty."""
    value = row.get(name)
    return None if value is None or value == "" else text_of(row, name, column)


def _preference(row: Mapping[str, Any]) -> PreferenceEpisode:
    if "interactions" not in row:
        raise RowError("interactions", "missing")
    turns = []
    for index, item in enumerate(_listed(row)):
        column = f"interactions[{index}]"
        _require_object(item, column)
        replies: dict[str, Interaction] = {}
        for choice in _CHOICES:
            if item.get(choice) is None and choice == "neutral":
                continue
            at = f"{column}.{choice}"
            if choice not in item:
                raise RowError(at, "missing")
            _require_object(item[choice], at)
            replies[choice] = _hybrid(item, item[choice], column, at)
        turns.append(PreferenceTurn(**replies))
    if not turns:
        raise RowError("interactions", "empty")
    return PreferenceEpisode(tuple(turns))


def _preference_to_row(turn: PreferenceTurn) -> dict[str, Any]:
    row = {key: value for key, value in interaction_to_row(turn.accepted).items() if key in ("query", "tool_use")}
    row["internal"] = turn.accepted.internal
    for choice in _CHOICES:
        reply: Interaction | None = getattr(turn, choice)
        row[choice] = reply and {"think": reply.think, "answer": reply.answer or None, "tool_call": reply.tool_call}
    return row


def _listed(row: Mapping[str, Any]) -> list[Any]:
    if "interactions" not in row:
        return []
    listed = row["interactions"]
    if listed is None:
        raise RowError("interactions", "null")
    if not isinstance(listed, list):
        raise RowError("interactions", f"expected a list, got {type(listed).__name__}")
    return listed


def _recall(row: Mapping[str, Any], answer: str, column: str) -> Recall | None:
    """The answer key, or None. Arrow and Parquet fill absent columns with null, so null here means absent."""
    present = [name for name in _ANSWER_KEY if row.get(name) not in (None, "")]
    if not present:
        return None
    for name in _ANSWER_KEY:
        if name not in present:
            raise _bad(name, column, f"missing ({', '.join(_ANSWER_KEY)} come together or not at all)")
    listed = row["answer_span"] if isinstance(row["answer_span"], list) else [row["answer_span"]]
    spans = tuple(text_of({"answer_span": span}, "answer_span", column) for span in listed)
    if not spans:
        raise _bad("answer_span", column, "empty")
    for span in spans:
        if not matches(answer, answer, (span,)):
            said = f"{_short(span)} does not occur in the answer {_short(answer)}, as whole words"
            raise _bad("answer_span", column, said)
    distance, long_range = row["distance"], row["long_range"]
    if isinstance(distance, bool) or not isinstance(distance, int):
        raise _bad("distance", column, f"expected a whole number, got {type(distance).__name__}")
    if distance < 1:
        raise _bad("distance", column, f"expected at least 1, got {distance}")
    if not isinstance(long_range, bool):
        raise _bad("long_range", column, f"expected true or false, got {type(long_range).__name__}")
    if long_range and distance < 2:
        raise _bad("long_range", column, "true, but distance 1 leaves no turn between telling and asking")
    task = "recall" if row.get("task") is None else text_of(row, "task", column)
    return Recall(spans, distance, long_range, task)


def _short(text: str) -> str:
    """A text as messages quote it."""
    return repr(text) if len(text) <= _QUOTED else f"{text[:_QUOTED]!r}..."


def _require_object(row: Any, column: str) -> None:
    if not isinstance(row, Mapping):
        raise RowError(column, "null" if row is None else f"expected an object, got {type(row).__name__}")


def _bad(name: str, column: str, problem: str) -> RowError:
    return RowError(f"{column}.{name}" if column else name, problem)

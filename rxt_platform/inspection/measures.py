"""What is in a source of rows: files, columns, row kinds, conversations, and how long everything is.

One pass in bounded memory: lengths are kept as counts (`Lengths`), columns up to a fixed number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rxt_platform.data.corpus import groups_of_rows
from rxt_platform.data.rows import Conversation, Interaction, PreferenceEpisode, Row, RowError
from rxt_platform.data.sources import PlacedRow
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import DataError
from rxt_platform.inspection.parts import Part, until_damage

Unit = Literal["characters", "words", "tokens"]
WHOLE = "interaction"
"""The field that stands for all texts of an interaction together; in tokens, as the window has to hold it."""

_EXACT_BITS = 14  # lengths below 2^14 are counted one by one, longer ones by their first 14 bits: 0.01 % off at most
_MOST_REASONS = 1000  # that are counted apart: damaged data may have as many as rows
_MOST_COLUMNS = 200  # paths; damaged data may have as many as rows
_DEPTH = 4  # of objects inside objects
_TYPES = {str: "text", bool: "bool", int: "int", float: "float", list: "list", dict: "object", type(None): "null"}


class Lengths:
    """Many lengths as counts: number, sum and extremes are exact, quantiles to 0.01 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.number = self.total = self.longest = 0
        self.shortest: int | None = None

    def add(self, length: int) -> None:
        """Count one length."""
        dropped = max(0, length.bit_length() - _EXACT_BITS)
        self._counts[length >> dropped << dropped] += 1
        self.number += 1
        self.total += length
        self.longest = max(self.longest, length)
        self.shortest = length if self.shortest is None else min(self.shortest, length)

    @property
    def mean(self) -> float:
        """0 where nothing was counted."""
        return self.total / max(self.number, 1)

    def quantile(self, share: float) -> int:
        """The smallest length that `share` of all do not exceed; 0 where nothing was counted."""
        seen = 0
        for length in sorted(self._counts):
            seen += self._counts[length]
            if seen >= share * self.number:
                return length
        return 0

    @property
    def span(self) -> int:
        """How far to draw: past the longest, but of a long thin tail only past the shortest 99 %."""
        most = self.quantile(0.99)
        return max(1, (self.longest if self.longest <= 2 * most else most) + 1)

    def histogram(self, bins: int, width: int) -> NDArray[np.int64]:
        """Counts int64 [bins], from 0, of the lengths below `bins * width`."""
        lengths = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.int64, count=len(self._counts))
        inside = lengths < bins * width
        return np.bincount(lengths[inside] // width, weights=counts[inside], minlength=bins).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """The figures that are shown, and the counts by length."""
        return {
            "number": self.number,
            "mean": self.mean,
            "min": self.shortest or 0,
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": self.longest,
            "counts": dict(sorted(self._counts.items())),
        }


def unit_of(lengths: Mapping[Unit, Lengths]) -> Unit:
    """The unit to draw: tokens where they were counted, else words."""
    return "tokens" if "tokens" in lengths else "words"


class Columns:
    """Which columns objects have, those inside them included (`interactions[].query`): types, nulls, absences."""

    def __init__(self) -> None:
        self._types: dict[str, Counter[str]] = {}
        self._objects: Counter[str] = Counter()
        self.not_counted = 0
        """Values of columns past the first 200."""

    def add(self, value: Mapping[Any, Any], path: str = "", depth: int = 0) -> None:
        """Count an object's columns; `path` ends with the dot before their names."""
        self._objects[path] += 1
        for name, content in value.items():
            inside = f"{path}{name}"
            types = self._types.get(inside)
            if types is None:
                if len(self._types) >= _MOST_COLUMNS:
                    self.not_counted += 1
                    continue
                types = self._types[inside] = Counter()
            types[_TYPES.get(type(content), type(content).__name__)] += 1
            if depth == _DEPTH:
                continue
            if isinstance(content, Mapping):
                self.add(content, f"{inside}.", depth + 1)
            elif isinstance(content, list):
                for item in content:
                    if isinstance(item, Mapping):
                        self.add(item, f"{inside}[].", depth + 1)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """For each column its types with their counts, how many are null, and how many objects lack it."""
        listed = {}
        for path, types in self._types.items():
            parent = path[: max(path.rfind("."), -1) + 1]
            present = {name: count for name, count in types.most_common() if name != "null"}
            missing = max(0, self._objects[parent] - types.total())
            listed[path] = {"types": present, "null": types["null"], "missing": missing}
        return listed


@dataclass
class FileCounts:
    """One file, or a split of a data set."""

    name: str
    format: str = ""
    kind: str | None = None
    size: int | None = None  # bytes on the disk
    rows: int = 0
    bad: int = 0
    damage: str = ""
    """Why it can't be read, or not to its end."""


@dataclass
class Inspection:
    """What was found in a part."""

    part: Part
    files: list[FileCounts] = field(default_factory=list)
    columns: Columns = field(default_factory=Columns)
    interactions: int = 0
    turns: Lengths = field(default_factory=Lengths)  # of each conversation
    questions: Counter[str] = field(default_factory=Counter)  # that have an answer key, by task
    lengths: dict[str, dict[Unit, Lengths]] = field(default_factory=dict)  # by field
    reasons: Counter[str] = field(default_factory=Counter)
    window: int | None = None
    rows_over: int = 0  # with an interaction (or a text) of more tokens than the window
    interactions_over: int = 0

    @property
    def rows(self) -> int:
        """All rows, bad ones included."""
        return sum(file.rows for file in self.files)

    @property
    def bad(self) -> int:
        """Rows that can't be used."""
        return sum(file.bad for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        lengths = {name: {unit: one.to_json() for unit, one in of.items()} for name, of in self.lengths.items()}
        over = {"window": self.window, "rows": self.rows_over, "interactions": self.interactions_over}
        return {
            "source": self.part.name,
            "sections": list(self.part.sections),
            "rows": self.rows,
            "bad": self.bad,
            "interactions": self.interactions,
            "turns": self.turns.to_json() if self.turns.number else None,
            "questions": dict(self.questions.most_common()),
            "over_window": over if self.window is not None else None,
            "files": [vars(file) for file in self.files],
            "columns": self.columns.to_json(),
            "bad_reasons": dict(self.reasons.most_common()),
            "lengths": lengths,
        }


def inspect_part(
    part: Part,
    tokenizer: RxtTokenizer | None = None,
    window: int | None = None,
    limit: int | None = None,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Inspection:
    """Read a part, or its first `limit` rows, and measure it; `on_rows` hears how many rows were read so far.

    Raises DataError when nothing is there, or no file of it can be read.
    """
    found = Inspection(part, window=window)
    limits = [one for one in (limit, getattr(part.source, "max_rows", None)) if one is not None]
    for place in part.places():
        if limits and found.rows >= min(limits):
            break
        left = min(limits) - found.rows if limits else None
        damage: list[str] = []
        file = FileCounts(place.label)
        found.files.append(file)
        for group in groups_of_rows(until_damage(islice(_read(found, file, place), left), damage)):
            _measure(found, [row.row for row in group if row.row is not None], tokenizer)
            on_rows(found.rows)
        file.damage = "".join(damage)
    if found.files and not found.rows:
        raise DataError(found.files[0].damage or f"{part.name}: it holds no rows")
    return found


def texts_of(turn: Interaction) -> list[tuple[str, str]]:
    """The texts of an interaction with their fields' names, in the order in which they are said."""
    fields = [("internal", turn.internal), ("tool_use" if turn.from_tool else "query", turn.query)]
    fields += [("think", turn.think), ("answer", turn.answer), ("tool_call", turn.tool_call)]
    return [(name, text) for name, text in fields if text]


def interactions_of(row: Row) -> list[tuple[str, Interaction]]:
    """A row's interactions, none of a text; a preference turn has one for each reply, after the name of the choice."""
    if isinstance(row, Conversation):
        return [("", turn) for turn in row.interactions]
    if isinstance(row, PreferenceEpisode):
        choices = ("accepted", "rejected", "neutral")
        replies = ((choice, getattr(turn, choice)) for turn in row.turns for choice in choices)
        return [(choice, reply) for choice, reply in replies if reply is not None]
    return []


def count_reason(reasons: Counter[str], problem: RowError) -> None:
    """Count why a row is bad, without what only that row says."""
    column = re.sub(r"\[\d+\]", "[]", problem.column)
    reason = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", problem.reason)
    reason = re.sub(r"(?<![\w+.])\d[\d,]*", "N", reason)
    said = f"column '{column}': {reason}" if column else f"row: {reason}"
    reasons[said if said in reasons or len(reasons) < _MOST_REASONS else "other reasons"] += 1


def _read(found: Inspection, file: FileCounts, place: Part) -> Iterator[PlacedRow]:
    """A file's rows, counted with their columns. Raises DataError."""
    opened = place.open()
    file.format, file.kind, file.size = opened.format, opened.kind, opened.size
    for raw, placed in opened.rows:
        file.rows += 1
        if raw is not None and isinstance(raw.value, Mapping):
            found.columns.add(raw.value)
        if placed.problem is not None:
            file.bad += 1
            count_reason(found.reasons, placed.problem)
        yield placed


def _measure(found: Inspection, rows: list[Row], tokenizer: RxtTokenizer | None) -> None:
    """Count the lengths in some rows."""
    texts = [text for row in rows for text in _texts(row)]
    tokens = map(len, tokenizer.encode_all(texts)) if tokenizer is not None else repeat(None)
    for row in rows:
        if isinstance(row, str):
            found.rows_over += _count(found, "text", [_sizes(row, next(tokens))], markers=2)
            continue
        over = 0
        if isinstance(row, Conversation) and row.system:
            over += _count(found, "system", [_sizes(row.system, next(tokens))], markers=3)
        for choice, turn in interactions_of(row):
            sizes = []
            for name, text in texts_of(turn):
                sizes.append(_sizes(text, next(tokens)))
                reply = name in ("think", "answer", "tool_call")
                if choice in ("", "accepted") or reply:  # what was said before the replies is the same for all
                    _count(found, f"{choice}.{name}" if choice and reply else name, sizes[-1:])
            over += _count(found, WHOLE, sizes, markers=2 + len(sizes))
            if turn.recall is not None and choice in ("", "accepted"):
                found.questions[turn.recall.task] += 1
        turns = len(row.turns if isinstance(row, PreferenceEpisode) else row.interactions)
        found.interactions += turns
        found.turns.add(turns)
        found.rows_over += over > 0
        found.interactions_over += over


def _texts(row: Row) -> list[str]:
    if isinstance(row, str):
        return [row]
    system = [row.system] if isinstance(row, Conversation) and row.system else []
    return [*system, *(text for _, turn in interactions_of(row) for _, text in texts_of(turn))]


def _sizes(text: str, tokens: int | None) -> dict[Unit, int]:
    sizes: dict[Unit, int] = {"characters": len(text), "words": len(text.split())}
    return sizes if tokens is None else {**sizes, "tokens": tokens}


def _count(found: Inspection, name: str, sizes: Sequence[dict[Unit, int]], markers: int = 0) -> bool:
    """Count texts as one length of a field; whether it and its `markers` are more tokens than the window."""
    lengths = found.lengths.setdefault(name, {unit: Lengths() for unit in sizes[0]})
    tokens = 0
    for unit, one in lengths.items():
        length = sum(size[unit] for size in sizes)
        if unit == "tokens":
            length = tokens = length + markers
        one.add(length)
    return found.window is not None and tokens > found.window

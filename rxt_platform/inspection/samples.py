"""Some rows of a source to read: a fair sample of all of them, or the first ones, as lines of a dialogue."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rxt_platform.config.data import DataConfig, Task
from rxt_platform.data.rows import Conversation, Interaction, PreferenceEpisode, Recall, Row, row_to_json
from rxt_platform.data.sources import SECTIONS, SPLITS, PlacedRow, read_source, section_sources
from rxt_platform.data.story_tasks import MAX_TURNS, MIN_TURNS
from rxt_platform.data.story_world import TASKS, Split, StoryWorld
from rxt_platform.errors import ConfigError, DataError
from rxt_platform.inspection.parts import Part


@dataclass(frozen=True)
class Line:
    """What one side says, and what the answer key says of it."""

    speaker: str
    text: str
    note: str = ""


def sample(rows: Iterable[PlacedRow], count: int, seed: int | None) -> list[PlacedRow]:
    """`count` of the usable rows in their order, each as likely as any other; without a seed, the first ones.

    One pass that keeps `count` rows (reservoir sampling, Vitter's algorithm R). Raises DataError when there are none.
    """
    kept: list[tuple[int, PlacedRow]] = []
    dice = random.Random(seed)
    usable = 0
    problem = ""
    for row in rows:
        if row.row is None:
            problem = problem or f"{row.file}:{row.number}: {row.problem}"
            continue
        usable += 1
        if len(kept) < count:
            kept.append((usable, row))
        elif (place := dice.randrange(usable)) < count:
            kept[place] = (usable, row)
        if seed is None and len(kept) == count:
            break
    if not kept:
        raise DataError(f"no usable row to show; the first bad one: {problem}" if problem else "no row to show")
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def sample_part(part: Part, count: int, seed: int | None) -> list[PlacedRow]:
    """Rows of a source that was named. Raises DataError."""
    return sample((row for place in part.places() for _, row in place.open().rows), count, seed)


def sample_run(data: DataConfig, split: Split, count: int, seed: int | None) -> list[tuple[str, list[PlacedRow]]]:
    """Rows of each section of a run, from all of its sources, as the run reads them. Raises DataError."""
    found: list[tuple[str, list[PlacedRow]]] = []
    for section in SECTIONS:
        sources = section_sources(data, section)
        if sources:
            rows = (row for source in sources for row in read_source(data, section, source, split))
            found.append((section, sample(rows, count, seed)))
    return found


def sample_world(seed: int, split: str, count: int, turns: int, tasks: Sequence[str]) -> list[PlacedRow]:
    """The first conversations of a story world. Raises ConfigError for what it does not have."""
    chosen = split_named(split)
    if not MIN_TURNS <= turns <= MAX_TURNS:
        raise ConfigError(f"--turns {turns}: conversations have {MIN_TURNS} to {MAX_TURNS} turns")
    known: list[Task] = [task for task in TASKS if task in tasks]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f"--tasks: unknown task {unknown[0]!r}; tasks: {', '.join(TASKS)}")
    try:
        talks = StoryWorld(seed).conversations(chosen, count, turns, known)
    except ValueError as error:  # tasks that need more turns
        raise ConfigError(f"--tasks {','.join(tasks)} --turns {turns}: {error}") from None
    return [PlacedRow("story_world", number, talk) for number, talk in enumerate(talks, start=1)]


def split_named(name: str) -> Split:
    """The split of a run or the story world. Raises ConfigError."""
    for split in SPLITS:
        if split == name:
            return split
    raise ConfigError(f"--split {name}: there are {' and '.join(SPLITS)}")


def lines_of(row: Row) -> list[Line]:
    """A row as a dialogue; a text as its one line."""
    if isinstance(row, str):
        return [Line("", row)]
    if isinstance(row, Conversation):
        system = [Line("system", row.system)] if row.system else []
        return [*system, *(line for turn in row.interactions for line in _said(turn) + _replied(turn, "model"))]
    assert isinstance(row, PreferenceEpisode)
    lines = []
    for turn in row.turns:
        lines += _said(turn.accepted) + _replied(turn.accepted, "accepted") + _replied(turn.rejected, "rejected")
        lines += _replied(turn.neutral, "neutral") if turn.neutral is not None else []
    return lines


def sample_to_json(section: str | None, placed: PlacedRow) -> dict[str, Any]:
    """A row with its place."""
    assert placed.row is not None
    place = {} if section is None else {"section": section}
    return {**place, "file": placed.file, "row": placed.number, "content": row_to_json(placed.row)}


def _said(turn: Interaction) -> list[Line]:
    internal = [Line("internal", turn.internal)] if turn.internal else []
    return [*internal, Line("tool" if turn.from_tool else "user", turn.query, _note(turn.recall))]


def _replied(turn: Interaction, speaker: str) -> list[Line]:
    parts = (("think", turn.think), (speaker, turn.answer), ("call", turn.tool_call))
    return [Line(name, text) for name, text in parts if text]


def _note(recall: Recall | None) -> str:
    """An answer key in words."""
    if recall is None:
        return ""
    spans = ", ".join(f"'{span}'" for span in recall.spans)
    far = f"{recall.distance} turn{'s' if recall.distance > 1 else ''} back"
    return f"{recall.task}: {spans}, {far}{', long range' if recall.long_range else ''}"

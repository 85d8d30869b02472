"""Validation without an artifact: every row that can't be used, and every training row that repeats a held-out one.

A source that somebody names is checked file by file. A run's sources are checked as `build_corpus` would, split by
split, and judged by the run's own policies (`data.validation`), but nothing is written and one bad source does not hide
the next. Memory grows with the held-out rows alone.
"""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from rxt_platform.config.data import DataConfig, RowsSource, Section, ValidationConfig
from rxt_platform.data.corpus import groups_of_rows, turns_of_its_own
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.leakage import HeldOutIndex, words_key
from rxt_platform.data.rows import Conversation, Interaction, PreferenceEpisode, Row, RowError
from rxt_platform.data.sources import SECTIONS, SPLITS, PlacedRow, read_source, section_sources
from rxt_platform.data.story_world import Split
from rxt_platform.inspection.measures import count_reason, interactions_of, texts_of
from rxt_platform.inspection.parts import Part, source_name, until_damage

_BUCKETS = 64
_KEPT = 1 << 20  # fingerprints in memory (8 MB); more go to temporary files


@dataclass(frozen=True)
class Finding:
    """A row that can't be used or repeats a held-out one, or (`number` 0) a file that can't be read."""

    file: str
    number: int
    problem: RowError
    raw: str = ""
    section: str | None = None
    split: str | None = None
    repeats: bool = False

    def __str__(self) -> str:
        column = f":{self.problem.column}" if self.problem.column else ""
        return f"{self.file}:{self.number}{column}: {self.problem.reason}" if self.number else self.problem.reason

    def to_json(self) -> dict[str, Any]:
        """As a line of `bad_rows.jsonl`."""
        entry = {"file": self.file, "row": self.number, "column": self.problem.column, "reason": self.problem.reason}
        place = {} if self.section is None else {"section": self.section, "split": self.split}
        return {**place, **entry, "content": self.raw}


@dataclass
class Checked:
    """A source, or a split of one, and what its check found."""

    name: str
    section: str | None = None
    split: str | None = None
    rows: int = 0
    bad: int = 0
    unreadable: int = 0  # files
    duplicates: int = 0  # of held-out rows, exact
    near_duplicates: int = 0
    repeated: int = 0  # rows that say the same as an earlier one of this source
    too_long: int = 0  # of the bad ones
    cut: int = 0  # interactions that a run cuts at the window, by its policy
    follow_ups: int = 0  # rows of several turns
    refused: list[str] = field(default_factory=list)
    """Why a run would not go on."""

    @property
    def repeats(self) -> int:
        """Rows that repeat held-out ones."""
        return self.duplicates + self.near_duplicates


class Validation:
    """A check under way: its generators give the findings as they come, and the attributes add up."""

    def __init__(self, encoder: RowEncoder | None = None, on_rows: Callable[[int], object] = lambda rows: None) -> None:
        """With an `encoder`, rows that don't fit its window are bad, unless its policy is to cut them.

        `on_rows` hears how many rows were checked so far.
        """
        self._on_rows = on_rows
        self.encoder = encoder
        self.checked: list[Checked] = []
        self.reasons: Counter[str] = Counter()
        self._keeps_repeats = False

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(one.rows for one in self.checked)

    @property
    def bad(self) -> int:
        """Rows that can't be used."""
        return sum(one.bad for one in self.checked)

    @property
    def unreadable(self) -> int:
        """Files, or a run's sources, that can't be read to their end."""
        return sum(one.unreadable for one in self.checked)

    def source(self, part: Part, held_out: Part | None = None) -> Iterator[Finding]:
        """Check a source, against another one. Raises DataError when nothing is there."""
        index = _HeldOut(ValidationConfig().near_duplicate)
        for one in (held_out, part):
            if one is not None:
                checked, said = self._start(one.name), _Repeats()
                for place in one.places():
                    yield from self._check(_opened(place), checked, said, index if held_out else None, one is held_out)
                checked.repeated = said.count()

    def run(self, data: DataConfig) -> Iterator[Finding]:
        """Check all sources of a run and judge them."""
        self._keeps_repeats = data.validation.duplicates == "keep"
        indexes = {section: _HeldOut(data.validation.near_duplicate) for section in SECTIONS}
        for split in reversed(SPLITS):  # held-out rows first: training rows are compared with them
            for section in SECTIONS:
                for source in section_sources(data, section):
                    checked, said = self._start(source_name(source, split), section, split), _Repeats()
                    rows = read_source(data, section, source, split)
                    compared = indexes[section] if isinstance(source, RowsSource) else None
                    if (section, split) == ("conversations", "validation") and compared is not None:
                        rows = indexes["interactions"].with_turns(rows)
                    yield from self._check(rows, checked, said, compared, split == "validation")
                    checked.repeated = said.count()
                    checked.refused += _refusals(checked, data.validation)
                self._judge_split(section, split, data.validation)

    def _start(self, name: str, section: str | None = None, split: str | None = None) -> Checked:
        self.checked.append(Checked(name, section, split))
        return self.checked[-1]

    def _check(
        self, rows: Iterator[PlacedRow], checked: Checked, said: _Repeats, index: _HeldOut | None, held_out: bool
    ) -> Iterator[Finding]:
        """Some rows of a source: `held_out` ones are taken into the index, the others compared with it."""
        damage: list[str] = []
        for group in groups_of_rows(until_damage(rows, damage)):
            checked.rows += len(group)
            self._on_rows(self.rows)
            for row in group:
                if row.problem is not None:
                    yield self._bad(row, row.problem, checked)
            good = [(row, row.row) for row in group if row.row is not None]
            texts = [_text_of(row) for _, row in good]
            for text in texts:
                said.add(text)
            if index is not None and held_out:
                index.add([placed for placed, _ in good], texts)
            elif index is not None:
                problems = index.find(texts, checked)
                for (placed, _), problem in zip(good, problems, strict=True):
                    if problem is not None:
                        yield self._finding(placed, problem, checked, repeats=True)
                if not self._keeps_repeats:
                    good = [pair for pair, problem in zip(good, problems, strict=True) if problem is None]
            checked.follow_ups += sum(isinstance(row, Conversation) and len(row.interactions) > 1 for _, row in good)
            yield from self._fit(good, checked)
        for reason in damage:
            checked.unreadable += 1
            yield Finding(checked.name, 0, RowError("", reason), "", checked.section, checked.split)

    def _fit(self, good: list[tuple[PlacedRow, Row]], checked: Checked) -> Iterator[Finding]:
        """Rows that are too long for the window."""
        if self.encoder is None:
            return
        parts = [(placed, part) for placed, row in good for part in _for_window(row)]
        over: PlacedRow | None = None
        for (placed, part), made in zip(parts, self.encoder.encode([part for _, part in parts]), strict=True):
            if not isinstance(made, RowError):
                cut = sum(example.truncated or example.queries_cut for example in made)
                checked.cut += cut if isinstance(part, Conversation) else 0
            elif placed is not over:
                over = placed
                checked.too_long += 1
                yield self._bad(placed, made, checked)

    def _bad(self, row: PlacedRow, problem: RowError, checked: Checked) -> Finding:
        checked.bad += 1
        count_reason(self.reasons, problem)
        return self._finding(row, problem, checked)

    def _finding(self, row: PlacedRow, problem: RowError, checked: Checked, repeats: bool = False) -> Finding:
        raw = row.raw if row.row is None else row.failed(problem).raw
        return Finding(row.file, row.number, problem, raw, checked.section, checked.split, repeats)

    def _judge_split(self, section: Section, split: Split, policy: ValidationConfig) -> None:
        """A section needs rows in both splits, the conversations' need follow-ups, and few may be too long."""
        sources = [one for one in self.checked if (one.section, one.split) == (section, split)]
        if not sources or any(one.unreadable for one in sources):
            return
        dropped = sum(one.repeats for one in sources) if policy.duplicates == "drop" else 0
        too_long = sum(one.too_long for one in sources)
        kept = sum(one.rows - one.bad for one in sources) + too_long - dropped  # what the tokens step is given
        if not kept:
            sources[-1].refused.append(f"data.{section}: no {split} rows are left")
        elif section == "conversations" and not any(one.follow_ups for one in sources):
            sources[-1].refused.append(f"data.conversations: no {split} row has a follow-up interaction")
        if too_long and policy.too_long == "fail":
            sources[-1].refused.append("rows are too long, and data.validation.too_long is fail")
        elif too_long and (too_long > policy.max_bad_share * kept or too_long == kept):
            share = f"data.validation.max_bad_share {policy.max_bad_share:g}"
            sources[-1].refused.append(f"{too_long} of {kept} rows are too long, more than {share}")


def _refusals(checked: Checked, policy: ValidationConfig) -> list[str]:
    """Why a run would not go on after this source."""
    found = []
    bad = checked.bad - checked.too_long
    if checked.unreadable:
        found.append("can't be read")
    if bad and policy.bad_rows == "fail":
        found.append("rows are bad, and data.validation.bad_rows is fail")
    elif bad > policy.max_bad_share * checked.rows:
        found.append(
            f"{bad} of {checked.rows} rows are bad, more than data.validation.max_bad_share {policy.max_bad_share:g}"
        )
    if checked.repeats and policy.duplicates == "fail":
        found.append("rows repeat held-out ones, and data.validation.duplicates is fail")
    return found


def _opened(place: Part) -> Iterator[PlacedRow]:
    for _, placed in place.open().rows:
        yield placed


def _text_of(row: Row) -> str:
    """All texts of a row, as the corpus compares them."""
    if isinstance(row, str):
        return row
    return "\n".join(text for _, turn in interactions_of(row) for _, text in texts_of(turn))


def _for_window(row: Row) -> list[Row]:
    """What of a row the window has to hold: of a preference episode the replies of each choice."""
    if not isinstance(row, PreferenceEpisode):
        return [row]
    by_choice: dict[str, list[Interaction]] = {}
    for choice, reply in interactions_of(row):
        by_choice.setdefault(choice, []).append(reply)
    return [Conversation(tuple(replies)) for replies in by_choice.values()]


class _HeldOut:
    """Held-out rows with their places."""

    def __init__(self, threshold: float) -> None:
        self._index = HeldOutIndex(threshold=threshold)
        self._places: list[str] = []

    def add(self, rows: list[PlacedRow], texts: list[str]) -> None:
        self._index.add(texts)
        self._places += [f"{row.file}:{row.number}" for row in rows]

    def with_turns(self, rows: Iterator[PlacedRow]) -> Iterator[PlacedRow]:
        """Conversations as they pass, their turns added: interactions must not repeat those either."""
        for row in rows:
            if isinstance(row.row, Conversation):
                texts = turns_of_its_own(row.row)
                self._index.add(texts)
                self._places += [f"{row.file}:{row.number}"] * len(texts)
            yield row

    def find(self, texts: list[str], checked: Checked) -> list[RowError | None]:
        """For each text which held-out row it repeats; counted in `checked`."""
        found: list[RowError | None] = []
        for duplicate in self._index.find(texts):
            if duplicate is None:
                found.append(None)
                continue
            checked.duplicates += duplicate.exact
            checked.near_duplicates += not duplicate.exact
            found.append(duplicate.of(self._places[duplicate.row]))
        return found


class _Repeats:
    """Counts texts that were said before, word for word, in bounded memory: keys beyond a million go to the disk."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._buckets: list[IO[bytes]] = []

    def add(self, text: str) -> None:
        if (key := words_key(text)) is not None:
            self._keys.append(key)
            if len(self._keys) >= _KEPT:
                self._spill()

    def count(self) -> int:
        """How many of all texts repeat an earlier one."""
        if not self._buckets:
            return len(self._keys) - len(set(self._keys))
        self._spill()
        repeated = 0
        for bucket in self._buckets:
            bucket.seek(0)
            keys = np.frombuffer(bucket.read(), dtype=np.uint64)
            repeated += keys.size - np.unique(keys).size
            bucket.close()
        return repeated

    def _spill(self) -> None:
        self._buckets = self._buckets or [tempfile.TemporaryFile() for _ in range(_BUCKETS)]  # noqa: SIM115 - open until counted
        keys = np.frombuffer(self._keys, dtype=np.uint64)
        for number, bucket in enumerate(self._buckets):
            bucket.write(keys[keys % _BUCKETS == number].tobytes())
        self._keys = array("Q")

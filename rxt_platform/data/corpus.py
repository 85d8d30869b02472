"""The corpus of a run: validated rows as Parquet, one artifact that tokenizer, token shards and evaluation read.

    texts.{train,validation}.parquet · interactions.… · conversations.…
    bad_rows.jsonl     every row that was set aside or dropped: section, split, file, row, column, reason, content
    validation.json    counts for each section, split and source

Rows stream from their sources into row groups of a few MiB, so memory does not grow with the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rxt_platform.config.data import DataConfig, RowsSource, Section, ValidationConfig
from rxt_platform.data.leakage import HeldOutIndex
from rxt_platform.data.raw import RAW_CHARACTERS
from rxt_platform.data.rows import Conversation, Interaction, Recall, Row, RowError
from rxt_platform.data.sources import SECTIONS, SPLITS, PlacedRow, read_source, section_sources
from rxt_platform.data.story_world import Split
from rxt_platform.errors import DataError

BAD_ROWS = "bad_rows.jsonl"
VALIDATION = "validation.json"
_GROUP_BYTES = 8 * 2**20
_GROUP_ROWS = 20_000
_CHECKED_AT_ONCE = 1000  # rows, against the held-out ones,
_CHECKED_BYTES = 2**20  # fewer where they are long: while they are checked, their words take twenty times as much
_SHOWN = 5  # bad rows in an error message
_WORDS_OF_ITS_OWN = 8  # of a turn that can be told from small talk
_COUNTED_APART = 1000  # reasons for bad rows: some name a position, so that there may be as many as rows

_PLACE = [("source", pa.int16()), ("file", pa.dictionary(pa.int32(), pa.string())), ("row", pa.int64())]
_INTERACTION = pa.struct(
    [
        ("query", pa.string()),
        ("answer", pa.string()),
        ("hybrid", pa.bool_()),
        ("from_tool", pa.bool_()),
        ("internal", pa.string()),
        ("think", pa.string()),
        ("tool_call", pa.string()),
        (
            "recall",
            pa.struct(
                [
                    ("spans", pa.list_(pa.string())),
                    ("distance", pa.int32()),
                    ("long_range", pa.bool_()),
                    ("task", pa.string()),
                ]
            ),
        ),
    ]
)
_TEXTS = pa.schema([*_PLACE, ("text", pa.large_string())])
_CONVERSATIONS = pa.schema([*_PLACE, ("system", pa.string()), ("interactions", pa.list_(_INTERACTION))])


@dataclass
class SourceCounts:
    """What became of the rows of one source and split."""

    rows: int = 0
    kept: int = 0
    duplicates: int = 0  # of held-out rows, exact
    near_duplicates: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # by column and reason

    def to_json(self) -> dict[str, Any]:
        """As `validation.json` holds it."""
        return {**vars(self), "bad": dict(self.bad.most_common())}


def build_corpus(config: DataConfig, directory: Path) -> dict[str, float]:
    """Read, validate and write all rows of a run. Returns counts.

    Raises DataError that names file, row, column and reason of bad rows, unless they are to be quarantined.
    """
    counts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    totals: Counter[str] = Counter()
    with (directory / BAD_ROWS).open("w", encoding="utf-8") as bad:
        builds = {
            section: _SectionBuild(config, section, directory, bad)
            for section in SECTIONS
            if section_sources(config, section)
        }
        for split in reversed(SPLITS):  # held-out rows first: training rows are compared with them
            if split == "train" and "interactions" in builds:
                builds["interactions"].hold_out_turns()
            for section, build in builds.items():
                of_sources = build.split(split)
                counts.setdefault(section, {})[split] = [one.to_json() for one in of_sources]
                totals[f"{section}_{split}"] = sum(one.kept for one in of_sources)
                totals["bad_rows"] += sum(one.bad.total() for one in of_sources)
                totals["duplicates"] += sum(one.duplicates for one in of_sources)
                totals["near_duplicates"] += sum(one.near_duplicates for one in of_sources)
    (directory / VALIDATION).write_text(json.dumps(counts, indent=2, ensure_ascii=False))
    return dict(totals)


@dataclass(frozen=True)
class CorpusRow:
    """A row of the corpus and where it came from."""

    source: int
    file: str
    number: int
    row: Row


def part_path(directory: Path, section: Section, split: Split) -> Path:
    """The Parquet file of a section's split."""
    return directory / f"{section}.{split}.parquet"


def read_rows(directory: Path, section: Section, split: Split, groups: range | None = None) -> Iterator[CorpusRow]:
    """Rows of a corpus in their order, or of some row groups only."""
    with pq.ParquetFile(part_path(directory, section, split), memory_map=True, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups) if groups is None else groups:
            for value in file.read_row_group(group).to_pylist():
                yield CorpusRow(value["source"], value["file"], value["row"], _row_of(value))


def read_conversations(directory: Path, split: Split) -> Iterator[Conversation]:
    """The conversations of a corpus, in their order."""
    for one in read_rows(directory, "conversations", split):
        assert isinstance(one.row, Conversation)
        yield one.row


def training_texts(directory: Path, most_bytes: int) -> Iterator[str]:
    """Training texts, queries and answers, evenly taken from all of them where they are more than `most_bytes`."""
    sizes = {section: row_groups(directory, section, "train") for section in SECTIONS}
    share = min(1.0, most_bytes / max(1, sum(map(sum, sizes.values()))))
    for section, groups in sizes.items():
        taken = [i for i in range(len(groups)) if int((i + 1) * share) > int(i * share) or share == 1.0]
        for group in taken or range(min(1, len(groups))):
            for one in read_rows(directory, section, "train", range(group, group + 1)):
                if isinstance(one.row, Conversation) and one.row.system:
                    yield one.row.system
                yield from row_texts(one.row)


def row_groups(directory: Path, section: Section, split: Split) -> list[int]:
    """Uncompressed bytes of each row group; empty when the corpus has no such part."""
    path = part_path(directory, section, split)
    if not path.exists():
        return []
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def row_texts(row: Row) -> Iterator[str]:
    """Every text of a row but a system prompt, which many rows may share: what tokenizer and leakage check read."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, Conversation):
        for turn in row.interactions:
            yield from (text for text in (turn.internal, turn.query, turn.think, turn.answer, turn.tool_call) if text)


def turns_of_its_own(talk: Conversation) -> list[str]:
    """The texts of a conversation's turns, without those of a few words, such as greetings."""
    texts = ["\n".join(row_texts(Conversation((turn,)))) for turn in talk.interactions]
    return [text for text in texts if len(text.split()) >= _WORDS_OF_ITS_OWN]


class _SectionBuild:
    """One section: both splits of all its sources."""

    def __init__(self, config: DataConfig, section: Section, directory: Path, bad: Any) -> None:
        self.config, self.section, self.directory, self.bad = config, section, directory, bad
        self.policy: ValidationConfig = config.validation
        self.held_out = HeldOutIndex(threshold=config.validation.near_duplicate)
        self.held_places: list[str] = []

    def split(self, split: Split) -> list[SourceCounts]:
        """Write one split. Raises DataError when nothing is left of it."""
        schema = _TEXTS if self.section == "texts" else _CONVERSATIONS
        counts = []
        follow_ups = 0
        with _Writer(part_path(self.directory, self.section, split), schema) as writer:
            for number, source in enumerate(section_sources(self.config, self.section)):
                one = SourceCounts()
                rows = read_source(self.config, self.section, source, split)
                checked = self._compared(rows, split, one) if isinstance(source, RowsSource) else rows
                for row in self._usable(checked, split, one):
                    assert row.row is not None
                    follow_ups += isinstance(row.row, Conversation) and len(row.row.interactions) > 1
                    writer.add(number, row)
                counts.append(one)
        kept = sum(one.kept for one in counts)
        if not kept:
            raise DataError(f"data.{self.section}: no {split} rows are left: {_why_none(counts, split)}")
        if self.section == "conversations" and not follow_ups:
            raise DataError(
                f"data.conversations: no {split} row has a follow-up interaction: column 'interactions' is needed"
            )
        return counts

    def hold_out_turns(self) -> None:
        """Remember the turns of held-out conversations too: recall is measured on them, so no stage may train on one.

        Turns of a few words, such as greetings, are everybody's.
        """
        sources = section_sources(self.config, "conversations")
        for one in read_rows(self.directory, "conversations", "validation"):
            if not isinstance(sources[one.source], RowsSource):
                continue
            assert isinstance(one.row, Conversation)
            texts = turns_of_its_own(one.row)
            self.held_out.add(texts)
            self.held_places += [f"{one.file}:{one.number}"] * len(texts)

    def _usable(self, rows: Iterator[PlacedRow], split: Split, counts: SourceCounts) -> Iterator[PlacedRow]:
        """The good rows; bad ones are written aside, and counted against the policy."""
        shown: list[str] = []
        for row in rows:
            counts.rows += 1
            if row.problem is None:
                counts.kept += 1
                yield row
                continue
            reason = str(row.problem)
            counts.bad[reason if reason in counts.bad or len(counts.bad) < _COUNTED_APART else "other reasons"] += 1
            self._set_aside(row, split, row.problem)
            if len(shown) < _SHOWN:
                shown.append(f"{row.file}:{row.number}: {row.problem}")
            elif self.policy.bad_rows == "fail":  # enough to mend: the rest is not read
                self._judge(counts, [*shown, "and more"])
        if counts.bad:
            self._judge(counts, shown)

    def _judge(self, counts: SourceCounts, shown: list[str]) -> None:
        bad = counts.bad.total()
        more = f" (and {bad - _SHOWN} more)" if bad > _SHOWN and len(shown) == _SHOWN else ""
        listed = "; ".join(shown) + more
        if self.policy.bad_rows == "fail":
            raise DataError(f"{listed}: mend them, or set them aside with data.validation.bad_rows=quarantine")
        if bad > self.policy.max_bad_share * counts.rows:
            raise DataError(
                f"{bad} of {counts.rows} rows are bad, more than data.validation.max_bad_share "
                f"{self.policy.max_bad_share:g}: {listed}"
            )

    def _compared(self, rows: Iterator[PlacedRow], split: Split, counts: SourceCounts) -> Iterator[PlacedRow]:
        """Held-out rows are remembered; training rows that repeat one are dropped, as the policy says."""
        for group in groups_of_rows(rows):
            good = [row for row in group if row.row is not None]
            texts = ["\n".join(row_texts(row.row)) for row in good if row.row is not None]
            if split == "validation":
                self.held_out.add(texts)
                self.held_places += [f"{row.name}:{row.number}" for row in good]
                yield from group
                continue
            found = iter(self.held_out.find(texts))
            for row in group:
                duplicate = next(found) if row.row is not None else None
                if duplicate is None:
                    yield row
                    continue
                counts.duplicates += duplicate.exact
                counts.near_duplicates += not duplicate.exact
                problem = duplicate.of(self.held_places[duplicate.row])
                if self.policy.duplicates == "fail":
                    raise DataError(
                        f"{row.file}:{row.number}: {problem}: data.validation.duplicates=drop leaves it out"
                    )
                if self.policy.duplicates == "keep":
                    yield row
                    continue
                counts.rows += 1
                self._set_aside(row.failed(problem), split, problem)

    def _set_aside(self, row: PlacedRow, split: Split, problem: RowError) -> None:
        entry = {"section": self.section, "split": split, "file": row.name, "row": row.number}
        entry |= {"column": problem.column, "reason": problem.reason, "content": row.raw[:RAW_CHARACTERS]}
        self.bad.write(json.dumps(entry, ensure_ascii=False) + "\n")


class _Writer:
    """A Parquet file written row group by row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        # Dictionaries would hide how much text a row group holds: its size is what shards are planned by.
        self._writer = pq.ParquetWriter(
            path,
            schema,
            use_dictionary=["file"],
            compression="zstd",
            compression_level=3,
            write_page_checksum=True,
        )
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, source: int, placed: PlacedRow) -> None:
        assert placed.row is not None
        value: dict[str, Any] = {"source": source, "file": placed.name, "row": placed.number}
        if isinstance(placed.row, str):
            value["text"] = placed.row
        else:
            assert isinstance(placed.row, Conversation)
            value["interactions"] = [_interaction_value(turn) for turn in placed.row.interactions]
            value["system"] = placed.row.system
        self._rows.append(value)
        self._bytes += sum(len(text) for text in row_texts(placed.row))
        if self._bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def _interaction_value(turn: Interaction) -> dict[str, Any]:
    return {**vars(turn), "recall": turn.recall and {**vars(turn.recall), "spans": list(turn.recall.spans)}}


def _row_of(value: dict[str, Any]) -> Row:
    if "text" in value:
        return str(value["text"])
    return Conversation(tuple(_interaction_of(turn) for turn in value["interactions"]), value["system"])


def _interaction_of(value: dict[str, Any]) -> Interaction:
    key = value["recall"]
    return Interaction(**{**value, "recall": key and Recall(**{**key, "spans": tuple(key["spans"])})})


def groups_of_rows(rows: Iterator[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """Rows by the thousand, or fewer where they are long."""
    group: list[PlacedRow] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(map(len, row_texts(row.row))) if row.row is not None else len(row.raw)
        if len(group) >= _CHECKED_AT_ONCE or size >= _CHECKED_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _why_none(counts: list[SourceCounts], split: Split) -> str:
    dropped = sum(one.duplicates + one.near_duplicates for one in counts)
    read = sum(one.rows for one in counts)
    if dropped:
        return f"{dropped} of {read} repeat held-out rows; name other files as validation_path"
    if split == "validation" and not read:
        return "raise validation_share, or name files of their own as validation_path"
    return f"{read} rows were read, all of them bad"

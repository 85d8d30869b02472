"""Rows from where the configuration says, each with its place: the story world, files, the Hugging Face Hub.

Reading streams: a source of any size goes through in bounded memory. A row that can't be used is handed on with its
reason; what becomes of it is the corpus's decision. A source is read once for each split, and a row's split is decided
by its content, so that equal rows are on the same side (past the cap on held-out rows, the corpus's check finds them).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

from rxt_platform.config.data import (
    DataConfig,
    FilesSource,
    HubSource,
    RowsSource,
    Section,
    Source,
    StoryWorldSource,
)
from rxt_platform.data import hub
from rxt_platform.data.formats import read_file
from rxt_platform.data.paths import expand, format_of
from rxt_platform.data.raw import RawRow
from rxt_platform.data.rows import (
    HYBRID_COLUMNS,
    ROW_VERSION,
    Conversation,
    Row,
    RowError,
    RowKind,
    guess_kind,
    hybrid_column,
    parse_row,
    row_to_json,
)
from rxt_platform.data.story_world import STORY_WORLD_VERSION, Split, StoryWorld
from rxt_platform.errors import DataError
from rxt_platform.storage.directory import file_hash

SECTIONS: tuple[Section, ...] = get_args(Section)
SPLITS: tuple[Split, ...] = get_args(Split)
_PEEK = 100  # raw rows that tell a source's columns,
_PEEK_BYTES = 16 * 2**20  # fewer where they are that large


@dataclass(frozen=True)
class PlacedRow:
    """A row and where it stands; `row` is None when it can't be used, for the reason in `problem`."""

    file: str
    number: int  # line, row or document, from 1
    row: Row | None
    problem: RowError | None = None
    raw: str = ""  # of a row with a problem, what could be read of it

    @property
    def name(self) -> str:
        """The file without its folder: what an artifact may hold, so that it is the same wherever the file lay."""
        return self.file if self.file.startswith("hf:") else os.path.basename(self.file)

    def failed(self, problem: RowError) -> PlacedRow:
        """The same row, found to be bad."""
        kept = "" if self.row is None else json.dumps(row_to_json(self.row), ensure_ascii=False)
        return replace(self, row=None, problem=problem, raw=kept)


def section_sources(config: DataConfig, section: Section) -> list[Source]:
    """The sources of a section, none when the run does not use it."""
    return getattr(config, section) or []


def read_source(config: DataConfig, section: Section, source: Source, split: Split) -> Iterator[PlacedRow]:
    """Rows of one source and split, in order. Raises DataError when the source as a whole can't be used.

    Interactions that come from conversations are their turns, one by one, without answer keys; limits count the
    conversations.
    """
    if isinstance(source, StoryWorldSource):
        yield from _world(section, source, split)
        return
    rows: Iterator[PlacedRow] = _split(source, _parsed(config, section, source, split), split)
    rows = islice(rows, source.max_rows)
    if source.max_turns:
        rows = (replace(row, row=_shortened(row.row, source.max_turns)) for row in rows)
    if section == "interactions":
        rows = chain.from_iterable(_turn_by_turn(row) for row in rows)
    yield from rows


def read_conversations(path: str) -> list[Conversation]:
    """All conversations of some files, for a use outside of a run. Raises DataError that names the first bad row."""
    config = DataConfig(conversations=path)
    (source,) = config.conversations
    assert isinstance(source, RowsSource)
    talks = []
    for row in _parsed(config, "conversations", source, "train"):
        if row.problem is not None:
            raise DataError(f"{row.file}:{row.number}: {row.problem}")
        assert isinstance(row.row, Conversation)
        talks.append(row.row)
    return talks


def open_rows(
    config: DataConfig, source: RowsSource, split: Split, kind_of: Callable[[list[Mapping[str, Any]]], RowKind | None]
) -> tuple[RowKind | None, Iterator[tuple[RawRow, PlacedRow]]]:
    """The row kind that `kind_of` finds in the first readable rows, and every row: as its file holds it, and as read.

    Where it finds none, no row can be used. Raises DataError, also while iterating.
    """
    raw = _raw_rows(config, source, split)
    first = _peek(raw)
    kind = kind_of([one.value for _, one in first if one.problem is None])
    return kind, ((one, _read(file, one, kind, source.columns)) for file, one in chain(first, raw))


def source_identity(config: DataConfig) -> dict[str, Any]:
    """What identifies the rows: content hashes of files and the story world's version, never a path.

    Sources' weights and the policy for rows that are too long concern later steps only.
    """
    sections: dict[str, Any] = {
        "row_version": ROW_VERSION,
    } | {section: [_identity(config, source) for source in section_sources(config, section)] for section in SECTIONS}
    return {**sections, "validation": config.validation.model_dump(mode="json", exclude={"too_long"})}


def guess_source_kind(rows: list[Mapping[str, Any]]) -> RowKind | None:
    """The row kind that some raw rows show."""
    return guess_kind(_names(rows, "interactions"))


def _identity(config: DataConfig, source: Source) -> dict[str, Any]:
    spec = source.model_dump(mode="json", exclude={"weight", "streaming"})
    if isinstance(source, StoryWorldSource):
        return {**spec, "version": STORY_WORLD_VERSION}
    if isinstance(source, HubSource):
        placed = _placed(config, source)
        path = None if hub.is_folder(placed) else spec["path"]
        return {**spec, "path": path, "revision": hub.commit_of(placed)}
    for key in ("path", "validation_path"):
        if spec[key] is not None:
            spec[f"{key}_sha256"] = [_file_identity(source, path) for path in expand(spec[key], Path(config.root))]
        del spec[key]
    return spec


def _file_identity(source: FilesSource, path: Path) -> list[str]:
    """The content's hash, and what the name says about how to read it."""
    file_format = source.format or format_of(path)
    tabs = file_format == "csv" and ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
    return [file_hash(path), "tsv" if tabs else file_format]


def _placed(config: DataConfig, source: HubSource) -> HubSource:
    """The source; the path of a local folder, which is relative to `root`, as the process has to open it."""
    folder = Path(config.root) / source.path
    return source.model_copy(update={"path": str(folder)}) if folder.is_dir() else source


def _world(section: Section, source: StoryWorldSource, split: Split) -> Iterator[PlacedRow]:
    world, count = StoryWorld(source.seed), source.train_rows if split == "train" else source.validation_rows
    rows: list[Row]
    if section == "texts":
        rows = list(world.stories(split, count))
    elif section == "interactions":
        rows = [Conversation((turn,)) for turn in world.interactions(split, count)]
    else:
        each = -(-count // len(source.turns))
        made = [world.conversations(split, each, turns, tuple(source.tasks)) for turns in source.turns]
        rows = [talk for group in zip(*made, strict=True) for talk in group][:count]
    for number, row in enumerate(rows, start=1):
        yield PlacedRow("story_world", number, row)


def _parsed(config: DataConfig, section: Section, source: RowsSource, split: Split) -> Iterator[PlacedRow]:
    """The source's rows as its row kind reads them."""
    _, rows = open_rows(config, source, split, partial(section_kind, section, source))
    yield from (placed for _, placed in rows)


def _read(file: str, one: RawRow, kind: RowKind | None, columns: Mapping[Any, str]) -> PlacedRow:
    """A row of a file as its kind reads it; with none, no row can be used."""
    problem = one.problem
    if problem is None:
        try:
            if kind is None:
                raise RowError("", f"of no row kind; {_columns(set(one.value))}")
            value = _renamed(one.value, columns)
            if kind == "conversation" and hybrid_column(value):  # the first rows did not show it
                kind = "hybrid"
            return PlacedRow(file, one.number, parse_row(kind, value))
        except RowError as error:
            problem = error
    raw_text = one.raw or json.dumps(one.value, ensure_ascii=True, default=repr)[:2000]
    return PlacedRow(file, one.number, None, problem, raw_text)


def _peek(raw: Iterator[tuple[str, RawRow]]) -> list[tuple[str, RawRow]]:
    """The first rows, taken off the iterator."""
    first: list[tuple[str, RawRow]] = []
    size = 0
    for file, row in raw:
        first.append((file, row))
        size += len(json.dumps(row.value, default=repr))
        if len(first) >= _PEEK or size >= _PEEK_BYTES:
            break
    return first


def _raw_rows(config: DataConfig, source: RowsSource, split: Split) -> Iterator[tuple[str, RawRow]]:
    if isinstance(source, HubSource):
        name = source.validation_split if split == "validation" and source.validation_split else source.split
        placed = _placed(config, source)
        place = hub.place_of(placed, name)
        yield from ((place, row) for row in hub.read(placed, name))
        return
    assert isinstance(source, FilesSource)
    path = source.validation_path if split == "validation" and source.validation_path else source.path
    for file in expand(path, Path(config.root)):
        file_format = source.format or format_of(file)
        place = str(file).encode(errors="replace").decode()  # a file's name may be no Unicode
        for row in read_file(file, file_format, source.separator, config.validation.largest_row):
            yield place, row


def section_kind(section: Section, source: RowsSource, values: list[Mapping[str, Any]]) -> RowKind:
    """The row kind of a source whose first readable rows are `values`. Raises DataError that lists its columns."""
    names = _names(values, source.columns.get("interactions", "interactions"))
    if values:
        for ours, theirs in source.columns.items():
            if theirs not in names:
                near = difflib.get_close_matches(theirs, sorted(names), n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise DataError(f"{_label(source)}: no column '{theirs}' (columns.{ours}); {hint}{_columns(names)}")
    names |= source.columns.keys()
    if section == "texts":
        if "text" not in names and values:
            raise DataError(
                f"{_label(source)}: no column 'text'; {_columns(names)}: name one by `columns: {{text: ...}}`"
            )
        return "text"
    kind = guess_kind(names)
    if kind in (None, "text", "preference") and values:
        found = "preference rows" if kind == "preference" else f"no columns 'query' and 'answer'; {_columns(names)}"
        raise DataError(
            f"{_label(source)}: {found}: {section} need query and answer, or interactions; "
            "name them by `columns: {query: ..., answer: ...}`"
        )
    return "hybrid" if kind == "hybrid" else "conversation"  # of one turn or more, row by row


def _names(values: list[Mapping[str, Any]], interactions: str) -> set[str]:
    """Columns of rows, and of the objects listed in their column `interactions`."""
    names: set[str] = set()
    for value in values:
        inner = value.get(interactions)
        for item in [value, *(inner if isinstance(inner, list) else [])]:
            if isinstance(item, Mapping):  # Parquet names what no row has: such a column is null everywhere
                names |= {name for name in item if item[name] is not None or name not in HYBRID_COLUMNS}
    return names


def _columns(names: set[str]) -> str:
    return f"columns: {', '.join(sorted(names)) or 'none'}"


def _renamed(value: Any, columns: Mapping[Any, str]) -> Any:
    """The row with its columns under our names, also in the objects listed in `interactions`."""
    if not columns or not isinstance(value, Mapping):
        return value
    back = {theirs: ours for ours, theirs in columns.items()}
    row = {back.get(name, name): content for name, content in value.items() if name in back or name not in columns}
    if isinstance(listed := row.get("interactions"), list):
        row["interactions"] = [_renamed(item, columns) for item in listed]
    return row


def _split(source: RowsSource, rows: Iterator[PlacedRow], split: Split) -> Iterator[PlacedRow]:
    """The rows of one split where both come from the same files; bad rows count as training rows."""
    apart = source.validation_path if isinstance(source, FilesSource) else getattr(source, "validation_split", None)
    if apart is not None:
        yield from rows
        return
    held_out = 0
    for row in rows:
        mine = row.row is not None and _is_held_out(row.row, source.validation_share)
        mine = mine and held_out < source.validation_rows
        held_out += mine
        if mine == (split == "validation"):
            yield row


def _is_held_out(row: Row, share: float) -> bool:
    text = row if isinstance(row, str) else json.dumps(row_to_json(row), ensure_ascii=False)
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"rxt split").digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _shortened(row: Row | None, turns: int) -> Row | None:
    return replace(row, interactions=row.interactions[:turns]) if isinstance(row, Conversation) else row


def _turn_by_turn(placed: PlacedRow) -> Iterator[PlacedRow]:
    if not isinstance(placed.row, Conversation):
        yield placed
        return
    for turn in placed.row.interactions:
        yield replace(placed, row=Conversation((replace(turn, recall=None),)))


def _label(source: RowsSource) -> str:
    return f"hf:{source.path}" if isinstance(source, HubSource) else getattr(source, "path", "source")

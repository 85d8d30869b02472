"""What the data commands look at: a source named on the command line, or every source of a run, file by file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_platform.config.data import DataConfig, FilesSource, HubSource, RowsSource, Section, Source, StoryWorldSource
from rxt_platform.data.paths import FileFormat, expand, format_of
from rxt_platform.data.raw import RawRow
from rxt_platform.data.rows import RowKind
from rxt_platform.data.sources import (
    SECTIONS,
    PlacedRow,
    guess_source_kind,
    open_rows,
    read_source,
    section_kind,
    section_sources,
)
from rxt_platform.data.story_world import Split
from rxt_platform.errors import ConfigError, DataError

_WORLD_KINDS: dict[Section, RowKind] = {
    "texts": "text",
    "interactions": "interaction",
    "conversations": "conversation",
}


@dataclass(frozen=True)
class OpenedFile:
    """A file (or a split of a data set, or the story world) that is about to be read."""

    format: str
    size: int | None
    """Bytes on the disk, None where there is no file."""
    kind: RowKind | None
    """None where the first rows show none: then no row can be used."""
    rows: Iterator[tuple[RawRow | None, PlacedRow]]
    """Each row as the file holds it (the story world has none) and as it is read."""


@dataclass(frozen=True)
class Part:
    """A source, or the training or held-out rows of one where they are files of their own."""

    name: str
    data: DataConfig
    source: Source
    split: Split = "train"
    sections: tuple[Section, ...] = ()
    """Of a run, those that read it; without any, each file's row kind is guessed by itself."""
    kind: RowKind | None = None
    """The row kind, if it is given."""

    @property
    def label(self) -> str:
        """What is read, as a message names it."""
        return source_name(self.source, self.split)

    def places(self) -> list[Part]:
        """The part file by file, so that damage of one does not hide the others. Raises DataError if none is there."""
        if not isinstance(self.source, FilesSource):
            return [self]
        held_out = self.source.validation_path if self.split == "validation" else None
        files = expand(held_out or self.source.path, Path(self.data.root))
        kind = self._rows()[0] if self.sections else self.kind  # a run's source has one kind for all its files
        here = self.data.model_copy(update={"root": "."})
        sources = [self.source.model_copy(update={"path": str(file), "validation_path": None}) for file in files]
        return [Part(self.name, here, source, "train", self.sections, kind) for source in sources]

    def open(self) -> OpenedFile:
        """Start reading one of its `places`. Raises DataError, also while its rows are read."""
        if isinstance(self.source, StoryWorldSource):
            (section,) = self.sections
            made = read_source(self.data, section, self.source, self.split)
            return OpenedFile("", None, _WORLD_KINDS[section], ((None, row) for row in made))
        kind, rows = self._rows()
        if isinstance(self.source, HubSource):
            return OpenedFile("hub", None, kind, rows)
        assert isinstance(self.source, FilesSource)
        path = Path(self.source.path)
        return OpenedFile(self.source.format or format_of(path), path.stat().st_size, kind, rows)

    def _rows(self) -> tuple[RowKind | None, Iterator[tuple[RawRow, PlacedRow]]]:
        assert isinstance(self.source, RowsSource)
        return open_rows(self.data, self.source, self.split, self._kind_of)

    def _kind_of(self, values: list[Mapping[str, Any]]) -> RowKind | None:
        if self.kind is not None:
            return self.kind
        if not self.sections:
            return guess_source_kind(values)
        assert isinstance(self.source, RowsSource)
        return section_kind(self.sections[0], self.source, values)


def until_damage(rows: Iterator[PlacedRow], damage: list[str]) -> Iterator[PlacedRow]:
    """Rows up to where they can't be read any more; why not is added to `damage`."""
    try:
        yield from rows
    except DataError as error:
        damage.append(str(error))


def named_part(
    name: str,
    *,
    config: str | None = None,
    split: str | None = None,
    file_format: FileFormat | None = None,
    separator: str | None = None,
    kind: RowKind | None = None,
) -> Part:
    """The source that a person named: a file, a folder, a glob, or `hf:owner/name` with `config` and `split`.

    The split may also stand in the name: `hf:owner/name[validation]`.
    `separator` parts the documents of plain text; "" makes a file one document. Raises ConfigError for what can't be.
    """
    path = name.removeprefix("hf:")
    if not path:
        raise ConfigError(f"{name!r} names no source: give a file, a folder, a glob, or hf:owner/name")
    source: RowsSource
    if path != name:
        if file_format is not None or separator is not None:
            raise ConfigError(f"{name}: --format and --separator are for files, not for data sets of the Hub")
        path, bracket, named = path.removesuffix("]").partition("[") if path.endswith("]") else (path, "", "")
        if bracket and split is not None:
            raise ConfigError(f"{name}: names the split {named} and --split another: leave one out")
        split = named or split
        source = HubSource(kind="hub", path=path, config=config, split=split or "train", validation_split=None)
    else:
        if config is not None or split is not None:
            raise ConfigError(f"{name}: --config and --split are for data sets of the Hub; is it hf:{name}?")
        changes: dict[str, Any] = {} if separator is None else {"separator": separator or None}
        source = FilesSource(kind="files", path=path, format=file_format, **changes)
    return Part(name, DataConfig(conversations=[source]), source, kind=kind)


def run_parts(data: DataConfig) -> list[Part]:
    """Every source of a run, once; held-out rows are a part of their own where they are named apart."""
    parts: dict[str, Part] = {}
    for section in SECTIONS:
        for source in section_sources(data, section):
            splits: list[Split] = ["train"]
            if isinstance(source, StoryWorldSource) or held_out_apart(source):
                splits.append("validation")
            for split in splits:
                key = _same_rows(section, source, split)
                sections = (*parts[key].sections, section) if key in parts else (section,)
                held_out = ", held out" if split == "validation" else ""
                name = f"{' and '.join(sections)}{held_out}: {source_name(source, split)}"
                parts[key] = Part(name, data, source, split, sections)
    return list(parts.values())


def _same_rows(section: Section, source: Source, split: Split) -> str:
    """Equal for sources that read the same rows in the same way: single interactions are taken from conversations."""
    apart = section if section == "texts" or isinstance(source, StoryWorldSource) else "interactions"
    how = {"weight", "path", "validation_path", "split", "validation_split", "validation_share", "validation_rows"}
    spec = source.model_dump_json(exclude=how | {"max_turns"})
    return f"{apart} {split if isinstance(source, StoryWorldSource) else ''} {source_name(source, split)} {spec}"


def held_out_apart(source: RowsSource) -> bool:
    """Whether the held-out rows are named apart from the training rows, rather than a share of them."""
    named = source.validation_split if isinstance(source, HubSource) else getattr(source, "validation_path", None)
    return named is not None


def source_name(source: Source, split: Split) -> str:
    """How a source, or its held-out part, is named to a person."""
    if isinstance(source, StoryWorldSource):
        return f"story_world, seed {source.seed}"
    if isinstance(source, HubSource):
        part = source.validation_split if split == "validation" and source.validation_split else source.split
        return f"hf:{source.path}{f':{source.config}' if source.config else ''}[{part}]"
    assert isinstance(source, FilesSource)
    return source.validation_path if split == "validation" and source.validation_path else source.path

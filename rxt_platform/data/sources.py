"""Rows from where the configuration says: the story world, plain text, JSON lines in the published layouts.

Every bad row is an error that names file, row and column. (Quarantine and more formats build on this.)
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rxt_platform.config.run import DataConfig, JsonlSource, StoryWorldSource, TextFileSource
from rxt_platform.data.rows import Conversation, Interaction, conversation_from_row
from rxt_platform.data.story_world import STORY_WORLD_VERSION, Split, StoryWorld
from rxt_platform.errors import DataError
from rxt_platform.storage.directory import file_hash

Row = TypeVar("Row")


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """Training and held-out rows."""

    train: list[Row]
    validation: list[Row]
    notes: dict[str, int] = field(default_factory=dict)


def texts(config: DataConfig) -> Rows[str]:
    """Documents for language-model pre-training."""
    source = config.texts
    if isinstance(source, StoryWorldSource):
        return _world(source, lambda world, split, count: world.stories(split, count))
    return _text_file(_path(config, source.path), source)


def interactions(config: DataConfig) -> Rows[Interaction]:
    """Single interactions for supervised fine-tuning; the turns of conversations count one by one."""
    source = config.interactions
    if isinstance(source, StoryWorldSource):
        return _world(source, lambda world, split, count: world.interactions(split, count))
    both = _jsonl_splits(config, source)
    train, validation = (
        [Interaction(turn.query, turn.answer) for row in rows for turn in row.interactions]
        for rows in (both.train, both.validation)
    )
    return Rows(train, validation)


def conversations(config: DataConfig) -> Rows[Conversation]:
    """Conversations for the memory stages; some must have follow-up turns."""
    source = config.conversations
    if isinstance(source, StoryWorldSource):
        return _world(source, lambda world, split, count: _talks(world, split, count, source.turns))
    both = _jsonl_splits(config, source)
    for path, rows in ((source.path, both.train), (source.validation_path, both.validation)):
        if all(len(row.interactions) < 2 for row in rows):
            raise DataError(
                f"{_path(config, path)}: no row has a follow-up interaction: column 'interactions' is needed"
            )
    return both


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a JSON-lines file. Raises DataError with file:row:column."""
    rows = []
    for number, raw in _json_lines(path):
        try:
            rows.append(conversation_from_row(raw))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}; every interaction needs text in 'query' and 'answer'") from None
    if not rows:
        raise DataError(f"{path}: empty: no rows; write one JSON object a line with 'query' and 'answer'")
    return rows


def source_identity(config: DataConfig) -> dict[str, Any]:
    """What identifies the rows: content hashes of files and the story world's version, never a path."""
    return {name: _identity(config, getattr(config, name)) for name in ("texts", "interactions", "conversations")}


def _identity(config: DataConfig, source: StoryWorldSource | TextFileSource | JsonlSource) -> dict[str, Any]:
    spec = source.model_dump(mode="json")
    if isinstance(source, StoryWorldSource):
        return {**spec, "version": STORY_WORLD_VERSION}
    for key in ("path", "validation_path"):
        if key in spec:
            spec[f"{key}_sha256"] = file_hash(_existing(_path(config, spec.pop(key))))
    return spec


def _world(source: StoryWorldSource, make: Any) -> Rows[Any]:
    world = StoryWorld(source.seed)
    sizes: dict[Split, int] = {"train": source.train_rows, "validation": source.validation_rows}
    train, validation = (make(world, split, count) for split, count in sizes.items())
    return Rows(train, validation)


def _talks(world: StoryWorld, split: Split, count: int, lengths: list[int]) -> list[Conversation]:
    """Conversations whose lengths follow `lengths` over and over."""
    made = [world.conversations(split, -(-count // len(lengths)), turns) for turns in lengths]
    return [talk for group in zip(*made, strict=True) for talk in group][:count]


def _jsonl_splits(config: DataConfig, source: JsonlSource) -> Rows[Conversation]:
    train, validation = (read_conversations(_path(config, p)) for p in (source.path, source.validation_path))
    if source.max_turns:
        train, validation = (
            [Conversation(row.interactions[: source.max_turns]) for row in rows] for rows in (train, validation)
        )
    return Rows(train, validation)


def _text_file(path: Path, source: TextFileSource) -> Rows[str]:
    text = _read_text(path)
    parts = text.split(source.separator)
    unfinished = int(bool(parts[-1].strip()))  # a last document without its separator was cut off
    documents = [stripped for part in parts[:-1] if (stripped := part.strip())]
    if not documents:
        reason = f"no document ends with a line {source.separator!r}" if text.strip() else "empty"
        raise DataError(f"{path}: {reason}: check the file and 'separator'")
    documents = documents[: source.max_rows]
    held_out = max(1, round(len(documents) * source.validation_share))
    if held_out >= len(documents):
        raise DataError(f"{path}: {len(documents)} documents can't be split into training and held-out ones")
    return Rows(documents[:-held_out], documents[-held_out:], {"dropped_unfinished_documents": unfinished})


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object with 'query' and 'answer', got {type(row).__name__}")
        yield number, row


def _read_text(path: Path) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: convert the file to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file; relative paths are taken from data.root")
    return path


def _path(config: DataConfig, path: str) -> Path:
    return Path(config.root) / path

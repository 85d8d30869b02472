"""Token shards: every row as token ids, made once, memory-mapped by every worker that trains.

    texts.train-00000.arrow ...   one record batch each, turns as nested lists of ids
    tokens.json                   what is in them, part by part; bad_rows.jsonl: rows that do not fit the window

A shard is made from a fixed run of the corpus's row groups and from nothing else, so shards can be made in any order,
by any number of tasks, and come out the same. Reading copies nothing: ids are views into the mapped files.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rxt_platform.config.data import Section
from rxt_platform.data.corpus import CorpusRow, read_rows, row_groups
from rxt_platform.data.examples import Example, ExampleSet, RowEncoder
from rxt_platform.data.rows import RowError
from rxt_platform.data.sources import SECTIONS, SPLITS
from rxt_platform.data.story_world import Split
from rxt_platform.errors import ArtifactError, DataError

SUMMARY = "tokens.json"
_SHARD_BYTES = 32 * 2**20  # of text, at least
_MOST_SHARDS = 256  # of a part: each keeps a file open in every process that reads it
_ROWS_AT_ONCE = 500
_BINS = 64


@dataclass(frozen=True)
class ShardPlan:
    """One shard: some row groups of a part of the corpus."""

    section: Section
    split: Split
    number: int
    groups: tuple[int, int]  # first and one past the last
    bytes: int

    @property
    def name(self) -> str:
        """The shard's file."""
        return f"{self.section}.{self.split}-{self.number:05d}.arrow"


def plan_shards(corpus: Path) -> list[ShardPlan]:
    """The shards of a corpus, by its row groups' sizes alone."""
    plans = []
    for section in SECTIONS:
        for split in SPLITS:
            first = size = number = 0
            groups = row_groups(corpus, section, split)
            enough = max(_SHARD_BYTES, sum(groups) // _MOST_SHARDS)
            for group, amount in enumerate(groups, start=1):
                size += amount
                if size >= enough or group == len(groups):
                    plans.append(ShardPlan(section, split, number, (first, group), size))
                    first, size, number = group, 0, number + 1
    return plans


def make_shard(plan: ShardPlan, corpus: Path, encoder: RowEncoder, directory: Path) -> dict[str, Any]:
    """Tokenise one shard into its file. Returns its counts, with the rows that do not fit as `bad`."""
    build = _ShardBuild(encoder)
    rows = read_rows(corpus, plan.section, plan.split, range(*plan.groups))
    for group in _chunks(rows, _ROWS_AT_ONCE):
        for row, made in zip(group, encoder.encode([one.row for one in group]), strict=True):
            build.add(row, made)
    batch = build.record_batch()
    path = directory / plan.name
    attempt = directory / f".{plan.name}.{uuid.uuid4().hex[:8]}"  # a task that is run again has a file of its own
    try:
        with pa.OSFile(str(attempt), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        attempt.rename(path)
    except OSError as error:
        raise ArtifactError(f"{path}: {batch.nbytes:,} bytes cannot be written: {error}") from error
    return {"section": plan.section, "split": plan.split, "file": plan.name, **build.counts()}


def write_summary(directory: Path, shards: Sequence[dict[str, Any]], max_length: int) -> dict[str, float]:
    """`tokens.json` and `bad_rows.jsonl` from the shards' counts; returns totals for the manifest."""
    parts: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    for leftover in directory.glob(".*"):  # of a task that was killed
        leftover.unlink()
    with (directory / "bad_rows.jsonl").open("w", encoding="utf-8") as bad:
        for shard in shards:
            name = f"{shard['section']}_{shard['split']}"
            part = parts.setdefault(name, {"files": [], "histogram": [0] * _BINS, "max_length": max_length})
            part["files"].append({"name": shard["file"], "examples": shard["examples"]})
            part["histogram"] = [a + b for a, b in zip(part["histogram"], shard["histogram"], strict=True)]
            for key in ("rows", "examples", "turns", "tokens", "targets", "truncated", "queries_cut", "too_long"):
                part[key] = part.get(key, 0) + shard[key]
            part["longest"] = max(part.get("longest", 0), shard["longest"])
            for entry in shard["bad"]:
                line = {"section": shard["section"], "split": shard["split"], **entry}
                bad.write(json.dumps(line, ensure_ascii=False) + "\n")
    for name, part in parts.items():
        metrics |= {
            f"{name}_{key}": part[key] for key in ("examples", "tokens", "truncated", "queries_cut", "too_long")
        }
    (directory / SUMMARY).write_text(json.dumps({"max_length": max_length, "parts": parts}, indent=2))
    return metrics


def read_summary(directory: Path) -> dict[str, Any]:
    """`tokens.json`: for each part its files, counts and a histogram of turn lengths over 64 equal bins.

    Raises ArtifactError.
    """
    try:
        return dict(json.loads((directory / SUMMARY).read_text()))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory / SUMMARY}: not a readable summary of token shards: {error}") from error


class TokenShards(ExampleSet):
    """The examples of one part, in the corpus's order, memory-mapped."""

    def __init__(self, directory: Path, section: Section, split: Split) -> None:
        name = f"{section}_{split}"
        part = read_summary(directory)["parts"].get(name)
        if part is None:
            raise DataError(f"{directory}: holds no {section} for {split}: name a source as data.{section}")
        self._shards = [_Shard(directory / file["name"], file["examples"]) for file in part["files"]]
        self._ends = np.cumsum([len(shard.outer) - 1 for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """One example, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._locate(index, _Shard.example)

    def place(self, index: int) -> str:
        """file:row that an example was made from."""
        return str(self._locate(index, _Shard.place))

    def _locate(self, index: int, read: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return read(shard, int(index - self._ends[number] + len(shard.outer) - 1))

    @property
    def turn_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """See `ExampleSet`; read off the offsets, so that no token is touched."""
        lengths = [np.diff(shard.inner) for shard in self._shards]
        counts = [np.diff(shard.outer) for shard in self._shards]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return np.concatenate(lengths).astype(np.int64), starts.astype(np.int64)

    @property
    def sources(self) -> np.ndarray:
        """See `ExampleSet`."""
        return np.concatenate([shard.sources for shard in self._shards])


class _Shard:
    """Views into one mapped file."""

    def __init__(self, path: Path, examples: int) -> None:
        try:
            self._file = pa.memory_map(str(path))
            batch = pa.ipc.open_file(self._file).get_batch(0)
            batch.validate()
            self._view(batch)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:  # what damage in the file's tables leads to
            raise ArtifactError(f"{path}: not a readable token shard: {error}") from error
        if batch.num_rows != examples:
            raise ArtifactError(f"{path}: holds {batch.num_rows} examples, {SUMMARY} says {examples}")

    def _view(self, batch: pa.RecordBatch) -> None:
        turns = batch.column("turns")
        self.outer = turns.offsets.to_numpy()
        self.inner = turns.values.offsets.to_numpy()
        self.ids = turns.values.values.to_numpy()
        self.target_starts = batch.column("target_starts").values.to_numpy()
        self.sources = batch.column("source").to_numpy()
        self._files, self._rows = batch.column("file"), batch.column("row").to_numpy()

    def example(self, index: int) -> Example:
        first, last = self.outer[index], self.outer[index + 1]
        bounds = self.inner[first : last + 1].tolist()
        turns = tuple(self.ids[start:end] for start, end in pairwise(bounds))
        return Example(turns, tuple(self.target_starts[first:last].tolist()))

    def place(self, index: int) -> str:
        return f"{self._files[index].as_py()}:{self._rows[index]}"


class _ShardBuild:
    """Examples of a shard on their way into Arrow."""

    def __init__(self, encoder: RowEncoder) -> None:
        self._dtype = np.dtype(np.uint16 if encoder.tokenizer.vocab_size <= 2**16 else np.uint32)
        self._limit = encoder.max_length
        self._ids: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._starts: list[int] = []
        self._turns: list[int] = []
        self._places: list[tuple[int, str, int]] = []
        self._rows = self._truncated = self._queries_cut = 0
        self._bad: list[dict[str, Any]] = []

    def add(self, row: CorpusRow, made: list[Example] | RowError) -> None:
        self._rows += 1
        if isinstance(made, RowError):
            self._bad.append({"file": row.file, "row": row.number, "column": made.column, "reason": made.reason})
            return
        for example in made:
            self._turns.append(len(example.turns))
            self._places.append((row.source, row.file, row.number))
            self._truncated += example.truncated
            self._queries_cut += example.queries_cut
            self._starts += example.target_starts
            for turn in example.turns:
                self._ids.append(np.asarray(turn, dtype=self._dtype))
                self._lengths.append(len(turn))

    def record_batch(self) -> pa.RecordBatch:
        ids = np.concatenate(self._ids) if self._ids else np.empty(0, self._dtype)
        turns = pa.ListArray.from_arrays(_offsets(self._lengths), pa.array(ids))
        outer = _offsets(self._turns)
        sources, files, rows = zip(*self._places, strict=True) if self._places else ((), (), ())
        return pa.record_batch(
            {
                "turns": pa.ListArray.from_arrays(outer, turns),
                "target_starts": pa.ListArray.from_arrays(outer, pa.array(self._starts, pa.int32())),
                "source": pa.array(sources, pa.int16()),
                "file": pa.array(files, pa.string()).dictionary_encode(),
                "row": pa.array(rows, pa.int64()),
            }
        )

    def counts(self) -> dict[str, Any]:
        lengths = np.asarray(self._lengths, dtype=np.int64)
        histogram, _ = np.histogram(lengths, bins=_BINS, range=(0, self._limit))
        return {
            "rows": self._rows,
            "examples": len(self._turns),
            "turns": len(lengths),
            "tokens": int(lengths.sum()),
            "targets": int((lengths - np.asarray(self._starts, dtype=np.int64)).sum()),
            "longest": int(lengths.max(initial=0)),
            "truncated": self._truncated,
            "queries_cut": self._queries_cut,
            "too_long": len(self._bad),
            "histogram": histogram.tolist(),
            "bad": self._bad,
        }


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))


def _chunks(rows: Iterator[CorpusRow], size: int) -> Iterator[list[CorpusRow]]:
    chunk: list[CorpusRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

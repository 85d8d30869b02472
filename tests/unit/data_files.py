"""Small data sets in every file format, and the configurations that read them."""

import bz2
import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rxt_platform.config.data import DataConfig, Section
from rxt_platform.data.corpus import CorpusRow, build_corpus, read_rows
from rxt_platform.data.rows import Conversation, Interaction, Row
from rxt_platform.data.sources import PlacedRow, read_source, section_sources
from rxt_platform.data.story_world import Split

WORLD = {"kind": "story_world", "train_rows": 4, "validation_rows": 2}
END = "<|endoftext|>"


def turn(number: int, **more: Any) -> dict[str, Any]:
    """A turn that no other number's is like."""
    return {"query": f"question {number}", "answer": f"answer {number}", **more}


def talk_row(*numbers: int) -> dict[str, Any]:
    """A conversation in the published layout."""
    first, *others = map(turn, numbers)
    return {**first, "interactions": others}


def talk(*numbers: int) -> Conversation:
    """What `talk_row` is read as."""
    return Conversation(tuple(Interaction(f"question {number}", f"answer {number}") for number in numbers))


def put(folder: Path, name: str, content: bytes | str) -> Path:
    """A file, compressed as its name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(raw)
        return path
    compress = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(raw))
    return path


def put_rows(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows in the format that the file's name says."""
    if ".parquet" in name:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        names = dict.fromkeys(
            name for row in rows for name in row
        )  # of the first row alone, if pyarrow is to find them
        whole = [{name: row.get(name) for name in names} for row in rows]
        pq.write_table(pa.Table.from_pylist(whole), folder / name, row_group_size=7)
        return folder / name
    if ".csv" in name or ".tsv" in name:
        return put(folder, name, table_of(rows, "\t" if ".tsv" in name else ","))
    if ".txt" in name:
        return put(folder, name, "".join(f"{row['text']}\n{END}\n" for row in rows))
    return put(folder, name, lines_of(rows))


def lines_of(rows: Iterable[Any]) -> str:
    """JSON lines; a text is a line as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def table_of(rows: Sequence[dict[str, Any]], delimiter: str = ",") -> str:
    """Comma- or tab-separated rows under a header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def config_of(root: Path, section: Section, *sources: Any, **validation: Any) -> DataConfig:
    """A run whose `section` comes from these sources (`files` unless they say), the others from the story world."""
    named = [{"kind": "files", **source} if isinstance(source, dict) else source for source in sources]
    return DataConfig.model_validate(
        {"root": str(root), "conversations": WORLD, section: named, "validation": validation}
    )


def placed(config: DataConfig, section: Section, split: Split = "train") -> list[PlacedRow]:
    """What a section's sources hand on."""
    return [row for source in section_sources(config, section) for row in read_source(config, section, source, split)]


def rows_in(config: DataConfig, section: Section, split: Split = "train") -> list[Row]:
    """Rows that must all be good."""
    found = placed(config, section, split)
    assert [str(row.problem) for row in found if row.problem] == []
    return [row.row for row in found if row.row is not None]


def corpus_of(config: DataConfig, folder: Path) -> dict[str, float]:
    """Build the corpus into a new folder."""
    folder.mkdir(parents=True)
    return build_corpus(config, folder)


def kept_in(folder: Path, section: Section, split: Split = "train") -> list[CorpusRow]:
    """All rows of a part of a corpus."""
    return list(read_rows(folder, section, split))


def bad_rows_in(folder: Path) -> list[dict[str, Any]]:
    """What was set aside."""
    return [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]


def validation_of(folder: Path, section: Section, split: Split = "train") -> list[dict[str, Any]]:
    """The counts of each source."""
    counts: list[dict[str, Any]] = json.loads((folder / "validation.json").read_text())[section][split]
    return counts

"""From what a user names to files: a file, a folder or a glob, and the format that a name's ending tells."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Literal

from rxt_platform.errors import DataError

FileFormat = Literal["parquet", "jsonl", "csv", "text"]

FORMATS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
KNOWN = f"{', '.join(FORMATS)}, each but Parquet also with {', '.join(COMPRESSIONS)}"


def expand(path: str, root: Path) -> list[Path]:
    """The files that `path` stands for, sorted: a file, all files of a known format in a folder, or those of a glob.

    In a folder, however deep, what starts with "." or "_" is left out. Links are followed, and what several lead to is
    taken once. Raises DataError when nothing is there.
    """
    target = root / path
    try:
        if target.is_file():  # whatever its name: it may hold what a pattern is made of
            return [target]
        if target.is_dir():
            return _files_in(target)
        found = {root / match for match in glob.glob(path, root_dir=root, recursive=True)}
        files = sorted({os.path.realpath(match): match for match in sorted(found) if not match.is_dir()}.values())
    except OSError as error:
        raise DataError(
            f"{path}: cannot look into {error.filename or target}: {error.strerror}; check the path and its permissions"
        ) from None
    if not files:
        what = "no file matches" if glob.has_magic(path) else "no such file or folder"
        raise DataError(f"{path}: {what}: looked for {target}; relative paths are taken from {root}")
    return files


def format_of(path: Path) -> FileFormat:
    """The format that the name's ending tells. Raises DataError for one that is not known."""
    found = FORMATS.get(ending_of(path))
    if found is None:
        raise DataError(
            f"{path}: the format can't be told from the name: known endings are {KNOWN}; rename it or give `format`"
        )
    return found


def ending_of(path: Path) -> str:
    """The name's ending that tells the format: `.jsonl` of `a.jsonl.gz`; what can't be compressed keeps both."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return before if last in COMPRESSIONS and FORMATS.get(before) != "parquet" else last


def _files_in(folder: Path) -> list[Path]:
    """Raises OSError for a folder that can't be listed."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave its files out silently

    files: list[Path] = []
    others = 0
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        shown = [Path(place, name) for name in names if not name.startswith((".", "_"))]
        known = [file for file in shown if ending_of(file) in FORMATS]
        files += known
        others += len(shown) - len(known)
    if not files:
        inside = f"none of its {others} files has a known ending" if others else "an empty folder"
        raise DataError(f"{folder}: {inside}; known are {KNOWN}; others can be named by a pattern, with `format`")
    return sorted({os.path.realpath(file): file for file in sorted(files, reverse=True)}.values())

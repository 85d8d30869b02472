"""File formats: the raw rows of one file, each with its place, in bounded memory whatever the file's size.

A row that can't be read comes with its problem, and reading goes on after it. Damage that loses an unknown number of
rows (a torn file, a missing header) is a DataError for the whole file.
"""

from __future__ import annotations

import codecs
import csv
import glob
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rxt_platform.data.rows import RowError
from rxt_platform.errors import DataError

FileFormat = Literal["parquet", "jsonl", "csv", "text"]

LARGEST_ROW = 16 * 2**20
"""Bytes; the largest row that is read. Memory while reading is a small multiple of it."""
CHUNK_BYTES = 2**20
"""Bytes read at a time."""
RAW_CHARACTERS = 2_000
"""What is kept of a row with a problem."""

_FORMATS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
_KNOWN = f"{', '.join(_FORMATS)}, each but Parquet also with {', '.join(_COMPRESSIONS)}"
_UNITS: dict[FileFormat, str] = {"parquet": "row", "jsonl": "line", "csv": "line", "text": "document"}
_FOREIGN = {  # how files start that are no text: none of it is UTF-8 that a text would start with
    codecs.BOM_UTF16_LE: "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "gzip data, not text: let the file's name end with .gz",
    b"\x28\xb5\x2f\xfd": "zstd data, not text: let the file's name end with .zst",
    b"\xfd7zXZ\0": "xz data, not text: decompress it, or compress it as .gz or .zst",
    b"PK\x03\x04": "a zip archive, not text: unpack it",
    b"PAR1": "Parquet, not text: let the file's name end with .parquet, or set `format` to parquet",
}
_HEAD_BYTES = 4 * RAW_CHARACTERS  # a character takes at most 4 bytes
_BATCH_ROWS = 250  # of Parquet; fewer where that is more than
_BATCH_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the file holds it, not yet checked for what it says."""

    number: int
    """Its place, from 1: the line of jsonl and csv (where the row starts), the row of Parquet, the document of text."""
    value: Any
    """The row, a mapping; None if it has a problem."""
    problem: RowError | None = None
    """Why the row can't be read. Byte offsets in it count from 0."""
    raw: str = ""
    """Of a row with a problem: its first `RAW_CHARACTERS` characters, what is not UTF-8 replaced."""


def expand(path: str, root: Path) -> list[Path]:
    """The files that `path` stands for, sorted: a file, all files of a known format in a folder, or those of a glob.

    In a folder, however deep, what starts with "." or "_" is left out. Raises DataError when nothing is there.
    """
    target = root / path
    try:
        if target.is_file():  # whatever its name: it may hold what a pattern is made of
            return [target]
        if target.is_dir():
            return _files_in(target)
        found = {root / match for match in glob.glob(path, root_dir=root, recursive=True)}
        files = sorted(match for match in found if not match.is_dir())
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
    found = _FORMATS.get(_ending(path))
    if found is None:
        raise DataError(
            f"{path}: the format can't be told from the name: known endings are {_KNOWN}; rename it or give `format`"
        )
    return found


def columns_of(path: Path, file_format: FileFormat) -> list[str]:
    """The file's top-level columns; of JSON lines those of the first 100 rows that can be read. Raises DataError."""
    if file_format == "text":
        return ["text"]
    if file_format == "jsonl":
        good = (row.value for row in read_file(path, file_format) if row.problem is None)
        return list({name: None for value in islice(good, 100) for name in value})
    try:
        if file_format == "csv":
            return _csv_header(path, _CsvLines(path, LARGEST_ROW))
        with path.open("rb") as handle, pq.ParquetFile(handle) as file:
            return list(file.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        raise _damage(path, file_format, 0, error) from None


def read_file(
    path: Path, file_format: FileFormat, separator: str | None = None, largest_row: int = LARGEST_ROW
) -> Iterator[RawRow]:
    """The file's rows in order; one of more than `largest_row` bytes is given as a problem.

    `separator` parts the documents of a text file; without one the whole file is one document. Raises DataError, while
    iterating, when the file as a whole can't be trusted: it can't be opened, holds no row, is torn, is something else.
    """
    last = 0
    try:
        for row in _rows(path, file_format, separator, largest_row):
            last = row.number
            yield row
    except (OSError, pa.ArrowException) as error:
        raise _damage(path, file_format, last, error) from None
    if not last:
        raise DataError(f"{path}: empty: it holds no rows; fill it, or take it out of the data")


def _rows(path: Path, file_format: FileFormat, separator: str | None, largest: int) -> Iterator[RawRow]:
    if file_format == "parquet":
        return _parquet(path, largest)
    if file_format == "csv":
        return _csv(path, largest)
    return _jsonl(path, largest) if file_format == "jsonl" else _text(path, separator, largest)


def _ending(path: Path) -> str:
    """The name's ending that tells the format: `.jsonl` of `a.jsonl.gz`; what can't be compressed keeps both."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return before if last in _COMPRESSIONS and _FORMATS.get(before) != "parquet" else last


def _files_in(folder: Path) -> list[Path]:
    """Raises OSError for a folder that can't be listed."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave its files out silently

    files: list[Path] = []
    others = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        shown = [Path(place, name) for name in names if not name.startswith((".", "_"))]
        known = [file for file in shown if _ending(file) in _FORMATS]
        files += known
        others += len(shown) - len(known)
    if not files:
        inside = f"none of its {others} files has a known ending" if others else "an empty folder"
        raise DataError(f"{folder}: {inside}; known are {_KNOWN}; others can be named by a pattern, with `format`")
    return sorted(files)


def _damage(path: Path, file_format: FileFormat, last: int, error: Exception) -> DataError:
    """What `error`, met after row number `last`, says about the file."""
    after = f" after {_UNITS[file_format]} {last:,}" if last else ""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: cannot be read{after}: {error.strerror}; check the path and its permissions")
    reason = str(error).strip().split("\n")[0].rstrip(".")
    if file_format == "parquet":
        return DataError(f"{path}: damaged, or not Parquet{after} ({reason}); copy or write the file again")
    return DataError(f"{path}: the compressed data is damaged or torn{after} ({reason}); copy or write the file again")


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a text file, decompressed, without a byte-order mark, with line ends \\n."""
    with path.open("rb") as file:
        codec = _COMPRESSIONS.get(path.suffix.lower())
        stream = pa.CompressedInputStream(file, codec) if codec else file
        chunk = b""
        while len(chunk) < max(map(len, _FOREIGN)) and (more := stream.read(CHUNK_BYTES)):
            chunk += more
        for start, reason in _FOREIGN.items():
            if chunk.startswith(start):
                raise DataError(f"{path}: {reason}")
        chunk = chunk.removeprefix(codecs.BOM_UTF8)
        waiting = b""  # a \r at a chunk's end: whether it is part of a line end, the next chunk tells
        while chunk:
            chunk = waiting + chunk
            waiting = b"\r" if chunk.endswith(b"\r") else b""
            yield chunk[: len(chunk) - len(waiting)].replace(b"\r\n", b"\n")
            chunk = stream.read(CHUNK_BYTES)
        yield waiting


def _pieces(chunks: Iterable[bytes], separator: bytes, largest: int) -> Iterator[tuple[bytes, bool, bool]]:
    """What `separator` parts (nothing does if it is empty), as (bytes, whether they are whole, whether the last one).

    Of a piece of more than `largest` bytes only the beginning is given. The last piece is what follows the last
    separator; it may be empty.
    """
    held, size = bytearray(), 0  # the beginning of a piece whose end is not yet read, and its size so far
    border = b""  # the last bytes read: a separator may have begun in them
    for chunk in chunks:
        pieces = (border + chunk).split(separator) if separator else [chunk]
        rest = pieces.pop()
        for piece in pieces:
            total = size + len(piece)
            if size:
                held += piece
                piece = bytes(held)
                held, size = bytearray(), 0
            yield (piece, True, False) if total <= largest else (piece[:_HEAD_BYTES], False, False)
        cut = max(0, len(rest) - max(0, len(separator) - 1))
        border = rest[cut:]
        held += rest[:cut]
        size += cut
        if size > largest:
            del held[_HEAD_BYTES:]
    held += border
    whole = size + len(border) <= largest
    yield bytes(held if whole else held[:_HEAD_BYTES]), whole, True


def _bad(number: int, problem: RowError, raw: bytes) -> RawRow:
    return RawRow(number, None, problem, raw[:_HEAD_BYTES].decode(errors="replace")[:RAW_CHARACTERS])


def _too_large(number: int, largest: int, raw: bytes) -> RawRow:
    return _bad(number, RowError("", f"row of more than {largest:,} bytes"), raw)


def _jsonl(path: Path, largest: int) -> Iterator[RawRow]:
    started = False
    for number, (line, whole, _) in enumerate(_pieces(_chunks(path), b"\n", largest), start=1):
        if not started and (content := line.strip()):
            started = True
            if content.startswith(b"[") or content == b"{":
                found = "an object over several lines" if content == b"{" else "a JSON array"
                raise DataError(f"{path}: {found}; write one object a line (jq -c '.[]' makes lines of an array)")
        if not whole:
            yield _too_large(number, largest, line)
            continue
        try:
            value = _DECODER.decode(line.decode())
        except (ValueError, RecursionError) as error:
            if line.strip():
                yield _bad(number, _json_problem(error, line), line)
            continue
        if isinstance(value, dict):
            yield RawRow(number, value)
        else:
            got = "null" if value is None else type(value).__name__
            yield _bad(number, RowError("", f"expected an object, got {got}"), line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises RowError for a key that stands twice, of which json would silently keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("", f"key {twice[:100]!r} stands twice")
    return value


def _constant(name: str) -> float:
    raise RowError("", f"not JSON: {name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _json_problem(error: ValueError | RecursionError, line: bytes) -> RowError:
    if isinstance(error, RowError):
        return RowError(error.column, error.reason)  # without the traceback, which would keep the row in memory
    if b"\0" in line:
        return RowError("", f"NUL at byte {line.index(0)}")
    if isinstance(error, UnicodeDecodeError):
        return RowError("", f"not UTF-8 at byte {error.start}")
    if isinstance(error, json.JSONDecodeError):
        return RowError("", f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    if isinstance(error, RecursionError):
        return RowError("", "JSON nested too deep")
    return RowError("", f"not JSON: {str(error).split(' for ')[0]}")  # a whole number of thousands of digits


class _RowTooLarge(Exception):
    """The row being read is larger than the largest allowed."""


class _CsvLines:
    """Lines for csv.reader, which takes as many as a row has; those after a row's first can be read again."""

    def __init__(self, path: Path, largest: int) -> None:
        self._pieces = _pieces(_chunks(path), b"\n", largest)
        self._again: deque[tuple[bytes, bool]] = deque()
        self._largest = largest
        self.number = 0
        """Of the line read last."""
        self.begin()

    def begin(self) -> None:
        """A new row starts with the next line."""
        self.taken: list[tuple[bytes, bool]] = []
        """The row's lines, each with whether it is whole."""
        self._size = 0
        self.bad_byte: str | None = None
        """What is wrong with the row's bytes."""

    def give_back(self) -> None:
        """The row's lines but its first are read again, as rows of their own."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        del self.taken[1:]

    def raw(self) -> bytes:
        return b"\n".join(line for line, _ in self.taken)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, whole = self._again.popleft() if self._again else next(self._pieces)[:2]
        self.taken.append((line, whole))
        self.number += 1
        before = self._size
        self._size += len(line) + 1
        if not whole or self._size > self._largest + 1:
            raise _RowTooLarge
        if b"\0" in line:
            self.bad_byte = self.bad_byte or f"NUL at byte {before + line.index(0)}"
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError as error:
            self.bad_byte = self.bad_byte or f"not UTF-8 at byte {before + error.start}"
            return line.decode(errors="surrogateescape") + "\n"


def _csv_reader(path: Path, lines: _CsvLines) -> Iterator[list[str]]:
    return csv.reader(lines, strict=True, delimiter="\t" if _ending(path) == ".tsv" else ",")


def _csv(path: Path, largest: int) -> Iterator[RawRow]:
    csv.field_size_limit(max(csv.field_size_limit(), min(largest + 1, 2**31 - 1)))  # of the process: never lowered
    lines = _CsvLines(path, largest)
    header = _csv_header(path, lines)
    reader = _csv_reader(path, lines)
    while True:
        lines.begin()
        number = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, _RowTooLarge) as error:
            # A quote that is never closed swallows the rows after it: only the line where it stands is given up.
            problem = RowError("", _csv_reason(error, lines, largest))
            lines.give_back()
            reader = _csv_reader(path, lines)
            yield _bad(number, problem, lines.raw())
            continue
        if len(fields) < 2 and not lines.taken[0][0].strip():
            continue
        if len(fields) != len(header):
            reason = f"the header has {len(header)} fields, this row {len(fields)}"
            yield _bad(number, RowError("", lines.bad_byte or reason), lines.raw())
        elif lines.bad_byte:
            bad = next(name for name, field in zip(header, fields, strict=True) if _NOT_TEXT.search(field))
            yield _bad(number, RowError(bad, lines.bad_byte), lines.raw())
        else:
            yield RawRow(number, dict(zip(header, fields, strict=True)))


_NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and what errors="surrogateescape" makes of a byte that is not UTF-8


def _csv_reason(error: Exception, lines: _CsvLines, largest: int) -> str:
    if isinstance(error, _RowTooLarge):
        one = len(lines.taken) == 1
        return f"{'row of more than' if one else 'a quoted field is not closed within'} {largest:,} bytes"
    if str(error) == "unexpected end of data":
        return "a quoted field is not closed"
    return f"not CSV: {str(error).split(' - ')[0]}"  # after the dash: how to open the file in Python


def _csv_header(path: Path, lines: _CsvLines) -> list[str]:
    names: list[str] = []
    reason = None
    try:
        for names in _csv_reader(path, lines):
            if len(names) > 1 or lines.taken[0][0].strip():
                break
            lines.begin()
        else:
            raise DataError(f"{path}: empty: no header row, no rows; fill it, or take it out of the data")
    except (csv.Error, _RowTooLarge) as error:
        reason = _csv_reason(error, lines, LARGEST_ROW)
    if lines.bad_byte or not "".join(names).strip() or any("\n" in name for name in names):
        reason = reason or lines.bad_byte or "no column names"
    if reason:
        raise DataError(f"{path}: no header row ({reason}); the first line must name the columns")
    _refuse_twice(path, names)
    return names


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}; give each a name of its own")


def _text(path: Path, separator: str | None, largest: int) -> Iterator[RawRow]:
    if separator == "":
        raise DataError(f"{path}: `separator` is empty; name one, or leave it out to read each file as one document")
    mark = (separator or "").replace("\r\n", "\n").encode()
    number = 0
    for index, (piece, whole, last) in enumerate(_pieces(_chunks(path), mark, largest)):
        if whole and not piece.strip():
            continue
        if last and mark and index == 0:
            raise DataError(
                f"{path}: the separator {separator!r} never occurs; name the one that parts the documents, or leave "
                "`separator` out to read each file as one document"
            )
        if not whole:
            number += 1
            yield _too_large(number, largest, piece)
        elif last and mark.strip() and not piece.endswith(b"\n"):
            number += 1
            reason = "cut off: the file ends without a separator or a newline after it"
            yield _bad(number, RowError("text", reason), piece)
        elif row := _document(number + 1, piece):
            number += 1
            yield row


def _document(number: int, piece: bytes) -> RawRow | None:
    """None if it is blank."""
    if b"\0" in piece:
        return _bad(number, RowError("text", f"NUL at byte {piece.index(0)}"), piece)
    try:
        text = piece.decode().strip()
    except UnicodeDecodeError as error:
        return _bad(number, RowError("text", f"not UTF-8 at byte {error.start}"), piece)
    return RawRow(number, {"text": text}) if text else None


def _parquet(path: Path, largest: int) -> Iterator[RawRow]:
    with path.open("rb") as handle:
        if not os.fstat(handle.fileno()).st_size:
            return
        # Read page by page: by default whole columns of a row group are, and a file may be a single row group.
        with pq.ParquetFile(handle, pre_buffer=False, buffer_size=CHUNK_BYTES, page_checksum_verification=True) as file:
            _refuse_twice(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
                values = _values(batch, largest)
                for index in range(batch.num_rows):
                    number += 1
                    yield RawRow(number, values[index]) if values else _one(batch.slice(index, 1), number, largest)


def _batch_rows(metadata: Any) -> int:
    """Rows of a batch: fewer where rows are big."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    fit = (_BATCH_BYTES * group.num_rows // max(1, group.total_byte_size) for group in groups)
    return max(1, min([_BATCH_ROWS, *map(int, fit)]))


def _values(batch: Any, largest: int) -> list[dict[str, Any]] | None:
    """None if one of the rows may have a problem."""
    try:
        return batch.to_pylist() if batch.nbytes <= largest else None
    except _NO_VALUE:
        return None


def _one(batch: Any, number: int, largest: int) -> RawRow:
    """The batch's only row; with a problem, its text columns are what is kept of it."""
    value: dict[str, Any] = {}
    problem = None
    for name, (cell,) in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = cell.as_py()
        except UnicodeDecodeError as error:
            problem = RowError(name, f"not UTF-8 at byte {error.start}")
            if isinstance(cell, pa.StringScalar):
                value[name] = cell.as_buffer().to_pybytes().decode(errors="replace")
        except _NO_VALUE as error:
            problem = RowError(name, f"can't be read: {error}")
    if problem is None and _size(value) <= largest:
        return RawRow(number, value)
    kept = {name: cell[:RAW_CHARACTERS] for name, cell in value.items() if isinstance(cell, str)}
    raw = json.dumps(kept, ensure_ascii=False).encode()
    return _bad(number, problem, raw) if problem else _too_large(number, largest, raw)


def _size(value: Any) -> int:
    """Bytes of the text in a row (Arrow's own count of a slice includes whole dictionaries)."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, inside))


_NO_VALUE = (ValueError, OverflowError, pa.ArrowException)  # a text that is not UTF-8, a date past the year 9999

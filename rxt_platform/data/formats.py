"""File formats: the raw rows of one file, each with its place, in bounded memory whatever the file's size.

A row that can't be read comes with its problem, and reading goes on after it. Damage that loses an unknown number of
rows (a torn file, a missing header) is a DataError for the whole file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rxt_platform.data.csv_rows import CsvLines, csv_header, csv_rows
from rxt_platform.data.paths import FileFormat
from rxt_platform.data.raw import (
    CHUNK_BYTES,
    LARGEST_ROW,
    RAW_CHARACTERS,
    RawRow,
    bad_row,
    chunks,
    pieces,
    refuse_twice,
    too_large,
)
from rxt_platform.data.rows import RowError
from rxt_platform.errors import DataError

_UNITS: dict[FileFormat, str] = {"parquet": "row", "jsonl": "line", "csv": "line", "text": "document"}
_BATCH_ROWS = 250  # of Parquet; fewer where that is more than
_BATCH_BYTES = 8 * 2**20


def columns_of(path: Path, file_format: FileFormat) -> list[str]:
    """The file's top-level columns; of JSON lines those of the first 100 rows that can be read. Raises DataError."""
    if file_format == "text":
        return ["text"]
    if file_format == "jsonl":
        good = (row.value for row in read_file(path, file_format) if row.problem is None)
        return list({name: None for value in islice(good, 100) for name in value})
    try:
        if file_format == "csv":
            return csv_header(path, CsvLines(path, LARGEST_ROW))
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
        return csv_rows(path, largest)
    return _jsonl(path, largest) if file_format == "jsonl" else _text(path, separator, largest)


def _damage(path: Path, file_format: FileFormat, last: int, error: Exception) -> DataError:
    """What `error`, met after row number `last`, says about the file."""
    after = f" after {_UNITS[file_format]} {last:,}" if last else ""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: cannot be read{after}: {error.strerror}; check the path and its permissions")
    reason = str(error).strip().split("\n")[0].rstrip(".")
    if file_format == "parquet":
        return DataError(f"{path}: damaged, or not Parquet{after} ({reason}); copy or write the file again")
    return DataError(f"{path}: the compressed data is damaged or torn{after} ({reason}); copy or write the file again")


def _jsonl(path: Path, largest: int) -> Iterator[RawRow]:
    started = False
    for number, (line, whole, _) in enumerate(pieces(chunks(path), b"\n", largest), start=1):
        if not started and (content := line.strip()):
            started = True
            if content.startswith(b"[") or content == b"{":
                found = "an object over several lines" if content == b"{" else "a JSON array"
                raise DataError(f"{path}: {found}; write one object a line (jq -c '.[]' makes lines of an array)")
        if not whole:
            yield too_large(number, largest, line)
            continue
        try:
            value = _DECODER.decode(line.decode())
        except (ValueError, RecursionError) as error:
            if line.strip():
                yield bad_row(number, _json_problem(error, line), line)
            continue
        if isinstance(value, dict):
            yield RawRow(number, value)
        else:
            got = "null" if value is None else type(value).__name__
            yield bad_row(number, RowError("", f"expected an object, got {got}"), line)


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


def _text(path: Path, separator: str | None, largest: int) -> Iterator[RawRow]:
    if separator == "":
        raise DataError(f"{path}: `separator` is empty; name one, or leave it out to read each file as one document")
    mark = (separator or "").replace("\r\n", "\n").encode()
    number = 0
    for index, (piece, whole, last) in enumerate(pieces(chunks(path), mark, largest)):
        if whole and not piece.strip():
            continue
        if last and mark and index == 0:
            raise DataError(
                f"{path}: the separator {separator!r} never occurs; name the one that parts the documents, or leave "
                "`separator` out to read each file as one document"
            )
        if not whole:
            number += 1
            yield too_large(number, largest, piece)
        elif last and mark.strip() and not piece.endswith(b"\n"):
            number += 1
            reason = "cut off: the file ends without a separator or a newline after it"
            yield bad_row(number, RowError("text", reason), piece)
        elif row := _document(number + 1, piece):
            number += 1
            yield row


def _document(number: int, piece: bytes) -> RawRow | None:
    """None if it is blank."""
    if b"\0" in piece:
        return bad_row(number, RowError("text", f"NUL at byte {piece.index(0)}"), piece)
    try:
        text = piece.decode().strip()
    except UnicodeDecodeError as error:
        return bad_row(number, RowError("text", f"not UTF-8 at byte {error.start}"), piece)
    return RawRow(number, {"text": text}) if text else None


def _parquet(path: Path, largest: int) -> Iterator[RawRow]:
    with path.open("rb") as handle:
        if not os.fstat(handle.fileno()).st_size:
            return
        # Read page by page: by default whole columns of a row group are, and a file may be a single row group.
        with pq.ParquetFile(handle, pre_buffer=False, buffer_size=CHUNK_BYTES, page_checksum_verification=True) as file:
            refuse_twice(path, file.schema_arrow.names)
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
    return bad_row(number, problem, raw) if problem else too_large(number, largest, raw)


def _size(value: Any) -> int:
    """Bytes of the text in a row (Arrow's own count of a slice includes whole dictionaries)."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, inside))


_NO_VALUE = (ValueError, OverflowError, pa.ArrowException)  # a text that is not UTF-8, a date past the year 9999

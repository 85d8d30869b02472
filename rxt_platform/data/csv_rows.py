"""CSV: the rows of a file, where a stray quote costs one row and not the rest of the file."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from rxt_platform.data.paths import ending_of
from rxt_platform.data.raw import LARGEST_ROW, RawRow, bad_row, chunks, pieces, refuse_twice
from rxt_platform.data.rows import RowError
from rxt_platform.errors import DataError


class _RowTooLarge(Exception):
    """The row being read is larger than the largest allowed."""


class CsvLines:
    """Lines for csv.reader, which takes as many as a row has; those after a row's first can be read again."""

    def __init__(self, path: Path, largest: int) -> None:
        self._pieces = pieces(chunks(path), b"\n", largest)
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


def _csv_reader(path: Path, lines: CsvLines) -> Iterator[list[str]]:
    return csv.reader(lines, strict=True, delimiter="\t" if ending_of(path) == ".tsv" else ",")


def csv_rows(path: Path, largest: int) -> Iterator[RawRow]:
    csv.field_size_limit(max(csv.field_size_limit(), min(largest + 1, 2**31 - 1)))  # of the process: never lowered
    lines = CsvLines(path, largest)
    header = csv_header(path, lines)
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
            yield bad_row(number, problem, lines.raw())
            continue
        if len(fields) < 2 and not lines.taken[0][0].strip():
            continue
        if len(fields) != len(header):
            reason = f"the header has {len(header)} fields, this row {len(fields)}"
            yield bad_row(number, RowError("", lines.bad_byte or reason), lines.raw())
        elif lines.bad_byte:
            bad = next(name for name, field in zip(header, fields, strict=True) if _NOT_TEXT.search(field))
            yield bad_row(number, RowError(bad, lines.bad_byte), lines.raw())
        else:
            yield RawRow(number, dict(zip(header, fields, strict=True)))


_NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and what errors="surrogateescape" makes of a byte that is not UTF-8


def _csv_reason(error: Exception, lines: CsvLines, largest: int) -> str:
    if isinstance(error, _RowTooLarge):
        one = len(lines.taken) == 1
        return f"{'row of more than' if one else 'a quoted field is not closed within'} {largest:,} bytes"
    if str(error) == "unexpected end of data":
        return "a quoted field is not closed"
    return f"not CSV: {str(error).split(' - ')[0]}"  # after the dash: how to open the file in Python


def csv_header(path: Path, lines: CsvLines) -> list[str]:
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
    refuse_twice(path, names)
    return names

"""Raw rows, and the pieces that a text file falls into, in bounded memory whatever the file's size."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rxt_platform.data.paths import COMPRESSIONS
from rxt_platform.data.rows import RowError
from rxt_platform.errors import DataError

LARGEST_ROW = 16 * 2**20
"""Bytes; the largest row that is read. Memory while reading is a small multiple of it."""
CHUNK_BYTES = 2**20
"""Bytes read at a time."""
RAW_CHARACTERS = 2_000
"""What is kept of a row with a problem."""

_FOREIGN = {  # how files start that are no text: none of it is UTF-8 that a text would start with
    codecs.BOM_UTF16_LE: "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "gzip data, not text: let the file's name end with .gz",
    b"\x28\xb5\x2f\xfd": "zstd data, not text: let the file's name end with .zst",
    b"\xfd7zXZ\0": "xz data, not text: decompress it, or compress it as .gz or .zst",
    b"PK\x03\x04": "a zip archive, not text: unpack it",
    b"PAR1": "Parquet, not text: let the file's name end with .parquet, or set `format` to parquet",
}
HEAD_BYTES = 4 * RAW_CHARACTERS  # a character takes at most 4 bytes


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


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a text file, decompressed, without a byte-order mark, with line ends \\n."""
    with path.open("rb") as file:
        codec = COMPRESSIONS.get(path.suffix.lower())
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


def pieces(chunks: Iterable[bytes], separator: bytes, largest: int) -> Iterator[tuple[bytes, bool, bool]]:
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
            yield (piece, True, False) if total <= largest else (piece[:HEAD_BYTES], False, False)
        cut = max(0, len(rest) - max(0, len(separator) - 1))
        border = rest[cut:]
        held += rest[:cut]
        size += cut
        if size > largest:
            del held[HEAD_BYTES:]
    held += border
    whole = size + len(border) <= largest
    yield bytes(held if whole else held[:HEAD_BYTES]), whole, True


def bad_row(number: int, problem: RowError, raw: bytes) -> RawRow:
    return RawRow(number, None, problem, raw[:HEAD_BYTES].decode(errors="replace")[:RAW_CHARACTERS])


def too_large(number: int, largest: int, raw: bytes) -> RawRow:
    return bad_row(number, RowError("", f"row of more than {largest:,} bytes"), raw)


def refuse_twice(path: Path, names: list[str]) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise DataError(f"{path}: two columns are named {twice[0]!r}; give each a name of its own")

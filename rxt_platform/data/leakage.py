"""Leakage: does a training row say again what a held-out row says, word for word or nearly so?

The check of GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C): rows are compared by their words alone, as sets of
word n-grams (shingles). GPT-3 drops a row for one shared n-gram of 8 to 13 words; here the overlap of two sets is
counted instead, because rows written from the same phrases share single n-grams by right. The overlap is Broder's
containment (1997, "On the resemblance and containment of documents") of the row with fewer shingles in the other,
|A ∩ B| / min(|A|, |B|): it stays high when a held-out row is quoted inside a longer training row, where resemblance,
|A ∩ B| / |A ∪ B|, would drop.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rxt_platform.data.rows import RowError

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it modulo 2^64 loses nothing
_CACHED_WORDS = 1 << 17  # word hashes kept at a time, ~16 MB: a training set's distinct words have no bound
_CELLS_PER_SHINGLE = 8  # in the table that sorts out shingles that no held-out row has; at most 1 in 8 passes wrongly


@dataclass(frozen=True)
class Duplicate:
    """The held-out row that a training row repeats."""

    row: int
    """Index of the held-out row, in the order of `HeldOutIndex.add`."""
    exact: bool
    """Whether the two hold the same words in the same order."""
    overlap: float
    """Share of the shorter one's distinct shingles that the other holds too; 1 for an exact duplicate."""

    def of(self, place: str) -> RowError:
        """Why a row that repeats the held-out one at `place` can't be used."""
        what = "duplicate" if self.exact else f"near duplicate ({self.overlap:.0%} of its 8-grams)"
        return RowError("", f"{what} of the held-out row {place}")


class HeldOutIndex:
    """The held-out rows' fingerprints: `add` them all, then ask `find` about training rows, batch by batch.

    Two rows with the same words are exact duplicates; otherwise they are near duplicates if their overlap is at least
    `threshold` and both have `shortest` distinct shingles or more. Short rows are compared exactly only: two questions
    made from one template share most of their words and are still two questions. By default that is rows of fewer than
    23 words (23 words have 16 shingles of 8). A row without any word duplicates nothing.

    Hashes are BLAKE2b and arithmetic modulo 2^64, so the answers are the same on every machine; a false match needs a
    collision of 64-bit (near) or 128-bit (exact) hashes. Memory is that of the held-out rows: ~60
    bytes per shingle, and twice that while they are indexed.
    """

    def __init__(self, shingle: int = 8, threshold: float = 0.8, shortest: int = 16) -> None:
        """`shingle` is in words. Raises ValueError for settings under which every row or no row would match."""
        if shingle < 1 or shortest < 1:
            raise ValueError(f"shingle ({shingle}) and shortest ({shortest}) must be at least 1")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a share above 0 and at most 1, not {threshold}")
        self.shingle = shingle
        self.threshold = threshold
        self.shortest = shortest
        self._rows = 0
        self._exact: dict[bytes, int] = {}
        self._parts: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        self._hashes = _WordHashes()

    def add(self, texts: Sequence[str]) -> None:
        """Take in held-out rows, which are numbered on from those already added."""
        words = [_words(text) for text in texts]
        for row, row_words in enumerate(words, self._rows):
            if row_words:  # else every row without words would be its duplicate
                self._exact.setdefault(_fingerprint(row_words), row)
        shingles, rows = self._shingles(words)
        self._parts.append((shingles, rows + self._rows))
        self._rows += len(texts)
        self.__dict__.pop("_postings", None)  # they are built again when next asked for

    def find(self, texts: Sequence[str]) -> list[Duplicate | None]:
        """For each training row the held-out row that it repeats, or None.

        An exact duplicate goes before a near one, then the larger overlap, then the row that was added first.
        """
        words = [_words(text) for text in texts]
        found: list[Duplicate | None] = [None] * len(texts)
        for i, row_words in enumerate(words):
            if (row := self._exact.get(_fingerprint(row_words))) is not None:
                found[i] = Duplicate(row, exact=True, overlap=1.0)
        shingles, rows = self._shingles(words)
        where, entries = self._postings.look_up(shingles)
        # No overlap can be larger than this one: it counts repeated shingles too and divides by the least divisor.
        most = np.bincount(rows[where], minlength=len(texts)) / self.shortest
        bounds = np.searchsorted(rows, np.arange(len(texts) + 1))
        hit_bounds = np.searchsorted(where, bounds)
        for i in np.flatnonzero(most >= self.threshold).tolist():
            if found[i] is None:
                own = np.unique(shingles[bounds[i] : bounds[i + 1]]).size
                found[i] = self._nearest(own, np.unique(entries[hit_bounds[i] : hit_bounds[i + 1]]))
        return found

    def _nearest(self, own: int, entries: NDArray[np.int64]) -> Duplicate | None:
        """The best match of a row with `own` distinct shingles, of which the index has `entries`."""
        if own < self.shortest:
            return None
        postings = self._postings
        shared = np.bincount(postings.rows_of(entries), minlength=self._rows)
        overlaps = shared / np.minimum(own, np.maximum(postings.sizes, 1))
        row = int(overlaps.argmax())
        overlap = float(overlaps[row])
        return Duplicate(row, exact=False, overlap=overlap) if overlap >= self.threshold else None

    def _shingles(self, words: Sequence[list[str]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of all shingles, uint64 [K], and the row of each, int64 [K], ascending; repeated ones included."""
        lengths = [len(row_words) for row_words in words]
        hashes = np.fromiter(
            map(self._hashes.__getitem__, chain.from_iterable(words)), dtype=np.uint64, count=sum(lengths)
        )
        starts = max(len(hashes) - self.shingle + 1, 0)
        rolled = hashes[:starts]
        for k in range(1, self.shingle):
            rolled = rolled * _MULTIPLIER + hashes[k : k + starts]
        rows = np.repeat(np.arange(len(words)), lengths)
        inside = rows[:starts] == rows[self.shingle - 1 :]  # the others begin in one row and end in another
        return rolled[inside], rows[:starts][inside]

    @cached_property
    def _postings(self) -> "_Postings":
        shingles = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in self._parts)])
        rows = np.concatenate([np.empty(0, np.int64), *(part for _, part in self._parts)])
        return _Postings(shingles, rows, self._rows, self.shortest)


def words_key(text: str) -> int | None:
    """A 64-bit number that exact duplicates share: texts of the same words in the same order. None without a word."""
    words = _words(text)
    return int.from_bytes(_fingerprint(words)[:8], "little") if words else None


class _Postings:
    """Which held-out rows hold a shingle: an inverted index over the rows with `shortest` distinct shingles or more."""

    def __init__(self, shingles: NDArray[np.uint64], rows: NDArray[np.int64], total_rows: int, shortest: int) -> None:
        """Build from pairs (shingle, row), both [K], in any order and with repetitions."""
        order = np.lexsort((rows, shingles))
        shingles, rows = shingles[order], rows[order]
        distinct = np.ones(len(rows), dtype=bool)
        distinct[1:] = (shingles[1:] != shingles[:-1]) | (rows[1:] != rows[:-1])
        shingles, rows = shingles[distinct], rows[distinct]
        self.sizes = np.bincount(rows, minlength=total_rows)
        """int64 [rows]: distinct shingles of each row."""
        long_enough = self.sizes[rows] >= shortest
        self._rows = rows[long_enough]
        self._shingles, first = np.unique(shingles[long_enough], return_index=True)
        self._starts = np.append(first, len(self._rows))  # shingle e is in rows[starts[e]:starts[e + 1]]
        # Looking a shingle up by bisection costs more than all else together, and most are in no held-out row. A table
        # of their first bits says so in one step.
        bits = (_CELLS_PER_SHINGLE * len(self._shingles) + 1).bit_length()
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[self._shingles >> self._shift] = True

    def look_up(self, shingles: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in `shingles` of those that some row holds, int64 [hits], ascending, and the entry of each."""
        where = np.flatnonzero(self._table[shingles >> self._shift])
        entries = np.searchsorted(self._shingles, shingles[where])
        entries = np.minimum(entries, len(self._shingles) - 1)  # past the end: it will not be equal to the last one
        held = self._shingles[entries] == shingles[where]
        return where[held], entries[held]

    def rows_of(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that hold each of `entries` [E], one after the other; a row as often as it holds one of them."""
        return np.concatenate([self._rows[self._starts[entry] : self._starts[entry + 1]] for entry in entries])


class _WordHashes(dict[str, int]):
    """64-bit hash of a word, kept for the next time."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()  # frequent words are back at once
        self[word] = value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


class _Characters(dict[int, int | str | None]):
    """For `str.translate`: what becomes of each character, by its Unicode category."""

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        category = unicodedata.category(character)
        kept: int | str | None = " "
        if category == "Cf":  # soft hyphens, joiners, byte-order marks: nobody sees them
            kept = None
        elif category == "Lo" and unicodedata.east_asian_width(character) == "W":
            kept = f" {character} "  # Chinese and Japanese have no spaces: every character counts as a word
        elif category[0] in "LMN":
            kept = code
        self[code] = kept
        return kept


_CHARACTERS = _Characters()


def _words(text: str) -> list[str]:
    """The words of a text in NFC and without case: runs of letters, marks and digits; all else is space."""
    return unicodedata.normalize("NFC", text).casefold().translate(_CHARACTERS).split()


def _fingerprint(words: Sequence[str]) -> bytes:
    return blake2b(" ".join(words).encode(), digest_size=16).digest()

"""Packing: several documents in one row of a fixed number of tokens, decided once for a data set.

Best-fit decreasing, the packing of "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830):
from the longest document to the shortest, each goes into the row with the least room that still holds it, or opens a
new row. Documents stay whole.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packs:
    """Rows of several documents. N documents, P packs.

    order   int64 [N], document indices, pack after pack
    starts  int64 [P + 1]: pack p holds order[starts[p]:starts[p + 1]]
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, pack: int) -> NDArray[np.int64]:
        """Indices of a pack's documents, int64 [documents]; packs are counted from 0."""
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.order[self.starts[pack] : self.starts[pack + 1]]


def pack(lengths: NDArray[np.integer], capacity: int, seed: int) -> Packs:
    """Put documents of `lengths` tokens, integers [N], into packs of at most `capacity` tokens, each into exactly one.

    A function of the arguments alone. Documents of one length are interchangeable and meet at random; documents within
    a pack and the packs themselves are in random order, so that the first packs are a fair sample of all.
    Raises ValueError for a document that is empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be integers [N], not {lengths.dtype} {list(lengths.shape)}")
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise ValueError(
            f"document {wrong[0]} has {lengths[wrong[0]]} tokens, and a pack holds 1 to {capacity} of them "
            f"({wrong.size} such documents): leave out empty documents and cut long ones into pieces first"
        )
    rng = np.random.default_rng([seed, 3])  # 3: apart from the sampler's and the masking's streams of the same seed
    shuffled = rng.permutation(len(lengths))
    packs = _best_fit(lengths[shuffled].astype(np.int64), capacity)
    packs = rng.permutation(packs.max(initial=-1) + 1)[packs]
    starts = np.concatenate([[0], np.cumsum(np.bincount(packs))]).astype(np.int64)
    return Packs(order=shuffled[np.argsort(packs, kind="stable")], starts=starts)


def _best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The pack of every document, int64 [N], by best-fit decreasing; packs are numbered as they open.

    The documents of one length are placed together, which changes nothing: the pack with the least room that holds such
    a document is, with one of them inside, still the tightest for the next if it has room for it. So each pack in turn
    takes as many as it holds. The work in Python is per group of packs that were filled alike, not per document.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    packs = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms()
    opened = placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        documents = order[placed : placed + counts[length]]
        placed += len(documents)
        while len(documents):
            room = rooms.tightest(length)
            if room is None:
                room = capacity
                opening = -(-len(documents) // (capacity // length))
                candidates = np.arange(opened, opened + opening)
                opened += opening
            else:
                candidates = rooms.take(room)
            each = room // length
            full, rest = divmod(min(len(documents), each * len(candidates)), each)
            filled = np.repeat(candidates[: full + (rest > 0)], each)[: full * each + rest]
            packs[documents[: len(filled)]] = filled
            documents = documents[len(filled) :]
            rooms.put(room - each * length, candidates[:full])
            rooms.put(room - rest * length, candidates[full : full + 1])  # the last to be filled, or one that was not
            rooms.put(room, candidates[full + 1 :])
    return packs


class _Rooms:
    """Open packs by their room: the tokens that a pack still holds."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # ascending: the keys of `_packs`
        self._packs: dict[int, list[NDArray[np.int64]]] = {}

    def tightest(self, length: int) -> int | None:
        """The least room of at least `length` that some pack has."""
        at = bisect_left(self._sizes, length)
        return self._sizes[at] if at < len(self._sizes) else None

    def take(self, room: int) -> NDArray[np.int64]:
        """Some of the packs with this room: those of one `put`. They are closed until they are put back."""
        packs = self._packs[room].pop()
        if not self._packs[room]:
            del self._packs[room]
            del self._sizes[bisect_left(self._sizes, room)]
        return packs

    def put(self, room: int, packs: NDArray[np.int64]) -> None:
        """Open `packs` [count] with this room; full ones stay closed."""
        if room == 0 or not len(packs):
            return
        if room not in self._packs:
            insort(self._sizes, room)
            self._packs[room] = []
        self._packs[room].append(packs)  # not joined: joining them anew for each length would copy them all

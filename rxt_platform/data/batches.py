"""Batches: rows as padded tensors, identical however many workers share them.

Every rank forms the whole global batch and takes its part, so the numbers that normalise a loss (`totals`) are known
everywhere without communication, and all randomness comes from a row's own seed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rxt_platform.data.examples import Example
from rxt_platform.data.tokenizer import PAD, SPECIAL_TOKENS

_BY_TOKEN = ("ids", "mask", "targets", "hidden")  # [B, N, T]


@dataclass(frozen=True)
class Batch:
    """Rows of one step. B rows, N turns, T tokens; absent turns are one unmasked `[PAD]` (`turns` False).

    A packed row holds several texts, one after the other, in its only turn.

    ids      int64 [B, N, T], right-padded
    mask     bool  [B, N, T], True at real tokens
    targets  bool  [B, N, T], True at tokens to be predicted (from the position before)
    turns    bool  [B, N], True where the row has that turn
    seeds    int64 [B], each row's own randomness at this step
    rows     int64 [B], index of the row in its data set
    hidden   bool  [B, N, T], tokens that the masked encoder must guess, or all False
    documents  int64 [B, T] of packed rows: a token's text, counted from 0 in each row, -1 at padding; else None
    most_documents  texts of the fullest packed row of the global batch
    total_*  numbers over the whole global batch, whatever part of it this is; a text is a row, or one of a packed row
    longest  tokens of the longest interaction of the global batch
    turn_lengths  tokens of the longest interaction of each turn, among the rows that all workers compute at this time
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    turns: Tensor
    seeds: Tensor
    rows: Tensor
    hidden: Tensor
    documents: Tensor | None
    most_documents: int
    total_rows: int
    total_texts: int
    total_targets: int
    total_hidden: int
    total_turns: int
    longest: int
    turn_lengths: tuple[int, ...]

    @property
    def total_follow_ups(self) -> int:
        """Turns after the first, over the whole global batch."""
        return self.total_turns - self.total_rows

    def part(self, start: int, stop: int) -> "Batch":
        """Rows start..stop of this batch; the totals stay those of the global batch."""
        return replace(self, **{name: value[start:stop] for name, value in self._tensors()})

    def shares(self, rank: int, world: int, micro: int) -> Iterator["Batch"]:
        """The micro-batches of one of `world` workers, `micro` rows each.

        Neighbouring rows are of like length. So of each `world * micro` of them, cut to the turns and tokens that they
        have, every worker takes its part: all do the same amount of work on the same shapes at the same time.
        """
        for start in range(0, len(self.rows), world * micro):
            yield self.part(start, start + world * micro).trimmed().part(rank * micro, (rank + 1) * micro)

    def trimmed(self) -> "Batch":
        """Without turns and positions that none of its rows has."""
        turns = int(self.turns.sum(dim=1).max())
        lengths = self.mask[:, :turns].sum(dim=-1).amax(dim=0).tolist()
        kept = {name: value[:, :turns] for name, value in self._tensors() if name in (*_BY_TOKEN, "turns")}
        kept |= {name: kept[name][:, :, : max(lengths)] for name in _BY_TOKEN}
        if self.documents is not None:
            kept["documents"] = self.documents[:, : max(lengths)]
        return replace(self, turn_lengths=tuple(lengths), **kept)

    def rows_at(self, index: Tensor) -> "Batch":
        """The rows at `index` int64 [rows], in this order; the totals stay those of the global batch."""
        return replace(self, **{name: value[index] for name, value in self._tensors()})

    def as_global(self) -> "Batch":
        """These rows, none of them packed, as a global batch of their own."""
        return replace(
            self,
            total_rows=len(self.rows),
            total_texts=len(self.rows),
            total_targets=int(self.targets.sum()),
            total_hidden=int(self.hidden.sum()),
            total_turns=int(self.turns.sum()),
            longest=int(self.mask.sum(dim=-1).max()),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    def digests(self) -> list[str]:
        """A hash of what each row trains on: ids, targets, hidden tokens, seed. Padding does not count."""
        made = []
        for b in range(len(self.rows)):
            digest = hashlib.blake2b(digest_size=16)
            real = self.mask[b] & self.turns[b][:, None]
            for value in (self.ids, self.targets, self.hidden):
                digest.update(value[b][real].numpy().tobytes())
            digest.update(real.sum(dim=-1)[self.turns[b]].numpy().tobytes())
            if self.documents is not None:
                digest.update(self.documents[b][real[0]].numpy().tobytes())
            digest.update(self.seeds[b].numpy().tobytes() + self.rows[b].numpy().tobytes())
            made.append(digest.hexdigest())
        return made

    @property
    def real_share(self) -> float:
        """Real tokens over all positions that the tensors hold."""
        return self.tokens / self.mask.numel()

    def _tensors(self) -> list[tuple[str, Any]]:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, value) for name, value in values if isinstance(value, Tensor)]

    @property
    def tokens(self) -> int:
        """Real tokens in this part."""
        return int((self.mask & self.turns.unsqueeze(-1)).sum())


def collate(
    examples: Sequence[Example],
    seeds: Sequence[int],
    rows: Sequence[int],
    mask_probability: float = 0.0,
    documents: Sequence[int] | None = None,
) -> Batch:
    """Pad rows into a `Batch`; with a `mask_probability`, choose the tokens that the masked encoder must guess.

    Of packed rows, `documents` says how many of the `examples` (of one turn each) each row takes.
    """
    if documents is not None:
        return _collate_packed(examples, seeds, rows, mask_probability, documents)
    turns = max(len(example.turns) for example in examples)
    length = max(len(turn) for example in examples for turn in example.turns)
    shape = (len(examples), turns, length)
    ids = np.full(shape, PAD, dtype=np.int64)
    mask, targets = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    present = np.zeros(shape[:2], dtype=bool)
    mask[:, :, 0] = True  # an absent turn keeps one readable position, so that no attention row is empty
    for b, example in enumerate(examples):
        for n, (turn, start) in enumerate(zip(example.turns, example.target_starts, strict=True)):
            ids[b, n, : len(turn)] = turn
            mask[b, n, : len(turn)] = True
            targets[b, n, start : len(turn)] = True
            present[b, n] = True
    return _batch(ids, mask, targets, present, seeds, rows, mask_probability)


def _collate_packed(
    examples: Sequence[Example],
    seeds: Sequence[int],
    rows: Sequence[int],
    mask_probability: float,
    documents: Sequence[int],
) -> Batch:
    """Rows of several texts."""
    ends = np.cumsum(documents)
    texts = [example.turns[0] for example in examples]
    length = max(sum(map(len, texts[end - count : end])) for count, end in zip(documents, ends, strict=True))
    shape = (len(documents), 1, length)
    ids = np.full(shape, PAD, dtype=np.int64)
    number = np.full((len(documents), length), -1, dtype=np.int64)
    targets = np.zeros(shape, dtype=bool)
    for b, (count, end) in enumerate(zip(documents, ends.tolist(), strict=True)):
        at = 0
        for document in range(count):
            example = examples[end - count + document]
            text, stop = example.turns[0], at + len(example.turns[0])
            ids[b, 0, at:stop] = text
            number[b, at:stop] = document
            targets[b, 0, at + example.target_starts[0] : stop] = True
            at = stop
    mask = (number >= 0)[:, None]
    present = np.ones(shape[:2], dtype=bool)
    return _batch(ids, mask, targets, present, seeds, rows, mask_probability, number, documents)


def _batch(
    ids: np.ndarray,
    mask: np.ndarray,
    targets: np.ndarray,
    present: np.ndarray,
    seeds: Sequence[int],
    rows: Sequence[int],
    mask_probability: float,
    number: np.ndarray | None = None,
    documents: Sequence[int] = (),
) -> Batch:
    hidden = np.zeros_like(mask)
    if mask_probability:
        for b, seed in enumerate(seeds):
            hidden[b] = _hide(mask[b] & present[b][:, None], ids[b], seed, mask_probability)
    return Batch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        targets=torch.from_numpy(targets),
        turns=torch.from_numpy(present),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        hidden=torch.from_numpy(hidden),
        documents=None if number is None else torch.from_numpy(number),
        most_documents=max(documents, default=1),
        total_rows=len(ids),
        total_texts=sum(documents) if documents else len(ids),
        total_targets=int(targets.sum()),
        total_hidden=int(hidden.sum()),
        total_turns=int(present.sum()),
        longest=int(mask.sum(axis=2).max()),
        turn_lengths=tuple(mask.sum(axis=2).max(axis=0).tolist()),
    )


def _hide(real: np.ndarray, ids: np.ndarray, seed: int, probability: float) -> np.ndarray:
    """Positions to mask: each real, not special token with `probability` (REF 3.1, but markers stay readable)."""
    ordinary = real & (ids >= len(SPECIAL_TOKENS))
    return ordinary & (np.random.default_rng([seed, 2]).random(ids.shape) < probability)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

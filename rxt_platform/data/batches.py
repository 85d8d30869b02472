"""Batches: which rows a step trains on, padded into tensors, identical however many workers share them.

Every rank forms the whole global batch and takes its part, so the numbers that normalise a loss (`totals`) are known
everywhere without communication, and all randomness comes from a row's own seed. A step's batch is a function of
(seed, step): resuming needs no sampler state.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rxt_platform.data.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, EncodedInteraction, RxtTokenizer
from rxt_platform.errors import DataError


@dataclass(frozen=True)
class Example:
    """One row as token ids: its turns (one for a text or a single interaction) and where each turn's targets start."""

    turns: tuple[tuple[int, ...], ...]
    target_starts: tuple[int, ...]
    truncated: int = 0  # turns whose answer was cut at the window

    @classmethod
    def from_interactions(cls, interactions: Sequence[EncodedInteraction]) -> Self:
        """A conversation whose targets are the answers, `[EOS]` included (DESIGN 2)."""
        return cls(
            tuple(turn.ids for turn in interactions),
            tuple(turn.answer_start for turn in interactions),
            sum(turn.truncated for turn in interactions),
        )

    def first_turns(self, turns: int | None) -> "Example":
        """The example cut to its first `turns` turns."""
        return self if turns is None else Example(self.turns[:turns], self.target_starts[:turns])


def text_examples(text: str, tokenizer: RxtTokenizer, max_length: int) -> list[Example]:
    """`[BOS]text[EOS]` cut into windows of `max_length` tokens; every real token is a target (DESIGN 2)."""
    ids = [BOS, *tokenizer.encode(text), EOS]
    windows = [tuple(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]
    return [Example((window,), (1,)) for window in windows if len(window) > 1]


@dataclass(frozen=True)
class Batch:
    """Rows of one step. B rows, N turns, T tokens; absent turns are one unmasked `[PAD]` (`turns` False).

    ids      int64 [B, N, T], right-padded
    mask     bool  [B, N, T], True at real tokens
    targets  bool  [B, N, T], True at tokens to be predicted (from the position before)
    turns    bool  [B, N], True where the row has that turn
    seeds    int64 [B], each row's own randomness at this step
    rows     int64 [B], index of the row in its data set
    hidden   bool  [B, N, T], tokens that the masked encoder must guess, or all False
    total_*  numbers over the whole global batch, whatever part of it this is
    turn_lengths  longest interaction of each turn in the global batch, in tokens
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    turns: Tensor
    seeds: Tensor
    rows: Tensor
    hidden: Tensor
    total_rows: int
    total_targets: int
    total_hidden: int
    total_turns: int
    turn_lengths: tuple[int, ...]

    @property
    def total_follow_ups(self) -> int:
        """Turns after the first, over the whole global batch."""
        return self.total_turns - self.total_rows

    def part(self, start: int, stop: int) -> "Batch":
        """Rows start..stop of this batch; the totals stay those of the global batch."""
        return replace(self, **{name: getattr(self, name)[start:stop] for name in _tensor_names()})

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _tensor_names()})

    @property
    def tokens(self) -> int:
        """Real tokens in this part."""
        return int((self.mask & self.turns.unsqueeze(-1)).sum())


def _tensor_names() -> list[str]:
    return [field.name for field in fields(Batch) if field.type is Tensor or field.type == "Tensor"]


class BatchSampler:
    """The rows of every step: epochs are permutations by (seed, epoch), batches run on across their ends.

    `lessons` are (epochs, turns): conversations are cut to `turns` for that long, one lesson after the other.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        global_batch_size: int,
        seed: int,
        mask_probability: float = 0.0,
        lessons: Sequence[tuple[float, int]] = (),
    ) -> None:
        if not examples:
            raise DataError("no rows to train on")
        self.examples = examples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.mask_probability = mask_probability
        ends = accumulate(epochs for epochs, _ in lessons)
        self._lessons = [(self.steps(end), turns) for end, (_, turns) in zip(ends, lessons, strict=True)]
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes over the rows take (at least one)."""
        return max(1, round(epochs * len(self.examples) / self.global_batch_size))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.examples))
        return int(self._permutation[offset])

    def global_batch(self, step: int) -> Batch:
        """The whole batch of a step (counted from 0)."""
        first = step * self.global_batch_size
        rows = [self._row(first + i) for i in range(self.global_batch_size)]
        seeds = [derive_seed(self.seed, step, i) for i in range(self.global_batch_size)]
        turns = next((turns for end, turns in self._lessons if step < end), None)
        examples = [self.examples[row].first_turns(turns) for row in rows]
        return collate(examples, seeds, rows, self.mask_probability)


def collate(
    examples: Sequence[Example], seeds: Sequence[int], rows: Sequence[int], mask_probability: float = 0.0
) -> Batch:
    """Pad rows into a `Batch`; with a `mask_probability`, choose the tokens that the masked encoder must guess."""
    turns = max(len(example.turns) for example in examples)
    length = max(len(turn) for example in examples for turn in example.turns)
    shape = (len(examples), turns, length)
    ids = np.full(shape, PAD, dtype=np.int64)
    mask, targets, hidden = (np.zeros(shape, dtype=bool) for _ in range(3))
    present = np.zeros(shape[:2], dtype=bool)
    mask[:, :, 0] = True  # an absent turn keeps one readable position, so that no attention row is empty
    for b, example in enumerate(examples):
        for n, (turn, start) in enumerate(zip(example.turns, example.target_starts, strict=True)):
            ids[b, n, : len(turn)] = turn
            mask[b, n, : len(turn)] = True
            targets[b, n, start : len(turn)] = True
            present[b, n] = True
        if mask_probability:
            hidden[b] = _hide(mask[b] & present[b][:, None], ids[b], seeds[b], mask_probability)
    return Batch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        targets=torch.from_numpy(targets),
        turns=torch.from_numpy(present),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        hidden=torch.from_numpy(hidden),
        total_rows=len(examples),
        total_targets=int(targets.sum()),
        total_hidden=int(hidden.sum()),
        total_turns=int(present.sum()),
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

"""Which rows a step trains on: a function of (seed, step) alone.

So resuming needs no sampler state, and any number of workers sees the same batches. An epoch is a permutation by
(seed, epoch) in which each row stands once, or as often as its source's weight says; batches run on across its end.
Padding is saved without changing what a step trains on:

- a batch's rows are sorted by length, so that the micro-batches which workers take from it hold rows of like length
  (`Batch.shares`);
- with packing, several texts share a row of one or more of the model's windows, chosen once (`data/packing.py`).

Whole batches of like length would save more, but a step then trains on like rows, and learns less from them
(benchmarks/LOG.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rxt_platform.data.batches import Batch, collate, derive_seed
from rxt_platform.data.examples import Example, ExampleSet
from rxt_platform.data.packing import Packs, pack
from rxt_platform.errors import DataError

_ANSWERS_AT_ONCE = 1024
"""Sequences of one forward: each reads a memory of its own."""


@dataclass(frozen=True)
class Sampling:
    """How rows become batches.

    `lessons` are (epochs, turns): conversations are cut to `turns` for that long, one lesson after the other.
    `capacity` is a packed row's tokens, None without packing. Without `system_prompts` conversations begin with their
    first turn. `weights` are those of the sources, in their order.
    """

    global_batch_size: int
    seed: int
    epochs: float = 1.0
    mask_probability: float = 0.0
    lessons: Sequence[tuple[float, int]] = ()
    capacity: int | None = None
    system_prompts: bool = True
    weights: Sequence[float] = ()


class BatchSampler:
    """Batches of a stage's training rows. A row is an example, or with packing a pack of them."""

    def __init__(self, examples: Sequence[Example], sampling: Sampling) -> None:
        if not len(examples):
            raise DataError("no rows to train on")
        self.examples = examples if isinstance(examples, ExampleSet) else ExampleSet(examples)
        self.sampling = sampling
        self.global_batch_size = sampling.global_batch_size
        self._lengths, self._starts = self.examples.turn_lengths
        sources = self.examples.sources
        self._packs = self._pack(sources) if sampling.capacity else None
        if self._packs is not None:
            sources = sources[self._packs.order[self._packs.starts[:-1]]]
        self._plan = _EpochPlan(sources, sampling.weights, sampling.seed)
        self.rows = self._plan.size
        self.total_steps = self.steps(sampling.epochs)
        ends = accumulate(epochs for epochs, _ in sampling.lessons)
        self._lessons = [(self.steps(end), turns) for end, (_, turns) in zip(ends, sampling.lessons, strict=True)]

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes over the rows take (at least one)."""
        return max(1, round(epochs * self.rows / self.global_batch_size))

    @property
    def resumable_every(self) -> int:
        """Steps after which training can go on from the weights alone: every one."""
        return 1

    @property
    def changes(self) -> list[int]:
        """Steps from which on conversations are cut elsewhere than before."""
        return [end for end, _ in self._lessons]

    def global_batch(self, step: int) -> Batch:
        """The whole batch of a step (counted from 0)."""
        sampling = self.sampling
        rows = self._rows(step).tolist()
        seeds = [derive_seed(sampling.seed, step, i) for i in range(self.global_batch_size)]
        if self._packs is not None:
            members = [self._packs.documents(row).tolist() for row in rows]
            examples = [self.examples[i] for group in members for i in group]
            return collate(examples, seeds, rows, sampling.mask_probability, [len(group) for group in members])
        turns = self._turns_at(step)
        examples = [self.examples[row].first_turns(turns) for row in rows]
        if not sampling.system_prompts:
            examples = [example.without_opening() for example in examples]
        return collate(examples, seeds, rows, sampling.mask_probability)

    def forward_rows(self, rows: int, world: int, overhead: int) -> int:
        """How many of a worker's `rows` of a step one forward should take: the divisor that computes least.

        Fewer rows of like length are padded less, but a further forward costs as much as `overhead` positions. Counted
        over eight steps, evenly taken from all of them.
        """
        steps = sorted({number * self.total_steps // 8 for number in range(8)})
        batches = [self.global_batch(step) for step in steps]

        def cost(micro: int) -> int:
            shares = [part for batch in batches for part in batch.shares(0, world, micro)]
            return sum(part.mask.numel() + overhead for part in shares)

        return min((micro for micro in range(rows, 0, -1) if rows % micro == 0), key=cost)

    def place(self, row: int) -> str:
        """Where a row of a batch comes from: file:row, of a pack those of all its texts."""
        members = [row] if self._packs is None else self._packs.documents(row).tolist()
        return " + ".join(self.examples.place(index) for index in members)

    def _pack(self, sources: np.ndarray) -> Packs:
        """Each source packed by itself, so that a pack has its source's weight."""
        if (np.diff(self._starts) != 1).any():
            raise DataError("only texts can be packed: these rows have several turns")
        assert self.sampling.capacity is not None
        packs = []
        for source in np.unique(sources):
            members = np.flatnonzero(sources == source)
            made = pack(self._lengths[members], self.sampling.capacity, self.sampling.seed)
            packs.append((members[made.order], np.diff(made.starts)))
        counts = np.concatenate([sizes for _, sizes in packs])
        return Packs(np.concatenate([order for order, _ in packs]), np.concatenate([[0], np.cumsum(counts)]))

    def _turns_at(self, step: int) -> int | None:
        return next((turns for end, turns in self._lessons if step < end), None)

    def _rows(self, step: int) -> np.ndarray:
        """Row numbers of a step's batch [global_batch_size], by number of turns and length."""
        size = self.global_batch_size
        rows = self._plan.rows(step * size, (step + 1) * size)
        if self._packs is not None:  # all about equally full
            return rows
        longest, turns = self._extent(rows, self._turns_at(step))
        return rows[np.lexsort((longest, turns))]

    def _extent(self, rows: np.ndarray, turns: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the longest turn and number of turns of some rows, cut to their first `turns`."""
        starts, counts = self._starts[rows], self._starts[rows + 1] - self._starts[rows]
        if turns is not None:
            counts = np.minimum(counts, turns)
        longest = np.zeros(len(rows), dtype=np.int64)
        for turn in range(int(counts.max())):
            has = counts > turn
            longest[has] = np.maximum(longest[has], self._lengths[starts[has] + turn])
        return longest, counts


class EpisodeSampler(BatchSampler):
    """Conversations that are held before they are trained on: each batch of them is trained on in `updates` steps."""

    def __init__(self, examples: Sequence[Example], sampling: Sampling, updates: int, answers: int = 1) -> None:
        """`answers` are those to all questions of a conversation, each a sequence of its own in the update."""
        self.updates, self.answers = updates, answers
        self._held: tuple[int, Batch] | None = None
        super().__init__(examples, sampling)

    @property
    def resumable_every(self) -> int:
        """See `BatchSampler`: what was collected is not kept, but collected again from the weights of its start."""
        return self.updates

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes over the conversations take: whole collections."""
        return super().steps(epochs) * self.updates

    def forward_rows(self, rows: int, world: int, overhead: int) -> int:
        """See `BatchSampler`; and no more than so many answers at once."""
        wanted = super().forward_rows(rows, world, overhead)
        most = max(1, _ANSWERS_AT_ONCE // self.answers)
        return max(micro for micro in range(1, rows + 1) if rows % micro == 0 and micro <= max(1, min(wanted, most)))

    def global_batch(self, step: int) -> Batch:
        """The conversations of a step's collection."""
        number = step // self.updates
        if self._held is None or self._held[0] != number:
            self._held = number, super().global_batch(number)
        return self._held[1]


class _EpochPlan:
    """The order of rows in each epoch."""

    def __init__(self, sources: np.ndarray, weights: Sequence[float], seed: int) -> None:
        self._seed = seed
        self._members = [np.flatnonzero(sources == number) for number in range(int(sources.max()) + 1)]
        given = list(weights) or [1.0] * len(self._members)
        self._whole = [int(weight) for weight in given[: len(self._members)]]
        self._part = [
            round((weight - int(weight)) * len(members)) for weight, members in zip(given, self._members, strict=False)
        ]
        self.size = sum(n * len(m) + part for n, m, part in zip(self._whole, self._members, self._part, strict=True))
        for number, (whole, part, members) in enumerate(zip(self._whole, self._part, self._members, strict=True)):
            if len(members) and not whole and not part:
                few = f"source {number} has {len(members)} rows"
                raise DataError(f"{few}: with weight {given[number]:g} no epoch holds one; raise the weight")
        self._epoch = -1
        self._rows = np.empty(0, dtype=np.int64)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions start..stop of all epochs, one after the other."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.size)
            taken = self._of_epoch(epoch)[offset : offset + stop - start]
            parts.append(taken)
            start += len(taken)
        return np.concatenate(parts)

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rows = np.concatenate([part for number in range(len(self._members)) for part in self._drawn(number, epoch)])
            order = np.random.default_rng([self._seed, 1, epoch]).permutation(len(rows))
            self._epoch, self._rows = epoch, rows[order]
        return self._rows

    def _drawn(self, source: int, epoch: int) -> list[np.ndarray]:
        """A source's rows in an epoch: the whole part of its weight, then those whose turn it is for the rest."""
        members, part = self._members[source], self._part[source]
        drawn = [members] * self._whole[source]
        if part:
            turn = np.random.default_rng([self._seed, 3, source]).permutation(members)
            drawn.append(np.take(turn, np.arange(epoch * part, (epoch + 1) * part), mode="wrap"))
        return drawn

"""Rows as token ids: what token shards hold and batches are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Self

import numpy as np

from rxt_platform.data.rows import Conversation, Row, RowError
from rxt_platform.data.tokenizer import (
    BOS,
    EOS,
    EncodedInteraction,
    RxtTokenizer,
    TooLongError,
    assemble,
    assemble_system,
    interaction_texts,
)

TooLong = Literal["truncate", "quarantine", "fail"]
Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Example:
    """One row as token ids: its turns (one for a text or a single interaction) and where each turn's targets start.

    A conversation with a system prompt opens with a turn that holds it and has no target.
    """

    turns: tuple[Ids, ...]
    target_starts: tuple[int, ...]
    truncated: int = 0  # turns whose answer was cut at the window
    queries_cut: int = 0

    @classmethod
    def from_interactions(cls, interactions: Sequence[EncodedInteraction]) -> Self:
        """A conversation whose targets are the answers, `[EOS]` included (DESIGN 2)."""
        return cls(
            tuple(turn.ids for turn in interactions),
            tuple(turn.answer_start for turn in interactions),
            sum(turn.truncated for turn in interactions),
            sum(turn.query_cut for turn in interactions),
        )

    @property
    def opening(self) -> int:
        """Turns before the first that is answered: 1 with a system prompt, else 0."""
        return int(self.target_starts[0] >= len(self.turns[0]))

    def without_opening(self) -> "Example":
        """The example without its system prompt."""
        return Example(self.turns[1:], self.target_starts[1:]) if self.opening else self

    def first_turns(self, turns: int | None) -> "Example":
        """The example cut to its first `turns` turns, a system prompt not counted."""
        if turns is None:
            return self
        kept = turns + self.opening
        return Example(self.turns[:kept], self.target_starts[:kept])


class ExampleSet(Sequence[Example]):
    """Examples, and what a sampler needs to know of all of them; over a plain sequence if not a subclass."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    @property
    def turn_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every turn int64 [turns], and where each example's turns start int64 [examples + 1]."""
        lengths = [len(turn) for example in self for turn in example.turns]
        starts = [0, *accumulate(len(example.turns) for example in self)]
        return np.array(lengths, dtype=np.int64), np.array(starts, dtype=np.int64)

    @property
    def sources(self) -> np.ndarray:
        """Number of the source that each example came from, int16 [examples]."""
        return np.zeros(len(self), dtype=np.int16)

    def place(self, index: int) -> str:
        """Where an example came from, for a message."""
        return f"row {index}"


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` rows, evenly spaced, so that each source among them has its part."""
    taken = min(count, most)
    return [place * count // taken for place in range(taken)]


class Selected(ExampleSet):
    """Some rows of a set, each cut to its first `turns` turns."""

    def __init__(self, rows: ExampleSet, index: np.ndarray, turns: int | None = None) -> None:
        super().__init__(rows)
        self._index, self._turns, self._of = index, turns, rows

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self._of[int(self._index[index])].first_turns(self._turns)

    @property
    def sources(self) -> np.ndarray:
        """See `ExampleSet`."""
        return self._of.sources[self._index]

    def place(self, index: int) -> str:
        """See `ExampleSet`."""
        return self._of.place(int(self._index[index]))


@dataclass(frozen=True)
class RowEncoder:
    """Makes examples for a window of `max_length` tokens; `too_long` is the policy for interactions that don't fit."""

    tokenizer: RxtTokenizer
    max_length: int
    too_long: TooLong = "truncate"

    def encode(self, rows: Sequence[Row]) -> list[list[Example] | RowError]:
        """For each row its examples (a long text becomes several), or why it does not fit."""
        texts: list[str] = []
        for row in rows:
            if isinstance(row, str):
                texts.append(row)
            elif isinstance(row, Conversation):
                texts += [row.system] if row.system else []
                texts += [text for turn in row.interactions for text in interaction_texts(turn)]
        encoded = iter(self.tokenizer.encode_all(texts))
        made: list[list[Example] | RowError] = []
        for row in rows:
            if isinstance(row, str):
                made.append(windows(next(encoded), self.max_length))
                continue
            assert isinstance(row, Conversation)
            system = next(encoded) if row.system else None
            ids = [[next(encoded) for _ in interaction_texts(turn)] for turn in row.interactions]
            made.append(self._conversation(row, ids, system))
        return made

    def _conversation(
        self, talk: Conversation, ids: list[list[list[int]]], system: list[int] | None
    ) -> list[Example] | RowError:
        turns = []
        if system is not None:
            opening = tuple(assemble_system(system))
            if len(opening) > self.max_length and self.too_long != "truncate":
                return RowError("system", f"too long: {len(opening)} tokens, the window is {self.max_length}")
            kept = opening[: self.max_length]
            turns.append(EncodedInteraction(kept, len(kept), truncated=len(opening) > len(kept)))
        for index, (turn, encoded) in enumerate(zip(talk.interactions, ids, strict=True)):
            where = f"turn {index + 1}: " if len(talk.interactions) > 1 else ""
            try:
                made = assemble(turn, encoded, self.max_length, cut_query=self.too_long == "truncate")
            except TooLongError as error:
                return RowError("query", f"too long: {where}{error.reason}")
            if made.truncated and self.too_long != "truncate":
                whole = sum(map(len, encoded)) + len(encoded) + 2
                return RowError("answer", f"too long: {where}{whole} tokens, the window is {self.max_length}")
            turns.append(made)
        return [Example.from_interactions(turns)]


def windows(ids: Sequence[int], max_length: int) -> list[Example]:
    """`[BOS]text[EOS]` cut into windows of `max_length` tokens; every token but `[BOS]` is a target once (DESIGN 2).

    So each window begins with the last token of the one before.
    """
    whole = [BOS, *ids, EOS]
    return [
        Example((tuple(whole[start : start + max_length]),), (1,)) for start in range(0, len(whole) - 1, max_length - 1)
    ]

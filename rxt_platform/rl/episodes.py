"""What reinforcement learning holds of conversations: what an episode is given, what came of it, as tensors too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.examples import Example, Ids
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.tokenizer import PAD


@dataclass(frozen=True)
class Episode:
    """A conversation to be held: turn by turn the reference interaction's ids and texts.

    The first `given` turns are not asked: they are written as they are (an opening system prompt, turns of another
    conversation that the memory already holds, and the conversation's first interaction, REF 4). `interactions` are the
    texts from the first interaction on; so turn `given - 1` is `interactions[0]`.
    """

    example: Example
    interactions: tuple[Interaction, ...]
    given: int
    seed: int
    row: int

    @classmethod
    def of(cls, talk: Conversation, example: Example, seed: int, row: int, steps: int) -> "Episode":
        """The conversation with at most `steps` follow-ups, opened by its first interaction."""
        kept = example.first_turns(steps + 1)
        return cls(kept, talk.interactions[: steps + 1], kept.opening + 1, seed, row)

    def after(self, other: Example) -> "Episode":
        """The same episode, over a memory in which another conversation was written before."""
        example = Example((*other.turns, *self.example.turns), (*map(len, other.turns), *self.example.target_starts))
        return replace(self, example=example, given=self.given + len(other.turns))

    @property
    def turns(self) -> int:
        """All that is written or asked."""
        return len(self.example.turns)

    def asked(self, turn: int) -> Interaction:
        """The text of a turn (from 0) that is asked."""
        return self.interactions[turn - self.given + 1]

    def prompt(self, turn: int) -> list[int]:
        """What the model answers to in a turn."""
        return list(self.example.turns[turn][: self.example.target_starts[turn]])


@dataclass(frozen=True)
class Rollout:
    """What came of an episode: of each turn the written interaction, and the sampled answers (none where given)."""

    episode: Episode
    written: list[list[int]]
    answers: list[list[list[int]]]


@dataclass(frozen=True)
class Experience:
    """Held episodes of one update as tensors. B episodes, N turns, G answers to each asked turn, T tokens.

    written     the interactions as the memory took them, [B, N, T']; its seeds are those of the initial memories
    ids         int64 [B, N, G, T], `[BOS][Q]query[A]answer[EOS]`, right-padded
    targets     bool  [B, N, G, T], True at sampled tokens of the answers that are decoded
    old         float [B, N, G, T], log-probabilities of the targets when they were sampled, by the update path
    reference   float [B, N, G, T], the same by the frozen reference over its own memory; zeros without one
    rewards     float [B, N, G], on the reward's scale
    advantages  float [B, N, G]
    scored      bool  [B, N, G], answers that have a reward
    states      int64 [B, N, K, C], what the critic reads at a turn, right-padded; C = 0 without a critic
    returns     float [B, N, K], what the critic should have said
    on_policy   whether the weights are still those that sampled: then `old` is what the update itself computes
    total_*     numbers over the whole global batch: answers with a reward, answers that are decoded, states, turns
                whose first answer follows on another
    """

    written: Batch
    ids: Tensor
    targets: Tensor
    old: Tensor
    reference: Tensor
    rewards: Tensor
    advantages: Tensor
    scored: Tensor
    states: Tensor
    returns: Tensor
    on_policy: bool
    total_answers: int
    total_written: int
    total_states: int
    total_pairs: int = 0

    @property
    def rows(self) -> Tensor:
        """Index of each episode's row in its data set [B]."""
        return self.written.rows

    @property
    def tokens(self) -> int:
        """Real tokens: of all interactions that were written, and of further answers."""
        return self.written.tokens + int(self.targets[:, :, 1:].sum())

    @property
    def answered(self) -> Tensor:
        """Bool [B, N, G]: answers that there are."""
        return self.targets.any(dim=-1)

    def part(self, rows: Sequence[int] | slice) -> "Experience":
        """Some of the episodes; totals stay those of the global batch."""
        index = torch.arange(len(self.rows))[rows] if isinstance(rows, slice) else torch.tensor(rows)
        return replace(self, written=self.written.rows_at(index), **{name: value[index] for name, value in self._own()})

    def minibatch(self, rows: Sequence[int]) -> "Experience":
        """Some of the episodes as a global batch of their own."""
        part = self.part(rows)
        written = part.written.as_global()
        states = int((part.states[..., :1] != PAD).sum())
        first = part.answered[:, :, 0]
        pairs = int((first[:, 1:] & first[:, :-1]).sum())
        return replace(
            part,
            written=written,
            total_answers=int(part.scored.sum()),
            total_written=int(part.answered.sum()),
            total_states=states,
            total_pairs=pairs,
        )

    def shares(self, rank: int, world: int, micro: int) -> Iterator["Experience"]:
        """As `Batch.shares`: the micro-batches of one of `world` workers, all of the same shapes at the same time."""
        for start in range(0, len(self.rows), world * micro):
            group = self.part(slice(start, start + world * micro))._trimmed()
            yield group.part(slice(rank * micro, (rank + 1) * micro))

    def _trimmed(self) -> "Experience":
        """Without turns and positions that no episode has."""
        written = self.written.trimmed()
        turns = written.turns.shape[1]
        length = max(1, _extent((self.ids != PAD) | self.targets))
        read = _extent(self.states != PAD)
        cut = {name: value[:, :turns] for name, value in self._own()}
        for name in ("ids", "targets", "old", "reference"):
            cut[name] = cut[name][..., :length]
        cut["states"] = cut["states"][..., :read]
        return replace(self, written=written, **cut)

    def to(self, device: torch.device) -> "Experience":
        """The same on a device."""
        return replace(self, written=self.written.to(device), **{k: v.to(device) for k, v in self._own()})

    def _own(self) -> list[tuple[str, Any]]:
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return [(name, value) for name, value in values if isinstance(value, Tensor)]


def _extent(real: Tensor) -> int:
    """Positions up to the last real one in any row."""
    positions = real.flatten(0, -2).any(dim=0).nonzero()
    return int(positions[-1]) + 1 if len(positions) else 0


def written_batch(rollouts: Sequence[Rollout]) -> Batch:
    """What the memories took, as a batch [B, N, T]; the targets are the answers that stand in it."""
    examples = [Example(tuple(map(tuple, one.written)), tuple(one.episode.example.target_starts)) for one in rollouts]
    return collate(examples, [one.episode.seed for one in rollouts], [one.episode.row for one in rollouts])


def answer_tensors(rollouts: Sequence[Rollout], turns: int) -> tuple[Tensor, Tensor]:
    """Ids and targets [B, N, G, T] of all sampled answers with their prompts."""
    groups = max(len(answers) for one in rollouts for answers in one.answers)
    rows = [
        (b, n, g, prompt, answer)
        for b, one in enumerate(rollouts)
        for n, answers in enumerate(one.answers)
        if answers
        for prompt in (one.episode.prompt(n),)
        for g, answer in enumerate(answers)
    ]
    length = max(len(prompt) + len(answer) for *_, prompt, answer in rows)
    ids = np.full((len(rollouts), turns, groups, length), PAD, dtype=np.int64)
    targets = np.zeros(ids.shape, dtype=bool)
    for b, n, g, prompt, answer in rows:
        end = len(prompt) + len(answer)
        ids[b, n, g, :end] = [*prompt, *answer]
        targets[b, n, g, len(prompt) : end] = True
    return torch.from_numpy(ids), torch.from_numpy(targets)


def padded_states(states: Sequence[Sequence[Sequence[Ids]]], turns: int) -> Tensor:
    """Critic inputs [B, N, K, C], right-padded; a turn without any is padding only."""
    length = max((len(one) for row in states for group in row for one in group), default=0)
    number = max((len(group) for row in states for group in row), default=1)
    made = torch.full((len(states), turns, max(number, 1), length), PAD, dtype=torch.int64)
    for b, row in enumerate(states):
        for n, group in enumerate(row):
            for k, one in enumerate(group):
                made[b, n, k, : len(one)] = torch.tensor(list(one))
    return made

"""Sampled answers under a model: their tokens' log-probabilities over the memory that the episodes' writes led to.

One forward for whole episodes, with gradient through the writes: a late answer's reward reaches the first write.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rxt_platform.data.tokenizer import PAD
from rxt_platform.model.loss import target_log_probabilities
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.episodes import Experience
from rxt_platform.rl.objective import Tokens
from rxt_platform.stages.base import Phase
from rxt_platform.stages.memory_pretraining import relative_change, squared_change
from rxt_platform.stages.unroll import unrolled


@dataclass(frozen=True)
class Answered:
    """The answers of a part of an update under the model. A answers, n sampled tokens in all.

    place      int64 [A, 3]: episode, turn and number of each answer
    targets    bool [A, T]: its sampled tokens, and `tokens` which answer each of the n belongs to
    log_probs  [n] of the sampled tokens, at the temperature that they were sampled at
    entropy    [n] of the distributions that they were drawn from
    states     [n, D] of the decoder, from which they were drawn
    balance    the experts' balance, summed over the answers
    usage      real tokens sent to each expert [M, E]
    moved      sum over writes of sqrt(write) * MSE(new, old)
    relative   sum over writes of the memory's relative change, without gradient
    """

    place: Tensor
    targets: Tensor
    tokens: Tokens
    log_probs: Tensor
    entropy: Tensor
    states: Tensor
    balance: Tensor
    usage: Tensor
    moved: Tensor
    relative: Tensor

    def of_tokens(self, values: Tensor) -> Tensor:
        """From [B, N, G, T] the values of the sampled tokens, [n]."""
        rows = values[self.place[:, 0], self.place[:, 1], self.place[:, 2], : self.targets.shape[1]]
        return rows[self.targets]

    def of_answers(self, values: Tensor) -> Tensor:
        """From [B, N, G] the values of the answers, [A]."""
        return values[self.place[:, 0], self.place[:, 1], self.place[:, 2]]

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of the sampled tokens [n] at their places in zeros of the shape [B, N, G, T]."""
        made = torch.zeros_like(like)
        rows = torch.zeros(self.targets.shape, dtype=made.dtype, device=made.device)
        rows[self.targets] = values.to(made.dtype)
        made[self.place[:, 0], self.place[:, 1], self.place[:, 2], : self.targets.shape[1]] = rows
        return made


def answered(
    model: ReactiveTransformer,
    part: Experience,
    phase: Phase,
    bptt_window: int | Literal["all"] = "all",
    temperature: float = 1.0,
) -> Answered:
    """Teacher-force the sampled answers over the memories of their episodes."""
    written = part.written
    memories, writes = unrolled(model, written, phase, bptt_window, grouped=False)
    relative = moved = torch.zeros((), device=written.ids.device)
    for turn, (old, new) in enumerate(writes, start=1):
        present = written.turns[:, turn]
        relative = relative + (relative_change(old.detach(), new.detach()) * present).sum()
        moved = moved + (squared_change(old, new, turn) * present).sum()
    place = part.answered.nonzero()
    real_rows = float(len(place) > 0)
    if not len(place):  # a forward all the same: under ZeRO-3 all ranks must call the same modules
        place = torch.zeros(1, 3, dtype=torch.int64, device=written.ids.device)
    ids = part.ids[place[:, 0], place[:, 1], place[:, 2]]
    targets = part.targets[place[:, 0], place[:, 1], place[:, 2]]
    real = (ids != PAD) | targets  # [PAD] may have been sampled
    real[:, 0] = True
    # rows of one memory lie together: [L, B * N, S, D] at (turn, episode)
    stacked = torch.stack(memories, dim=1).flatten(1, 2)
    memory = stacked[:, place[:, 1] * len(written.rows) + place[:, 0]]
    frozen = "embedding" not in phase.trains
    decoded = model.decode_states(ids, real, memory, frozen_embedding=frozen)
    log_probs, entropy = target_log_probabilities(model, decoded.states, ids, targets, temperature)
    owner = torch.arange(len(place), device=ids.device)[:, None].expand_as(targets)[targets]
    return Answered(
        place=place,
        targets=targets,
        tokens=Tokens(owner, len(place)),
        log_probs=log_probs,
        entropy=entropy,
        states=decoded.states[:, :-1][targets[:, 1:]],
        balance=decoded.balance.sum() * real_rows,
        usage=decoded.usage * real_rows,
        moved=moved,
        relative=relative,
    )

"""Stage 3: self-supervised pre-training of the memory attention (REF 3.3).

The encoder is frozen. At every write the memory's target is a mixture of what it held and what the encoder says of the
new interaction; the loss is the negative cosine over layers and slots. The memory is detached between writes: each
write is its own exercise. Slots need not be as many as tokens: a slot's share of the interaction is the mean of its
segment of the real tokens, so that padding is never part of a target.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform.config.stages import LabelWeights, MemoryPretrainingConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import TURNS, LossReport, Phase, row_noise, row_uniform, with_metrics


class MemoryPretrainingStage:
    """Trains the memory attention alone, one optimizer step per batch of conversations."""

    mean_over: ClassVar[Mapping[str, str]] = {"loss": "total_turns", "memory_change": "total_turns"}

    def __init__(self, config: MemoryPretrainingConfig, sampler: BatchSampler) -> None:
        self.config = config
        self.sampler = sampler

    def phases(self) -> list[Phase]:
        """One phase: memory attention only."""
        return [Phase("memory attention", 0, frozenset({"memory_attention"}))]

    def loss(self, model: ReactiveTransformer, batch: Batch, phase: Phase) -> LossReport:
        """Mean over the writes of the global batch of `-cos(written memory, target)`, plus the memory's change."""
        memory = model.initial_memory(batch.seeds)
        loss, moved, change = (memory.new_zeros((), dtype=torch.float32) for _ in range(3))
        for turn in range(batch.ids.shape[1]):
            length = batch.turn_lengths[turn]
            present, mask = batch.turns[:, turn], batch.mask[:, turn, :length]
            with torch.no_grad():
                states = model.encode(batch.ids[:, turn, :length], mask)
                target = self._target(memory, states, mask, batch.seeds, turn)
                states = self._noisy(states, batch.seeds, TURNS + turn, self.config.input_noise, batch.longest)
            written = model.write_states(memory, states, mask)
            distance = -F.cosine_similarity(written, target, dim=-1).mean(dim=(0, 2))
            loss = loss + (distance * present).sum() / batch.total_turns
            moved = moved + (squared_change(memory, written, turn + 1) * present).sum() / batch.total_turns
            written = written.detach()
            change = change + (relative_change(memory, written) * present).sum() / batch.total_turns
            memory = written
        return with_metrics(loss + self.config.memory_change_weight * moved, loss=loss, memory_change=change)

    def flops(self, model: ForwardFlops, batch: Batch, phase: Phase) -> int:
        """The encoder's forward, and forward and backward of the writes.

        The targets' means over segments, no work of the model's, are not counted, though `by_slot` takes them as
        matrix products.
        """
        rows = len(batch.rows)
        return sum(model.encode(rows, length) + 3 * model.write(rows, length) for length in batch.turn_lengths)

    def evaluate(self, model: ReactiveTransformer, batch: Batch, phase: Phase) -> LossReport:
        """The training loss, on held-out conversations."""
        return self.loss(model, batch, phase)

    def _target(self, memory: Tensor, states: Tensor, mask: Tensor, seeds: Tensor, turn: int) -> Tensor:
        """`(1 - w) * memory + w * states by slot`, plus label noise: [L, B, S, D]; w = 0 in slots without a token."""
        draws = row_uniform(seeds, (1,), 2 * TURNS + turn, states.device)
        content, filled = by_slot(states, mask, memory.shape[2])
        weight = (label_weight(self.config.label_weights, turn, draws) * filled)[None, :, :, None]
        target = (1 - weight) * memory + weight * content
        return self._noisy(target, seeds, 3 * TURNS + turn, self.config.label_noise, target.shape[2])

    def _noisy(self, x: Tensor, seeds: Tensor, purpose: int, level: float, drawn: int) -> Tensor:
        """`x` [L, B, P, D] with noise, drawn for `drawn` >= P positions so that it does not depend on padding."""
        if not level:
            return x
        layers, _, positions, size = x.shape
        noise = row_noise(seeds, (layers, drawn, size), purpose, x).transpose(0, 1)
        return x + level * noise[:, :, :positions]


def label_weight(weights: LabelWeights, turn: int, draws: Tensor) -> Tensor:
    """Weight of the new interaction at write `turn`; `draws` [B] uniform in [0, 1) move it by +-random_factor."""
    centre = weights.first if turn == 0 else weights.base - weights.decay * turn
    return (centre + weights.random_factor * (2 * draws - 1)).clamp(0, 1)


def by_slot(states: Tensor, mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """What each slot should hold of encoder states [L, B, T, D], and which slots get something [B, slots].

    A row of at most `slots` real tokens (`mask` [B, T]) puts one token into a slot, in order, and leaves the other
    slots; a longer row is cut into `slots` segments, and a slot gets its segment's mean.
    """
    tokens = mask.sum(dim=1, keepdim=True)
    spread = tokens.clamp(min=slots)
    slot = torch.arange(slots, device=mask.device)
    start, end = slot * spread // slots, (slot + 1) * spread // slots
    position = torch.arange(mask.shape[1], device=mask.device)
    segment = (position >= start[..., None]) & (position < end[..., None]) & mask[:, None, :]
    members = segment.sum(dim=-1)
    weights = segment.to(states.dtype) / members.clamp(min=1).unsqueeze(-1)
    return torch.einsum("bst,lbtd->lbsd", weights, states), members > 0


def squared_change(old: Tensor, new: Tensor, write: int) -> Tensor:
    """`sqrt(write) * MSE(new, old)` of each row [B]: what a write (from 1) moved, with gradient to `new` alone."""
    return write**0.5 * (new.float() - old.detach().float()).pow(2).mean(dim=(0, 2, 3))


def relative_change(old: Tensor, new: Tensor) -> Tensor:
    """Norm of the change over the norm of the old memory, for each row: [L, B, S, D] -> [B]."""
    old, new = old.float(), new.float()
    return (new - old).pow(2).sum(dim=(0, 2, 3)).sqrt() / old.pow(2).sum(dim=(0, 2, 3)).sqrt()

"""Stage 4: memory-aware training on whole conversations (REF 3.4, DESIGN 4).

Turn 0 is decoded over the initial memory; then every turn's interaction (dataset answer) is encoded and written, and
the next turn decoded over the memory so far. The encoder does not depend on the memory, so all turns are encoded at
once, and so are all decodings; only the writes follow one another. The gradient crosses `bptt_window` writes.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rxt_platform.config.stage_base import Component
from rxt_platform.config.stages import MemoryAwareConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.loss import target_loss
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import LossReport, Phase, with_metrics
from rxt_platform.stages.memory_pretraining import relative_change, squared_change
from rxt_platform.stages.unroll import turn_groups, unrolled

_DECODER: frozenset[Component] = frozenset({"decoder", "memory_cross_attention", "head"})


class MemoryAwareStage:
    """Trains decoder, then memory attention, then encoder and embedding too."""

    mean_over: ClassVar[Mapping[str, str]] = {
        "loss": "total_targets",
        "accuracy": "total_targets",
        "balance": "total_turns",
        "memory_change": "total_follow_ups",
    }

    def __init__(self, config: MemoryAwareConfig, sampler: BatchSampler) -> None:
        self.config = config
        self.sampler = sampler

    def phases(self) -> list[Phase]:
        """Gradual unfreezing: decoder → memory attention after N epochs → encoder and embedding after K more.

        The encoder shares the embedding, so a frozen encoder means a frozen embedding (REF 3.4).
        """
        first = self.config.unfreeze_memory_attention
        second = first + self.config.unfreeze_encoder
        phases = [
            Phase("decoder", 0, _DECODER),
            Phase("decoder + memory attention", self._step(first), _DECODER | {"memory_attention"}),
            Phase("all", self._step(second), _DECODER | {"memory_attention", "encoder", "embedding"}),
        ]
        return [
            phase
            for phase, following in zip(phases, [*phases[1:], None], strict=True)
            if following is None or following.start > phase.start
        ]

    def _step(self, epochs: float) -> int:
        return self.sampler.steps(epochs) if epochs else 0

    def loss(self, model: ReactiveTransformer, batch: Batch, phase: Phase) -> LossReport:
        """Cross-entropy of all answer tokens of the global batch's conversations, the experts' balance, the change."""
        return self._loss(model, batch, phase, self.config.reset_probability)

    def _loss(self, model: ReactiveTransformer, batch: Batch, phase: Phase, reset_probability: float) -> LossReport:
        memories, writes = unrolled(model, batch, phase, self.config.bptt_window, reset_probability)
        relative = moved = torch.zeros((), device=batch.ids.device)
        for turn, (old, new) in enumerate(writes, start=1):
            written = batch.turns[:, turn] / max(batch.total_follow_ups, 1)
            relative = relative + (relative_change(old.detach(), new.detach()) * written).sum()
            moved = moved + (squared_change(old, new, turn) * written).sum()
        summed = balance = torch.zeros((), device=batch.ids.device)
        correct = torch.zeros((), device=batch.ids.device, dtype=torch.int64)
        usage: list[Tensor] = []
        for turns, length in turn_groups(batch):
            ids = batch.ids[:, turns, :length].transpose(0, 1).flatten(0, 1)
            present = batch.turns[:, turns].transpose(0, 1).flatten()
            mask = batch.mask[:, turns, :length].transpose(0, 1).flatten(0, 1) & present[:, None]
            targets = batch.targets[:, turns, :length].transpose(0, 1).flatten(0, 1)
            memory = torch.cat(memories[turns], dim=1)
            frozen = "embedding" not in phase.trains
            decoded = model.decode_states(ids, mask, memory, frozen_embedding=frozen)
            group_loss, group_correct = target_loss(model, decoded.states, ids, targets)
            summed, correct = summed + group_loss, correct + group_correct
            balance = balance + decoded.balance.sum() / batch.total_turns
            usage.append(decoded.usage)
        answer_loss = summed / batch.total_targets
        return with_metrics(
            answer_loss + self.config.balance_weight * balance + self.config.memory_change_weight * moved,
            loss=answer_loss,
            accuracy=correct / batch.total_targets,
            balance=balance,
            memory_change=relative,
        ).using(torch.stack(usage).sum(dim=0))

    def flops(self, model: ForwardFlops, batch: Batch, phase: Phase) -> int:
        """The decoder's forward and backward, and of encoder and writes the forward, or both where they train."""
        rows, turns = batch.turns.shape
        encoded = max(turns - 1, 1)
        window = turns if self.config.bptt_window == "all" else self.config.bptt_window
        total = model.head(3 * int(batch.targets.sum()))
        for group, length in turn_groups(batch):
            together = rows * (group.stop - group.start)
            real = int((batch.mask[:, group] & batch.turns[:, group, None]).sum())
            total += 3 * model.decode(together, length, real, model.config.memory.slots)
        encode = model.train_encoder if "encoder" in phase.trains else model.encode
        written: list[int] = []
        for group, length in turn_groups(batch, encoded):
            total += encode(rows * (group.stop - group.start), length)
            written += [length] * (group.stop - group.start)
        times = 3 if "memory_attention" in phase.trains else 1
        for turn in range(1, encoded + 1):
            first = turn - 1 if window >= turn else turn - window
            total += sum(times * model.write(rows, written[earlier]) for earlier in range(first, turn))
        return total

    def evaluate(self, model: ReactiveTransformer, batch: Batch, phase: Phase) -> LossReport:
        """The training loss without resets, on held-out conversations."""
        return self._loss(model, batch, phase, 0.0)

"""The memory of whole conversations, write by write, with gradient through the writes (DESIGN 4).

The encoder does not depend on the memory, so all turns are encoded at once; only the writes follow one another.
"""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from rxt_platform.data.batches import Batch
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import Phase, row_uniform


def unrolled(
    model: ReactiveTransformer,
    batch: Batch,
    phase: Phase,
    bptt_window: int | Literal["all"],
    reset_probability: float = 0.0,
    grouped: bool = True,
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The memory [L, B, S, D] before each turn, and before and after each write that led there.

    The gradient goes through the last `bptt_window` writes. Absent turns come last in a row, so what is written for
    them is never read. Where all rows are single turns, the write after them is read with weight zero: every
    forward must give every trained parameter a gradient, because ZeRO-3 adds those of a step's later forwards to
    what the first one left, be it the last step's. Turns of like length are encoded in one forward, unless not
    `grouped`: then the memory has the very bits that turns give which are written one by one.
    """
    turns = batch.ids.shape[1]
    initial = model.initial_memory(batch.seeds)
    with nullcontext() if "encoder" in phase.trains else torch.no_grad():
        states = _encode_turns(model, batch, max(turns - 1, 1), grouped)
    masks = [batch.mask[:, turn, : encoded.shape[2]] for turn, encoded in enumerate(states)]
    window = turns if bptt_window == "all" else bptt_window
    memories, writes = [initial], list[tuple[Tensor, Tensor]]()
    prompted = ~batch.targets[:, 0].any(dim=1)  # rows that open with a system prompt: they begin anew after it
    fresh = initial
    with nullcontext() if "memory_attention" in phase.trains else torch.no_grad():
        if turns == 1:
            return [initial + 0.0 * model.write_states(initial, states[0], masks[0])], writes
        for turn in range(1, turns):
            first = turn - 1 if window >= turn else turn - window
            memory = memories[first] if window >= turn else memories[first].detach()
            for written in range(first, turn):
                old, new = memory, model.write_states(memory, states[written], masks[written])
                memory = new
                if reset_probability:
                    forgets = row_uniform(batch.seeds, (1,), written + 1, new.device)[:, 0] < reset_probability
                    if not written:
                        fresh = torch.where(prompted[None, :, None, None], new.detach(), initial)
                        forgets = forgets & ~prompted
                    memory = torch.where(forgets[None, :, None, None], fresh, new)
            memories.append(memory)
            writes.append((old, new))
    return memories, writes


def _encode_turns(model: ReactiveTransformer, batch: Batch, turns: int, grouped: bool) -> list[Tensor]:
    """Encoder states [L, B, T, D] of the first `turns` turns."""
    states: list[Tensor] = []
    apart = [(slice(turn, turn + 1), length) for turn, length in enumerate(batch.turn_lengths[:turns])]
    for group, length in turn_groups(batch, turns) if grouped else apart:
        ids = batch.ids[:, group, :length].transpose(0, 1).flatten(0, 1)
        mask = batch.mask[:, group, :length].transpose(0, 1).flatten(0, 1)
        encoded = model.encode(ids, mask)
        states.extend(encoded.chunk(group.stop - group.start, dim=1))
    return states


def turn_groups(batch: Batch, turns: int | None = None) -> list[tuple[slice, int]]:
    """Neighbouring turns of similar length (within a factor 1.5) that are worth one forward, with that length.

    By the lengths that all workers have in common: under ZeRO-3 all ranks must call the same modules in the same order.
    """
    groups: list[tuple[slice, int]] = []
    first = longest = shortest = 0
    for turn, length in enumerate(batch.turn_lengths[:turns]):
        if turn and max(longest, length) <= 1.5 * min(shortest, length):
            longest, shortest = max(longest, length), min(shortest, length)
            groups[-1] = (slice(first, turn + 1), longest)
        else:
            first, longest, shortest = turn, length, length
            groups.append((slice(turn, turn + 1), length))
    return groups

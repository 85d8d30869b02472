"""What the memory looks like from write to write: its size, how much a write changes it, whether slots still differ.

A memory that grows without bound, stops changing, or whose slots have become alike holds nothing any more, whatever the
loss says.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from rxt_platform.evaluation.conversations import Talk
from rxt_platform.evaluation.responders import ReactiveResponder
from rxt_platform.model.memory import MemoryAttention, ResidualGate
from rxt_platform.model.transformer import ReactiveTransformer

_CONVERSATIONS = 16  # the singular values of a large memory take long, and their mean hardly differs by conversation
_TINY = 1e-30

Measured = dict[str, list[float]]


@torch.no_grad()
def memory_health(model: ReactiveTransformer, talks: Sequence[Talk], seed: int) -> dict[str, Any]:
    """Write the reference interactions of the longest conversations, and look at the memory after each.

    by_write  [{write (0: before the first), conversations, norm, change, effective_rank, slot_similarity}], means over
              conversations (and layers): RMS norm; norm of the difference over the norm before; exp of the entropy of
              the normalised singular values of a layer's slots, over their number; mean |cosine| between slots
    gates     [{layer, mean, min, max}] of the write gates' values, over all writes; empty for a model without
    """
    talks = sorted(talks, key=lambda talk: -len(talk.example.turns))[:_CONVERSATIONS]
    responder = ReactiveResponder(model)
    memory = responder.start([talk.seed(seed) for talk in talks])
    by_write = [_row(0, _measure(None, memory))]
    gates: dict[int, list[Tensor]] = defaultdict(list)
    with _watched(model.memory_attention, gates):
        for write in range(len(talks[0].example.turns)):
            turns = [talk.example.turns[write] for talk in talks if write < len(talk.example.turns)]
            before = memory[:, : len(turns)]
            memory = responder.remember(before, turns)
            by_write.append(_row(write + 1, _measure(before, memory)))
    return {
        "by_write": by_write,
        "gates": [
            {"layer": layer, "mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}
            for layer, values in ((layer, torch.cat(parts)) for layer, parts in sorted(gates.items()))
        ],
    }


@contextmanager
def _watched(attention: MemoryAttention, gates: dict[int, list[Tensor]]) -> Iterator[None]:
    """Collect the values of each layer's write gate, as often as it is used, in `gates`."""

    def keep(layer: int) -> Any:
        def hook(gate: ResidualGate, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
            value = gate.value(*inputs)
            if value is not None:
                gates[layer].append(value.float().flatten())

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(attention.layers, start=1):
            hooks.callback(layer.write_gate.register_forward_hook(keep(number)).remove)
        yield


def _row(write: int, measured: Measured) -> dict[str, Any]:
    """Means over the conversations; None for what can't be said of any of them."""
    row: dict[str, Any] = {"write": write, "conversations": len(measured["norm"])}
    for name, values in measured.items():
        known = [value for value in values if math.isfinite(value)]
        row[name] = sum(known) / len(known) if known else None
    return row


def _measure(before: Tensor | None, memory: Tensor) -> Measured:
    """Each conversation's numbers, of memories [L, B, S, D]; NaN where there is none."""
    now = memory.double()
    norm = _norm(now)
    old = None if before is None else before.double()
    change = torch.full_like(norm, math.nan) if old is None else _norm(now - old) / _norm(old)
    return {
        "norm": norm.tolist(),
        "change": change.tolist(),
        "effective_rank": effective_rank(now).mean(dim=0).tolist(),
        "slot_similarity": slot_similarity(now).mean(dim=0).tolist(),
    }


def _norm(memory: Tensor) -> Tensor:
    """RMS norm [B]."""
    return memory.square().mean(dim=(0, 2, 3)).sqrt()


def effective_rank(slots: Tensor) -> Tensor:
    """Effective rank (Roy and Vetterli, 2007) over the number of slots: [..., S, D] -> [...], 1/S to min(S, D)/S.

    NaN for slots that are all zero.
    """
    tall = slots.shape[-2] > slots.shape[-1]
    gram = slots.mT @ slots if tall else slots @ slots.mT
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True)
    entropy = -(shares * shares.clamp(min=_TINY).log()).sum(dim=-1)
    return entropy.exp() / slots.shape[-2]


def slot_similarity(slots: Tensor) -> Tensor:
    """Mean |cosine| between different slots: [..., S, D] -> [...]; NaN for a single slot."""
    number = slots.shape[-2]
    if number == 1:
        return slots.new_full(slots.shape[:-2], math.nan)
    unit = torch.nn.functional.normalize(slots, dim=-1)
    cosines = (unit @ unit.mT).abs()
    own = cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (cosines.sum(dim=(-2, -1)) - own) / (number * (number - 1))

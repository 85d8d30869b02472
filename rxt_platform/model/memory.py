"""Memory attention: how an interaction is written into the short-term memory (REF 1.8).

The memory is a value [layers, B, slots, D] that callers pass and receive; no module here keeps any of it.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rxt_platform.config.model import GateActivation, GateKind, MemoryConfig, ModelConfig
from rxt_platform.model.attention import Attention, RotaryEmbedding

_FIXED_SEED = 20_260_101  # of the `fixed` initial memory: part of the architecture, like a positional table
_NORMAL_DEVIATION = 0.02


class ResidualGate(nn.Module):
    """Blend an old and a new state by a gate for each slot, or one for all slots (REF 1.8).

    With s the mean of `old + new` over the channels, the gate is the activation of: `static` w; `elementwise` w * s;
    `linear` W s + b, which mixes the slots. sigmoid: `g * new + (1 - g) * old`; tanh: `(1 + g) * new + (1 - g) * old`;
    none: `old + new`, without parameters.
    """

    def __init__(
        self, slots: int, kind: GateKind, activation: GateActivation = "sigmoid", per_slot: bool = True
    ) -> None:
        super().__init__()
        self.kind, self.activation = kind, activation
        gates = slots if per_slot else 1
        if activation != "none" and kind == "linear":
            self.linear = nn.Linear(slots, gates)
        elif activation != "none":
            self.weight = nn.Parameter(torch.full((gates,), 3.0 if kind == "static" else 1.0))

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        """[B, S, D], [B, S, D] -> [B, S, D]."""
        gate = self.value(old, new)
        if gate is None:
            return old + new
        if self.activation == "tanh":
            return (1 + gate) * new + (1 - gate) * old
        return gate * new + (1 - gate) * old

    def value(self, old: Tensor, new: Tensor) -> Tensor | None:
        """How open the gate is, [B, S, 1], or what broadcasts to it; sigmoid 0 to 1, tanh -1 to 1, none None."""
        if self.activation == "none":
            return None
        value: Tensor
        if self.kind == "static":
            value = self.weight
        else:
            summary = (old + new).mean(dim=-1)
            value = self.linear(summary) if self.kind == "linear" else self.weight * summary
        value = value.unsqueeze(-1)
        return value.tanh() if self.activation == "tanh" else value.sigmoid()


class MemoryLayer(nn.Module):
    """One layer of memory attention: slots may read other slots first, then they read the encoded tokens.

    What they read first, by variant: nothing (simple), their own layer (self), the mean of all layers (interlayer), or
    a gated blend of own layer and mean (self-interlayer; grouped: the mean of the layer's group).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory, size, eps = config.memory, config.hidden_size, config.norm_eps

        def gate(gated: bool = True) -> ResidualGate:
            return ResidualGate(
                memory.slots, memory.gate, memory.gate_activation if gated else "none", memory.gate_per_slot
            )

        self.variant = memory.variant
        if self.variant != "simple":
            self.self_norm = nn.RMSNorm(size, eps)
            self.self_attention = Attention(size, config.head_size, memory.attention, eps)
            self.self_gate = gate(memory.gate_self_attention)
        if self.variant.endswith("self-interlayer"):
            self.inner_gate = gate()
        self.memory_norm = nn.RMSNorm(size, eps)
        self.encoded_norm = nn.RMSNorm(size, eps)
        self.write_attention = Attention(size, config.head_size, memory.attention, eps)
        self.write_gate = gate()

    def forward(
        self, slots: Tensor, mean: Tensor, encoded: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """New slots [B, S, D] from old `slots`, the normalised layer `mean` and `encoded` tokens [B, T, D]."""
        if self.variant != "simple":
            slots = self._read_slots(slots, mean)
        tokens = self.write_attention.keys_values(self.encoded_norm(encoded), rotary)
        update = self.write_attention.attend(self.memory_norm(slots), tokens, mask=mask)
        return self.write_gate(slots, update)

    def _read_slots(self, slots: Tensor, mean: Tensor) -> Tensor:
        own = self.self_norm(slots)
        if self.variant == "self":
            source = own
        elif self.variant == "interlayer":
            source = mean
        else:
            source = self.inner_gate(own, mean)
        return self.self_gate(slots, self.self_attention.attend(own, self.self_attention.keys_values(source)))


class MemoryAttention(nn.Module):
    """Writes encoded interactions [L, B, T, D] into the memory [L, B, S, D]; all layers commit together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = config.memory.groups
        averages = config.memory.variant not in ("simple", "self")
        self.mean_norm = nn.RMSNorm(config.hidden_size, config.norm_eps) if averages else None
        self.layers = cast("Sequence[MemoryLayer]", nn.ModuleList(MemoryLayer(config) for _ in range(config.layers)))
        self.rotary = RotaryEmbedding(config.head_size, config.rope_base)

    def forward(self, memory: Tensor, encoded: Tensor, mask: Tensor | None) -> Tensor:
        """The memory after one write. `mask` [B, T] is True at real tokens; every row needs at least one.

        Layers read the mean of the memory before the write, their own layer included.
        """
        rotary = self.rotary(torch.arange(encoded.shape[2], device=encoded.device))
        means = memory  # not read by the variants without a mean
        if self.mean_norm is not None:
            means = self.mean_norm(memory.unflatten(0, (self.groups, -1)).mean(dim=1))
        in_group = len(self.layers) // self.groups
        keys = None if mask is None else mask[:, None, None, :]
        return torch.stack(
            [layer(memory[i], means[i // in_group], encoded[i], rotary, keys) for i, layer in enumerate(self.layers)]
        )


def initial_memory(config: ModelConfig, seeds: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The memory [L, B, S, D] that conversations start from, one seed (`seeds` [B]) per conversation (REF 1.7).

    A row depends on its own seed only, so that it is the same however a batch is split over workers.
    """
    memory: MemoryConfig = config.memory
    shape = (config.layers, memory.slots, config.hidden_size)
    kind = memory.initialization
    if kind in ("standard", "normal", "uniform"):
        memories = torch.empty(config.layers, len(seeds), memory.slots, config.hidden_size)
        for index, seed in enumerate(seeds.tolist()):
            memories[:, index] = _draw(kind, shape, seed)
        return memories.to(device, dtype)
    row = _fixed(shape) if kind == "fixed" else torch.full(shape, 1.0 if kind == "ones" else 0.0)
    return row.unsqueeze(1).expand(-1, len(seeds), -1, -1).to(device, dtype)


def _draw(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator) * (1.0 if kind == "standard" else _NORMAL_DEVIATION)


def _fixed(shape: tuple[int, ...]) -> Tensor:
    return _draw("standard", shape, _FIXED_SEED)

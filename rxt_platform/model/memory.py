"""Memory attention: how an interaction is written into the short-term memory (REF 1.8).

The memory is a value [layers, B, slots, D] that callers pass and receive; no module here keeps any of it.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rxt_platform.config.model import MemoryConfig, ModelConfig
from rxt_platform.model.attention import Attention, RotaryEmbedding

_FIXED_SEED = 20_260_101  # of the `fixed` initial memory: part of the architecture, like a positional table


class ResidualGate(nn.Module):
    """Blend old and new per slot, `g * new + (1 - g) * old`, g = sigmoid of a static, elementwise or linear value."""

    def __init__(self, slots: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.linear = nn.Linear(slots, slots)
        else:
            self.weight = nn.Parameter(torch.full((slots,), 3.0 if kind == "static" else 1.0))

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        """[B, S, D], [B, S, D] -> [B, S, D]."""
        if self.kind == "static":
            value = self.weight.expand(old.shape[:-1])
        else:
            summary = (old + new).mean(dim=-1)
            value = self.linear(summary) if self.kind == "linear" else self.weight * summary
        gate = value.sigmoid().unsqueeze(-1)
        return gate * new + (1 - gate) * old


class MemoryLayer(nn.Module):
    """One layer of interlayer memory attention: slots first read the mean of all layers, then the encoded tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory, size, eps = config.memory, config.hidden_size, config.norm_eps
        self.self_norm = nn.RMSNorm(size, eps)
        self.self_attention = Attention(size, config.head_size, memory.attention)
        self.self_gate = ResidualGate(memory.slots, memory.gate)
        self.memory_norm = nn.RMSNorm(size, eps)
        self.encoded_norm = nn.RMSNorm(size, eps)
        self.write_attention = Attention(size, config.head_size, memory.attention)
        self.write_gate = ResidualGate(memory.slots, memory.gate)

    def forward(
        self, slots: Tensor, mean: Tensor, encoded: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """New slots [B, S, D] from old `slots`, the normalised layer `mean` and `encoded` tokens [B, T, D]."""
        across = self.self_attention.attend(self.self_norm(slots), self.self_attention.keys_values(mean))
        slots = self.self_gate(slots, across)
        tokens = self.write_attention.keys_values(self.encoded_norm(encoded), rotary)
        update = self.write_attention.attend(self.memory_norm(slots), tokens, mask=mask)
        return self.write_gate(slots, update)


class MemoryAttention(nn.Module):
    """Writes encoded interactions [L, B, T, D] into the memory [L, B, S, D]; all layers commit together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mean_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.layers = cast("Sequence[MemoryLayer]", nn.ModuleList(MemoryLayer(config) for _ in range(config.layers)))
        self.rotary = RotaryEmbedding(config.head_size, config.rope_base)

    def forward(self, memory: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
        """The memory after one write. `mask` [B, T] is True at real tokens; every row needs at least one."""
        rotary = self.rotary(torch.arange(encoded.shape[2], device=encoded.device))
        mean = self.mean_norm(memory.mean(dim=0))
        keys = mask[:, None, None, :]
        return torch.stack([layer(memory[i], mean, encoded[i], rotary, keys) for i, layer in enumerate(self.layers)])


def initial_memory(config: ModelConfig, seeds: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The memory [L, B, S, D] that conversations start from: N(0, 1), one seed (`seeds` [B]) per conversation.

    A row depends on its own seed only, so that it is the same however a batch is split over workers.
    """
    memory: MemoryConfig = config.memory
    shape = (config.layers, memory.slots, config.hidden_size)
    generator = torch.Generator()
    if memory.initialization == "fixed":
        row = torch.randn(shape, generator=generator.manual_seed(_FIXED_SEED))
        return row.unsqueeze(1).expand(-1, len(seeds), -1, -1).to(device, dtype)
    rows = [torch.randn(shape, generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows, dim=1).to(device, dtype)

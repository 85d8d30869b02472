"""The bidirectional encoder: its layers' outputs are what memory attention writes."""

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.model.attention import Attention, RotaryEmbedding
from rxt_platform.model.documents import Documents
from rxt_platform.model.feedforward import SwiGLU


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional self-attention and SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = nn.RMSNorm(size, eps)
        self.attention = Attention(size, config.head_size, config.encoder.attention, eps)
        self.frozen_memory = FrozenMemoryAttention(config) if config.encoder.cross_attention else None
        self.feed_forward_norm = nn.RMSNorm(size, eps)
        self.feed_forward = SwiGLU(size, config.encoder.feed_forward_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, number: int) -> Tensor:
        """[B, T, D] -> [B, T, D] in layer `number`; `mask` [B, 1, 1 or T, T] is True at tokens that may be read."""
        normed = self.attention_norm(x)
        x = x + self.attention.attend(normed, self.attention.keys_values(normed, rotary), rotary, mask)
        if self.frozen_memory is not None:
            x = self.frozen_memory(x, rotary, number)
        return x + self.feed_forward(self.feed_forward_norm(x))


class FrozenMemoryAttention(nn.Module):
    """Cross-attention of the early Micro encoders: never trained, over a fixed near-zero random memory (REF 1.3).

    It was dropped later because it pulled the encoder's states away from the memory's; here so that those models can
    be built as they were.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.encoder.cross_attention is not None  # the caller's condition
        size, eps = config.hidden_size, config.norm_eps
        self.shape = (config.layers, config.memory.slots, size)
        self.norm = nn.RMSNorm(size, eps)
        self.memory_norm = nn.RMSNorm(size, eps)
        self.attention = Attention(size, config.head_size, config.encoder.cross_attention, eps)
        self.requires_grad_(False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], number: int) -> Tensor:
        """`x` [B, T, D] with what layer `number` reads added."""
        memory = near_zero_memory(self.shape, x.device, x.dtype)[number].expand(x.shape[0], -1, -1)
        return x + self.attention.attend(self.norm(x), self.attention.keys_values(self.memory_norm(memory)), rotary)


@lru_cache(maxsize=2)
def near_zero_memory(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A constant memory [L, S, D] drawn once from N(0, 0.02^2)."""
    generator = torch.Generator().manual_seed(20_260_102)
    return (0.02 * torch.randn(shape, generator=generator)).to(device, dtype)


class Encoder(nn.Module):
    """Bidirectional encoder; hands out every layer's output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = cast("Sequence[EncoderLayer]", nn.ModuleList(EncoderLayer(config) for _ in range(config.layers)))
        self.rotary = RotaryEmbedding(config.head_size, config.rope_base)

    def forward(self, x: Tensor, mask: Tensor | None, documents: Documents | None = None) -> Tensor:
        """Outputs of all layers [L, B, T, D] for embedded tokens [B, T, D].

        `mask` [B, T], None without padding; `documents` where a row holds several, which then don't read each other.
        """
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device) if documents is None else documents.position)
        readable = None if mask is None else mask[:, None, None, :]
        if documents is not None:
            readable = documents.together[:, None]
        states = []
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, readable, number)
            states.append(x)
        return torch.stack(states)

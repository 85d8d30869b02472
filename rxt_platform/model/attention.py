"""Attention of the Reactive Transformer: SQA/GQA/MHA projections, rotary positions on either or both sides.

Self-attention turns queries and keys, memory cross-attention the query only, memory attention (the write) the key only
(REF 1.4). Keys and values can be projected once and used again: the KV cache and the memory's K/V both rely on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_platform.config.model import AttentionConfig


class RotaryEmbedding(nn.Module):
    """Rotary position embedding over interleaved channel pairs (2i, 2i+1), arXiv:2104.09864."""

    def __init__(self, head_size: int, base: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.base = base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles of `positions` [..., T], each [..., 1, T, head_size / 2]."""
        exponents = torch.arange(0, self.head_size, 2, device=positions.device, dtype=torch.float32) / self.head_size
        angles = positions.float().unsqueeze(-1) * self.base**-exponents
        return angles.cos().unsqueeze(-3), angles.sin().unsqueeze(-3)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs of `x` [B, H, T, head_size] by the angles of `rotary`.

    As a product of complex numbers, in fp32: bit for bit the same, forward and backward, in a third of the time on a
    CPU (benchmarks/LOG.md). torch.compile would not fuse that, but fuses the plain form.
    """
    if not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(*rotary)).flatten(-2).to(x.dtype)
    cos, sin = (part.to(x.dtype) for part in rotary)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Scaled-dot-product attention with `query_heads` and `key_value_heads` of the model's head size."""

    def __init__(self, hidden_size: int, head_size: int, config: AttentionConfig, norm_eps: float) -> None:
        super().__init__()
        self.query_heads, self.key_value_heads, self.head_size = (
            config.query_heads,
            config.key_value_heads,
            head_size,
        )
        width = max(self.query_heads, self.key_value_heads) * head_size
        self.query = nn.Linear(hidden_size, self.query_heads * head_size, bias=False)
        self.key = nn.Linear(hidden_size, self.key_value_heads * head_size, bias=False)
        self.value = nn.Linear(hidden_size, self.key_value_heads * head_size, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=config.output_bias)
        self.gate = nn.Linear(hidden_size, width, bias=False) if config.gated else None
        self.query_norm = nn.RMSNorm(head_size, norm_eps) if config.query_key_norm else None
        self.key_norm = nn.RMSNorm(head_size, norm_eps) if config.query_key_norm else None

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_size)).transpose(-3, -2)

    def keys_values(self, source: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of `source` [B, T, D], each [B, key_value_heads, T, head_size]."""
        key = self._heads(self.key(source), self.key_value_heads)
        value = self._heads(self.value(source), self.key_value_heads)
        if self.key_norm is not None:
            key = self.key_norm(key)
        return (key if rotary is None else rotate(key, rotary)), value

    def attend(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Let `x` [B, T, D] read keys and values; `mask` is boolean, True = may be read, broadcast to [B, H, T, S].

        Fewer query than key-value heads (reverse SQA): the queries are tiled over the key-value heads. A gate
        multiplies what was read by `sigmoid(W x)` (REF 1.4; from torch's default weights, not N(1, 0.01)).
        """
        query = self._heads(self.query(x), self.query_heads)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if rotary is not None:
            query = rotate(query, rotary)
        if self.query_heads < self.key_value_heads:
            query = query.repeat(1, self.key_value_heads // self.query_heads, 1, 1)
        key, value = keys_values
        grouped = self.query_heads > self.key_value_heads
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        read = read.transpose(-3, -2).flatten(-2)
        if self.gate is not None:
            read = read * self.gate(x).sigmoid()
        return self.output(read)

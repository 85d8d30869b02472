"""The Reactive Transformer: decoder, encoder and memory attention, with memory as an explicit value (REF 1).

    memory = model.initial_memory(seeds)                       # [L, B, S, D]
    logits = model.decode(query_ids, mask, memory)             # answer, reading the memory by cross-attention
    memory = model.write(memory, interaction_ids, mask)        # after the answer: encode and write

The decoder's stages during supervised training read encoder states as their memory (REF 3.1), which is why `decode`
also takes a mask over memory positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.model.attention import Attention, RotaryEmbedding
from rxt_platform.model.feedforward import MixtureOfExperts, SwiGLU
from rxt_platform.model.memory import MemoryAttention, initial_memory


@dataclass
class Decoded:
    """What the decoder computed: last hidden states [B, T, D] and the experts' balance loss of each row [B]."""

    states: Tensor
    balance: Tensor


@dataclass
class Cache:
    """Static KV cache: per layer, self-attention keys and values [B, H, window, hd] and those of the memory."""

    self_keys: list[Tensor]
    self_values: list[Tensor]
    memory: list[tuple[Tensor, Tensor]]


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional self-attention and SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config.hidden_size, config.head_size, config.encoder.attention)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = SwiGLU(config.hidden_size, config.encoder.feed_forward_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; `mask` [B, 1, 1, T] is True at real tokens."""
        normed = self.attention_norm(x)
        x = x + self.attention.attend(normed, self.attention.keys_values(normed, rotary), rotary, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, memory cross-attention and mixture of experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps, decoder = config.hidden_size, config.norm_eps, config.decoder
        self.self_norm = nn.RMSNorm(size, eps)
        self.self_attention = Attention(size, config.head_size, decoder.self_attention)
        self.cross_norm = nn.RMSNorm(size, eps)
        self.memory_norm = nn.RMSNorm(size, eps)
        self.cross_attention = Attention(size, config.head_size, decoder.cross_attention)
        self.feed_forward_norm = nn.RMSNorm(size, eps)
        self.feed_forward = MixtureOfExperts(
            size, decoder.feed_forward_size, decoder.experts, decoder.experts_per_token
        )

    def memory_keys_values(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory [B, S, D]: the same for every token of an interaction."""
        return self.cross_attention.keys_values(self.memory_norm(slots))

    def read_and_mix(
        self,
        x: Tensor,
        memory: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What follows self-attention: memory cross-attention (rotary on the query only) and the experts."""
        x = x + self.cross_attention.attend(self.cross_norm(x), memory, rotary, memory_mask)
        mixed, balance = self.feed_forward(self.feed_forward_norm(x), mask)
        return x + mixed, balance


class Encoder(nn.Module):
    """Bidirectional encoder; hands out every layer's output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = cast("Sequence[EncoderLayer]", nn.ModuleList(EncoderLayer(config) for _ in range(config.layers)))
        self.rotary = RotaryEmbedding(config.head_size, config.rope_base)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Outputs of all layers [L, B, T, D] for embedded tokens [B, T, D]; `mask` [B, T]."""
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device))
        states = []
        for layer in self.layers:
            x = layer(x, rotary, mask[:, None, None, :])
            states.append(x)
        return torch.stack(states)


class Decoder(nn.Module):
    """Causal decoder with memory cross-attention; its head is not tied to the embedding (REF 1.6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = cast("Sequence[DecoderLayer]", nn.ModuleList(DecoderLayer(config) for _ in range(config.layers)))
        self.rotary = RotaryEmbedding(config.head_size, config.rope_base)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states of embedded tokens [B, T, D] that read `memory` [L, B, S, D] (`memory_mask` [B, S]).

        Returns them and the experts' balance loss of each row [B]; a plain tuple, in which ZeRO-3 finds the tensors.
        """
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device))
        readable = None if memory_mask is None else memory_mask[:, None, None, :]
        balance = x.new_zeros(x.shape[0], dtype=torch.float32)
        for i, layer in enumerate(self.layers):
            normed = layer.self_norm(x)
            keys_values = layer.self_attention.keys_values(normed, rotary)
            x = x + layer.self_attention.attend(normed, keys_values, rotary, causal=True)
            x, layer_balance = layer.read_and_mix(x, layer.memory_keys_values(memory[i]), rotary, readable, mask)
            balance = balance + layer_balance
        return x, balance / len(self.layers)

    def start_cache(self, memory: Tensor, window: int) -> Cache:
        """An empty cache for `window` tokens over a memory [L, B, S, D], whose keys and values are projected once."""
        attention = self.layers[0].self_attention
        shape = (memory.shape[1], attention.key_value_heads, window, attention.head_size)
        return Cache(
            self_keys=[memory.new_zeros(shape) for _ in self.layers],
            self_values=[memory.new_zeros(shape) for _ in self.layers],
            memory=[layer.memory_keys_values(memory[i]) for i, layer in enumerate(self.layers)],
        )

    def step(self, x: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Hidden states of new tokens [B, T, D] at `positions` [B, T], which are written into the cache.

        What padding (`mask` False) leaves at a position is overwritten by the row's token that goes there, before any
        token may read it.
        """
        rotary = self.rotary(positions)
        window = torch.arange(cache.self_keys[0].shape[2], device=x.device)
        visible = (window <= positions[..., None])[:, None]
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        for i, layer in enumerate(self.layers):
            normed = layer.self_norm(x)
            key, value = layer.self_attention.keys_values(normed, rotary)
            cache.self_keys[i][rows, :, positions] = key.transpose(1, 2)
            cache.self_values[i][rows, :, positions] = value.transpose(1, 2)
            cached = (cache.self_keys[i], cache.self_values[i])
            x = x + layer.self_attention.attend(normed, cached, rotary, visible)
            x, _ = layer.read_and_mix(x, cache.memory[i], rotary, None, mask)
        return x


class MaskedLanguageHead(nn.Module):
    """Predicts masked tokens from the encoder's last states: Linear, GELU, LayerNorm, Linear (REF 1.6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.output(self.norm(nn.functional.gelu(self.dense(states))))


class ReactiveTransformer(nn.Module):
    """Decoder, encoder, memory attention and one token embedding that encoder and decoder share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)
        self.memory_attention = MemoryAttention(config)
        self.mlm_head = MaskedLanguageHead(config)

    def initial_memory(self, seeds: Tensor) -> Tensor:
        """The memory [L, B, S, D] that conversations start from, one seed (`seeds` [B], int64) each."""
        weight = self.decoder.head.weight
        return initial_memory(self.config, seeds, weight.device, weight.dtype)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encoder states of all layers [L, B, T, D] for token ids [B, T]; `mask` [B, T] is True at real tokens."""
        return self.encoder(self.embedding(ids), mask)

    def write_states(self, memory: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Write encoder states [L, B, T, D] into the memory."""
        return self.memory_attention(memory, states, mask)

    def write(self, memory: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The memory after the interaction `ids` [B, T] (query and answer) was encoded and written."""
        return self.write_states(memory, self.encode(ids, mask), mask)

    def decode_states(
        self,
        ids: Tensor,
        mask: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        frozen_embedding: bool = False,
    ) -> Decoded:
        """Hidden states of the decoder for ids [B, T] over `memory` [L, B, S, D]; feed those needed to `head`."""
        embedded = self.embedding(ids)
        if frozen_embedding:
            embedded = embedded.detach()
        return Decoded(*self.decoder(embedded, mask, memory, memory_mask))

    def head(self, states: Tensor) -> Tensor:
        """Next-token logits [..., V] of decoder states [..., D]."""
        return self.decoder.head(states)

    def decode(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, V]."""
        return self.head(self.decode_states(ids, mask, memory, memory_mask).states)

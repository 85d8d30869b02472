"""The causal decoder, with or without memory: whole sequences at once, or token by token with a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rxt_platform.config.model import LayerKind, ModelConfig
from rxt_platform.errors import ModelError
from rxt_platform.model.attention import Attention, RotaryEmbedding
from rxt_platform.model.documents import Documents
from rxt_platform.model.feedforward import MixtureOfExperts, RealTokens, Routed, SwiGLU
from rxt_platform.model.heads import VocabularyHead

KeysValues = tuple[Tensor, Tensor]


@dataclass
class Cache:
    """Static KV cache: self-attention keys and values [B, H, length, hd] of each layer, and those of the memory."""

    keys: list[Tensor]
    values: list[Tensor]
    memory: list[KeysValues | None]

    @property
    def length(self) -> int:
        """Tokens that fit."""
        return self.keys[0].shape[2]

    def rows(self, index: Tensor) -> "Cache":
        """A cache of some of the rows, `index` int64 [rows]."""
        return Cache(
            [keys[index] for keys in self.keys],
            [values[index] for values in self.values],
            [None if pair is None else (pair[0][index], pair[1][index]) for pair in self.memory],
        )


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, memory cross-attention in stateful layers, and experts or a dense SwiGLU."""

    def __init__(self, config: ModelConfig, kind: LayerKind, stateful: bool) -> None:
        super().__init__()
        size, eps, decoder = config.hidden_size, config.norm_eps, config.decoder
        self.stateful = stateful
        self.self_norm = nn.RMSNorm(size, eps)
        self.self_attention = Attention(size, config.head_size, decoder.self_attention, eps)
        if stateful:
            self.cross_norm = nn.RMSNorm(size, eps)
            self.memory_norm = nn.RMSNorm(size, eps)
            self.cross_attention = Attention(size, config.head_size, decoder.cross_attention, eps)
        self.feed_forward_norm = nn.RMSNorm(size, eps)
        self.feed_forward: MixtureOfExperts | SwiGLU
        if kind == "moe":
            assert decoder.experts is not None  # validated with the config
            self.feed_forward = MixtureOfExperts(size, decoder.experts)
        else:
            assert decoder.feed_forward_size is not None
            self.feed_forward = SwiGLU(size, decoder.feed_forward_size)

    def memory_keys_values(self, slots: Tensor) -> KeysValues:
        """Keys and values of the memory [B, S, D]: the same for every token of an interaction."""
        return self.cross_attention.keys_values(self.memory_norm(slots))

    def read(
        self, x: Tensor, memory: KeysValues, rotary: KeysValues, mask: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        """Add what memory cross-attention reads (rotary on the query only); no gradient goes there in `frozen` rows."""
        found = self.cross_attention.attend(self.cross_norm(x), memory, rotary, mask)
        return x + (found if frozen is None else torch.where(frozen[:, None, None], found.detach(), found))

    def forward(
        self,
        x: Tensor,
        tokens: RealTokens | None,
        rotary: KeysValues,
        memory: Tensor | KeysValues | None,
        readable: Tensor | None = None,
        cache: KeysValues | None = None,
        visible: Tensor | None = None,
        frozen: Tensor | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """Whole sequences [B, T, D] from position 0: the new states, and what the router did where there is one.

        `memory` is the layer's slots [B, S, D] (`readable` [B, 1, 1 or T, S]), or their keys and values, projected
        before; `cache` keeps the keys and values of self-attention; `visible` [B, 1, T, T] are the tokens that each may
        read, all earlier ones if not given; `frozen` [B] see `read`.
        """
        normed = self.self_norm(x)
        key, value = self.self_attention.keys_values(normed, rotary)
        if cache is not None:
            cache[0][:, :, : x.shape[1]], cache[1][:, :, : x.shape[1]] = key, value
        x = x + self.self_attention.attend(normed, (key, value), rotary, visible, causal=visible is None)
        if memory is not None:
            slots = memory if isinstance(memory, tuple) else self.memory_keys_values(memory)
            x = self.read(x, slots, rotary, readable, frozen)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, SwiGLU):
            return x + self.feed_forward(normed), None
        routed = self.feed_forward(normed, tokens)
        return x + routed.output, routed

    def step(
        self, x: Tensor, position: Tensor, rotary: KeysValues, keys: Tensor, values: Tensor, visible: Tensor | None
    ) -> Tensor:
        """Self-attention of new tokens [B, T, D] at `position` [B, T], whose keys and values go into the cache."""
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        normed = self.self_norm(x)
        key, value = self.self_attention.keys_values(normed, rotary)
        keys[rows, :, position] = key.transpose(1, 2)
        values[rows, :, position] = value.transpose(1, 2)
        length = keys.shape[2] if visible is None else visible.shape[-1]
        return x + self.self_attention.attend(normed, (keys[:, :, :length], values[:, :, :length]), rotary, visible)

    def mix(self, x: Tensor) -> Tensor:
        """Add the feed-forward's output for new tokens, without the training's statistics."""
        normed = self.feed_forward_norm(x)
        return x + (
            self.feed_forward(normed) if isinstance(self.feed_forward, SwiGLU) else self.feed_forward.mix(normed)
        )


class Decoder(nn.Module):
    """Causal decoder; its head is not tied to the embedding (REF 1.2, 1.6).

    Stateful layer i reads memory layer i. `kinds` are the feed-forwards of stateless layers before, stateful layers and
    stateless layers after; a model without memory has none of the second.
    """

    def __init__(self, config: ModelConfig, stateful: bool = True) -> None:
        super().__init__()
        decoder = config.decoder
        before, after = decoder.stateless_layers, decoder.final_stateless_layers
        kinds = [*before, *[decoder.stateful_kind] * config.layers, *after]
        first = len(before)
        self.layers = cast(
            "Sequence[DecoderLayer]",
            nn.ModuleList(
                DecoderLayer(config, kind, stateful and first <= i < first + config.layers)
                for i, kind in enumerate(kinds)
            ),
        )
        self.rotary = RotaryEmbedding(config.head_size, config.rope_base)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps) if decoder.final_norm else None
        self.head = VocabularyHead(config.hidden_size, config.vocab_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        documents: Documents | None = None,
        frozen_memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of embedded tokens [B, T, D] that read `memory` [L, B, S, D].

        `memory_mask` [B, S], or [B, T, S] where tokens of a row may read different parts of it. `mask` [B, T] is True
        at real tokens, None without padding; `documents` where a row holds several, which then don't read each other;
        `frozen_memory` [B] True where memory cross-attention gets no gradient.
        Returns the states, the mean over mixture layers of each text's balance loss [B, or the documents' count], and
        how many tokens went to each expert [M, E]; a plain tuple, in which ZeRO-3 finds the tensors.
        """
        whole = mask is None and documents is None
        tokens = None if whole else RealTokens.of(_real(mask, x), documents)
        readable = None
        if memory_mask is not None:
            readable = memory_mask[:, None, None, :] if memory_mask.dim() == 2 else memory_mask[:, None]
        visible = None if documents is None else documents.causal[:, None]
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device) if documents is None else documents.position)
        routed: list[Routed] = []
        for layer, slots in zip(self.layers, self._memory_layers(memory), strict=True):
            x, mixture = layer(x, tokens, rotary, slots, readable, visible=visible, frozen=frozen_memory)
            if mixture is not None:
                routed.append(mixture)
        if not routed:
            texts = x.shape[0] if documents is None else documents.count
            return self._normed(x), x.new_zeros(texts, dtype=torch.float32), x.new_zeros(0, 0)
        balance = torch.stack([one.balance for one in routed]).mean(dim=0)
        return self._normed(x), balance, torch.stack([one.usage for one in routed])

    def _memory_layers(self, memory: Tensor | None) -> list[Tensor | None]:
        """Each layer's own memory [B, S, D], None in stateless layers. Raises ModelError when they are not as many."""
        stateful, given = sum(layer.stateful for layer in self.layers), 0 if memory is None else memory.shape[0]
        if stateful != given:
            raise ModelError(f"a memory of {given} layers for {stateful} layers that read one")
        slots = iter(() if memory is None else memory.unbind(0))
        return [next(slots) if layer.stateful else None for layer in self.layers]

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def start_cache(self, memory: Tensor | None, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens over a memory [L, B, S, D], whose keys and values are projected once."""
        attention, weight = self.layers[0].self_attention, self.head.weight
        shape = (batch, attention.key_value_heads, length, attention.head_size)
        return Cache(
            keys=[weight.new_zeros(shape) for _ in self.layers],
            values=[weight.new_zeros(shape) for _ in self.layers],
            memory=[
                None if slots is None else layer.memory_keys_values(slots)
                for layer, slots in zip(self.layers, self._memory_layers(memory), strict=True)
            ],
        )

    def prefill(self, x: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Hidden states of prompts [B, T, D] at positions 0..T-1, whose keys and values go into the empty cache.

        What padding (`mask` [B, T] False) leaves in the cache is overwritten by the row's token that goes there, before
        any token may read it.
        """
        rotary = self.rotary(torch.arange(x.shape[1], device=x.device))
        tokens = RealTokens.of(mask)
        for layer, keys, values, memory in zip(self.layers, cache.keys, cache.values, cache.memory, strict=True):
            x, _ = layer(x, tokens, rotary, memory, None, (keys, values))
        return self._normed(x)

    def step(self, x: Tensor, positions: Tensor, cache: Cache, length: int | None = None) -> Tensor:
        """Hidden states of new tokens [B, T, D] at `positions` [B, T], which are written into the cache.

        A token reads the cache up to its own position; `length` says that no position reaches it, so that less of the
        cache is read.
        """
        rotary = self.rotary(positions)
        window = torch.arange(length or cache.length, device=x.device)
        visible = (window <= positions[..., None])[:, None]
        for layer, keys, values, memory in zip(self.layers, cache.keys, cache.values, cache.memory, strict=True):
            x = layer.step(x, positions, rotary, keys, values, visible)
            if memory is not None:
                x = layer.read(x, memory, rotary, None)
            x = layer.mix(x)
        return self._normed(x)


def _real(mask: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask

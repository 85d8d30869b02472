"""FLOPs of what a model computes: matrix products only, a multiply-add counted as two (as PaLM, arXiv:2204.02311, B).

Attention counts the positions that it reads, causal self-attention half of its window on average; of a mixture of
experts those that a token is sent to. A backward pass computes two products for each one of the forward.
"""

from dataclasses import dataclass
from typing import Self

from torch import nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.model.attention import Attention
from rxt_platform.model.feedforward import MixtureOfExperts
from rxt_platform.model.memory import ResidualGate
from rxt_platform.model.stepper import LanguageModel
from rxt_platform.model.transformer import ReactiveTransformer


@dataclass(frozen=True)
class ForwardFlops:
    """Coefficients of a model's forward, taken from its modules once.

    *_token  products with weights, for each position; of the decoder's mixtures, for each real token
    *_pair   scores and weighted values, for each position that a position reads
    *_slot   products with weights, for each slot of a memory that is read
    """

    config: ModelConfig
    encoder_token: int
    encoder_pair: int
    encoder_row: int  # over the fixed memory of the early Micro encoders
    frozen_token: int  # that a backward through the encoder leaves out, as that attention is never trained
    frozen_row: int
    decoder_token: int
    mixture_token: int
    decoder_pair: int
    cross_token: int
    cross_slot: int
    cross_pair: int
    write_token: int
    write_pair: int
    write_row: int
    head_token: int
    masked_head_token: int

    @classmethod
    def of(cls, model: LanguageModel) -> Self:
        """From a model whose parameters are whole (not yet cut by ZeRO-3); it may be on the meta device."""
        slots = model.config.memory.slots
        reactive = model if isinstance(model, ReactiveTransformer) else None
        encoder, decoder = [] if reactive is None else list(reactive.encoder.layers), list(model.decoder.layers)
        frozen = [layer.frozen_memory.attention for layer in encoder if layer.frozen_memory is not None]
        cross = [layer.cross_attention for layer in decoder if layer.stateful]
        mixtures = [layer.feed_forward for layer in decoder if isinstance(layer.feed_forward, MixtureOfExperts)]
        written = [] if reactive is None else list(reactive.memory_attention.layers)
        gates = [gate for layer in written for gate in layer.children() if isinstance(gate, ResidualGate)]
        mixing = [layer.self_attention for layer in written if layer.variant != "simple"]
        return cls(
            config=model.config,
            encoder_token=sum(map(_products, encoder))
            - sum(map(_context, frozen))
            + sum(_read(a, slots) for a in frozen),
            encoder_pair=sum(_read(layer.attention) for layer in encoder),
            encoder_row=slots * sum(map(_context, frozen)),
            frozen_token=sum(_products(a) - _context(a) + _read(a, slots) for a in frozen),
            frozen_row=2 * slots * sum(map(_context, frozen)),
            decoder_token=sum(map(_products, decoder)) - sum(map(_products, mixtures)) - sum(map(_context, cross)),
            mixture_token=sum(map(_products, mixtures)),
            decoder_pair=sum(_read(layer.self_attention) for layer in decoder),
            cross_token=sum(_products(attention) - _context(attention) for attention in cross),
            cross_slot=sum(map(_context, cross)),
            cross_pair=sum(map(_read, cross)),
            write_token=sum(_context(layer.write_attention) for layer in written),
            write_pair=sum(_read(layer.write_attention) for layer in written),
            write_row=slots
            * sum(_products(layer.write_attention) - _context(layer.write_attention) for layer in written)
            + slots * sum(_products(attention) + _read(attention, slots) for attention in mixing)
            + sum(map(_products, gates)),
            head_token=_products(model.decoder.head),
            masked_head_token=0 if reactive is None else _products(reactive.mlm_head),
        )

    def encode(self, rows: int, length: int) -> int:
        """Encoding [rows, length] positions."""
        return rows * (length * self.encoder_token + length * length * self.encoder_pair + self.encoder_row)

    def train_encoder(self, rows: int, length: int) -> int:
        """Encoding [rows, length] positions, and the backward of it."""
        return 3 * self.encode(rows, length) - rows * (length * self.frozen_token + self.frozen_row)

    def decode(self, rows: int, length: int, real: int, slots: int) -> int:
        """Decoding [rows, length] positions, of which `real` are tokens, over memories of `slots`; without the head."""
        pairs = length * length // 2 * self.decoder_pair + length * slots * self.cross_pair
        return rows * (length * self.decoder_token + pairs + slots * self.cross_slot) + real * self.mixture_token

    def train_decoder_alone(self, rows: int, length: int, real: int, slots: int) -> int:
        """Decoding and the backward of it, where the memory cross-attention and what it reads are not trained."""
        left_out = length * (self.cross_token + slots * self.cross_pair)
        return 3 * self.decode(rows, length, real, slots) - rows * (left_out + 2 * slots * self.cross_slot)

    def write(self, rows: int, length: int) -> int:
        """Writing encoder states [layers, rows, length] into memories."""
        slots = self.config.memory.slots
        return rows * (length * (self.write_token + slots * self.write_pair) + self.write_row)

    def head(self, tokens: int) -> int:
        """Logits of so many tokens."""
        return tokens * self.head_token

    def masked_head(self, tokens: int) -> int:
        """Logits of so many masked tokens."""
        return tokens * self.masked_head_token

    @property
    def generated_token(self) -> int:
        """One new token with a full window of earlier ones and the memory's keys and values at hand."""
        config = self.config
        read = config.max_length * self.decoder_pair + config.memory.slots * self.cross_pair
        return self.decoder_token + self.mixture_token + self.head_token + read

    @property
    def written_token(self) -> int:
        """Encoding and writing a full window and projecting the memory's new keys and values, per token of it."""
        window, slots = self.config.max_length, self.config.memory.slots
        return (self.encode(1, window) + self.write(1, window) + slots * self.cross_slot) // window


def _products(module: nn.Module) -> int:
    """2 * the weights that one token is multiplied with."""
    flops = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            flops += 2 * part.weight.numel()
        elif isinstance(part, MixtureOfExperts):
            routed = part.input_weight.numel() + part.output_weight.numel()
            flops += 2 * routed * part.config.per_token // part.config.number
    return flops


def _context(attention: Attention) -> int:
    """The part of an attention's products that is done for each position that can be read."""
    return _products(attention.key) + _products(attention.value)


def _read(attention: Attention, positions: int = 1) -> int:
    """Scores and weighted values of one query token over so many positions."""
    return 4 * max(attention.query_heads, attention.key_value_heads) * attention.head_size * positions

"""What a Reactive Transformer is made of (REF sections 1 and 2). Sizes only: no torch here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec


class AttentionConfig(Spec):
    """Heads of one attention. Fewer query heads than the model's nominal `heads` is Sparse Query Attention (SQA)."""

    query_heads: int = Field(gt=0)
    key_value_heads: int = Field(gt=0)
    output_bias: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"query_heads ({self.query_heads}) must be a multiple of key_value_heads ({self.key_value_heads})"
            )
        return self


class EncoderConfig(Spec):
    """The bidirectional, dense encoder that turns an interaction into what memory attention reads."""

    attention: AttentionConfig
    feed_forward_size: int = Field(gt=0, description="inner width of SwiGLU")


class DecoderConfig(Spec):
    """The causal decoder with memory cross-attention and a mixture of experts in every layer."""

    self_attention: AttentionConfig
    cross_attention: AttentionConfig
    feed_forward_size: int = Field(gt=0, description="inner width of each expert")
    experts: int = Field(gt=0)
    experts_per_token: int = Field(gt=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) is more than experts ({self.experts})")
        return self


class MemoryConfig(Spec):
    """The short-term memory [layers, batch, slots, hidden] and the attention that writes it."""

    slots: int = Field(gt=0)
    attention: AttentionConfig
    variant: Literal["interlayer"] = "interlayer"
    gate: Literal["linear", "elementwise", "static"] = Field("linear", description="sigmoid residual gate, per slot")
    initialization: Literal["standard", "fixed"] = Field(
        "standard",
        description="standard: N(0, 1), new for every conversation; fixed: one N(0, 1) draw that all conversations "
        "start from, so that slots have an identity",
    )


class ModelConfig(Spec):
    """A whole Reactive Transformer. Encoder, memory and decoder have the same number of layers (REF 1.1)."""

    vocab_size: int = Field(gt=16)
    hidden_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0, description="nominal heads: the head dimension is hidden_size / heads")
    max_length: int = Field(gt=8, description="window of one interaction, in tokens")
    encoder: EncoderConfig
    decoder: DecoderConfig
    memory: MemoryConfig
    rope_base: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)

    @property
    def head_size(self) -> int:
        """Dimension of one attention head."""
        return self.hidden_size // self.heads

    @model_validator(mode="after")
    def _sizes_fit_grouped_products(self) -> Self:
        sizes = {"hidden_size": self.hidden_size, "decoder.feed_forward_size": self.decoder.feed_forward_size}
        for name, size in sizes.items():
            if size % 8:
                raise ValueError(f"{name} ({size}) must be a multiple of 8: grouped matrix products need aligned rows")
        return self

    @model_validator(mode="after")
    def _head_size_is_even(self) -> Self:
        if self.hidden_size % self.heads or self.head_size % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) / heads ({self.heads}) must be an even whole number: "
                "rotary positions turn pairs of channels"
            )
        return self

"""What a Reactive Transformer is made of (REF sections 1 and 2). Sizes only: no torch here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rxt_platform.config.base import Spec

LayerKind = Literal["dense", "moe"]
GateKind = Literal["linear", "elementwise", "static"]
GateActivation = Literal["sigmoid", "tanh", "none"]
MemoryVariant = Literal["simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer"]
MemoryInitialization = Literal["standard", "normal", "uniform", "ones", "zeros", "fixed"]


class AttentionConfig(Spec):
    """Heads of one attention, each of the model's head size (REF 1.4).

    With H the model's nominal `heads`: query = key-value = H is MHA, fewer key-value heads GQA, one MQA. Fewer query
    heads than H is Sparse Query Attention: symmetric when key-value heads equal them, reverse when there are more.
    """

    query_heads: int = Field(gt=0)
    key_value_heads: int = Field(gt=0)
    output_bias: bool = True
    gated: bool = Field(False, description="multiply what was read by a sigmoid gate of the query token (Beta)")
    query_key_norm: bool = Field(False, description="RMSNorm over each query and key head, before the rotation")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.query_heads % self.key_value_heads and self.key_value_heads % self.query_heads:
            raise ValueError(
                f"of query_heads ({self.query_heads}) and key_value_heads ({self.key_value_heads}) one must be a "
                "multiple of the other"
            )
        return self


class ExpertsConfig(Spec):
    """A mixture of SwiGLU experts: top-k routing without a capacity limit, no token dropped (REF 1.5)."""

    number: int = Field(gt=0)
    per_token: int = Field(gt=0, description="experts that a token is sent to (k)")
    size: int = Field(gt=0, description="inner width of each expert")
    bias: Literal["local", "global", "off"] = Field(
        "local", description="local: in every expert; global: one vector after the combination (Beta)"
    )
    shared: int = Field(0, ge=0, description="experts that every token goes through, mixed by a softmax gate")
    shared_size: int | None = Field(None, gt=0, description="inner width of a shared expert; `size` if not given")
    balancing: Literal["loss", "bias"] = Field(
        "loss",
        description="loss: Switch-style auxiliary loss; bias: no loss, after each step an overloaded expert's "
        "selection bias is lowered and an underloaded one's raised (arXiv:2408.15664)",
    )
    bias_update_rate: float = Field(1e-3, gt=0, description="step of the selection bias, in router probability")

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.per_token > self.number:
            raise ValueError(f"per_token ({self.per_token}) is more than the number of experts ({self.number})")
        if self.size % 8:
            raise ValueError(f"size ({self.size}) must be a multiple of 8: grouped matrix products need aligned rows")
        return self


class EncoderConfig(Spec):
    """The bidirectional, dense encoder that turns an interaction into what memory attention reads."""

    attention: AttentionConfig
    feed_forward_size: int = Field(gt=0, description="inner width of SwiGLU")
    cross_attention: AttentionConfig | None = Field(
        None, description="as in the early Micro models: frozen, over a fixed near-zero random memory (REF 1.3)"
    )


class DecoderConfig(Spec):
    """The causal decoder: `layers` stateful layers with memory cross-attention, stateless ones before and after."""

    self_attention: AttentionConfig
    cross_attention: AttentionConfig
    experts: ExpertsConfig | None = Field(None, description="without: stateful layers have a dense feed-forward")
    feed_forward_size: int | None = Field(None, gt=0, description="inner width of SwiGLU in dense layers")
    stateless_layers: list[LayerKind] = Field(
        default_factory=list, description="layers without memory cross-attention, before the stateful ones"
    )
    final_stateless_layers: list[LayerKind] = Field(default_factory=list, description="the same, after them")
    final_norm: bool = Field(False, description="RMSNorm before the head (Beta)")

    @property
    def stateful_kind(self) -> LayerKind:
        """Feed-forward of the stateful layers."""
        return "moe" if self.experts else "dense"

    @model_validator(mode="after")
    def _kinds_have_sizes(self) -> Self:
        kinds = {self.stateful_kind, *self.stateless_layers, *self.final_stateless_layers}
        if "dense" in kinds and self.feed_forward_size is None:
            raise ValueError("dense layers need feed_forward_size")
        if "moe" in kinds and self.experts is None:
            raise ValueError("moe layers need experts: {number, per_token, size}")
        return self


class MemoryConfig(Spec):
    """The short-term memory [layers, batch, slots, hidden] and the attention that writes it (REF 1.7, 1.8)."""

    slots: int = Field(gt=0, le=2**20)
    attention: AttentionConfig
    variant: MemoryVariant = Field(
        "interlayer", description="what slots read before the write: nothing, their layer, the mean of layers, both"
    )
    groups: int = Field(1, gt=0, description="grouped variant: layers are averaged within so many groups")
    gate: GateKind = Field("linear", description="how a slot's residual gate is computed")
    gate_activation: GateActivation = Field(
        "sigmoid", description="sigmoid: g*new + (1-g)*old; tanh: (1+g)*new + (1-g)*old; none: old + new, no gate"
    )
    gate_per_slot: bool = Field(True, description="a gate weight for each slot, or one for the whole layer")
    gate_self_attention: bool = Field(True, description="also gate what was read before the write")
    initialization: MemoryInitialization = Field(
        "standard",
        description="standard: N(0, 1), normal: N(0, 0.02^2), uniform: [0, 1), each new for every conversation; ones; "
        "zeros; fixed: one N(0, 1) draw that all conversations start from, so that slots have an identity",
    )


class ModelConfig(Spec):
    """A whole Reactive Transformer. Encoder, memory and stateful decoder layers are equally many (REF 1.1)."""

    vocab_size: int = Field(gt=16, le=2**24)
    hidden_size: int = Field(gt=0, le=2**16)
    layers: int = Field(gt=0, le=1024)
    heads: int = Field(gt=0, description="nominal heads: the head dimension is hidden_size / heads")
    max_length: int = Field(gt=8, le=2**20, description="window of one interaction, in tokens")
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
    def _sizes_fit(self) -> Self:
        if self.decoder.experts and self.hidden_size % 8:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of 8: grouped matrix products need aligned rows"
            )
        if self.hidden_size % self.heads or self.head_size % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) / heads ({self.heads}) must be an even whole number: "
                "rotary positions turn pairs of channels"
            )
        grouped = self.memory.variant == "grouped-self-interlayer"
        if self.layers % self.memory.groups or (self.memory.groups > 1 and not grouped):
            raise ValueError(
                f"memory.groups ({self.memory.groups}) must divide layers ({self.layers}), and be 1 for the variant "
                f"{self.memory.variant!r}: only grouped-self-interlayer has groups"
            )
        return self


class HeadConfig(Spec):
    """What an encoder on its own puts on its pooled states."""

    kind: Literal["classification", "regression", "value"]
    outputs: int = Field(1, gt=0, description="classes of a classification, numbers of a regression")
    scale: float = Field(10.0, gt=0, description="value head: values start between 0 and this")
    max_length: int | None = Field(None, gt=0, description="window in tokens, if not the model's")

    @model_validator(mode="after")
    def _outputs_fit(self) -> Self:
        if self.kind == "classification" and self.outputs < 2:
            raise ValueError(f"a classification needs outputs of at least 2 classes, not {self.outputs}")
        if self.kind == "value" and self.outputs != 1:
            raise ValueError(f"a value head has 1 output, not {self.outputs}")
        return self

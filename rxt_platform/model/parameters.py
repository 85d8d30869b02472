"""Which component a parameter belongs to, and how many each component has (REF 2.2)."""

from dataclasses import dataclass

import torch
from torch import nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.config.stages import Component
from rxt_platform.model.feedforward import MixtureOfExperts
from rxt_platform.model.transformer import ReactiveTransformer


@dataclass(frozen=True)
class Count:
    """Parameters of a component, and those that one token uses (`experts_per_token` of the experts)."""

    parameters: int
    active: int


def component_of(name: str) -> Component:
    """The component of a parameter of `ReactiveTransformer`, by its name."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("encoder."):
        return "encoder"
    if name.startswith("memory_attention."):
        return "memory_attention"
    if name.startswith(("mlm_head.", "decoder.head.")):
        return "heads"
    if ".cross_attention." in name or ".cross_norm." in name or ".memory_norm." in name:
        return "memory_cross_attention"
    return "decoder"


def count_parameters(config: ModelConfig) -> dict[str, Count]:
    """Decoder and encoder (each with the shared embedding), memory attention, MLM head and `total`.

    `total` is the model without the MLM head, the shared embedding counted once. Counted on the meta device.
    """
    with torch.device("meta"):
        model = ReactiveTransformer(config)
    embedding = _count(model.embedding).parameters
    decoder, encoder = _count(model.decoder), _count(model.encoder)
    memory, head = _count(model.memory_attention), _count(model.mlm_head)
    return {
        "decoder": Count(decoder.parameters + embedding, decoder.active + embedding),
        "encoder": Count(encoder.parameters + embedding, encoder.active + embedding),
        "memory_attention": memory,
        "mlm_head": head,
        "total": Count(
            embedding + decoder.parameters + encoder.parameters + memory.parameters,
            embedding + decoder.active + encoder.active + memory.active,
        ),
    }


def _count(module: nn.Module) -> Count:
    total = sum(parameter.numel() for parameter in module.parameters())
    idle = 0
    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            experts = (part.input_weight, part.input_bias, part.output_weight, part.output_bias)
            size = sum(parameter.numel() for parameter in experts)
            idle += size * (part.experts - part.experts_per_token) // part.experts
    return Count(total, total - idle)

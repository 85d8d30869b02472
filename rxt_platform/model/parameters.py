"""How large a model is: which component a parameter belongs to, counts (REF 2.2), bytes, FLOPs. On the meta device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.config.stage_base import Component
from rxt_platform.model.feedforward import MixtureOfExperts
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.transformer import ReactiveTransformer


@dataclass(frozen=True)
class Count:
    """Parameters of a component, and those that one token uses (k of the routed experts)."""

    parameters: int
    active: int


@dataclass(frozen=True)
class ModelSize:
    """What a model takes.

    components        decoder and encoder (each with the shared embedding), memory_attention, mlm_head
    total             all but the MLM head, the shared embedding counted once
    weight_bytes      of `total`, by precision
    memory            numbers in one conversation's memory, L * S * D, and its bytes by precision
    flops_per_token   decode: one generated token, with a full window and the memory read; write: encoding and writing a
                      full window, for each of its tokens. Multiply-add = 2; matrix products only.
    """

    components: dict[str, Count]
    total: Count
    weight_bytes: dict[str, int]
    memory: dict[str, int]
    flops_per_token: dict[str, int]


def component_of(name: str) -> Component | Literal["frozen"]:
    """The component of a parameter of a (whole) model, by its name; "frozen" is never trained."""
    if ".frozen_memory." in name:
        return "frozen"
    if name.startswith("critic."):
        return "critic_head" if name.startswith("critic.head.") else "critic"
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("encoder."):
        return "encoder"
    if name.startswith("memory_attention."):
        return "memory_attention"
    if name.startswith("mlm_head."):
        return "mlm_head"
    if name.startswith("decoder.head."):
        return "head"
    if ".cross_attention." in name or ".cross_norm." in name or ".memory_norm." in name:
        return "memory_cross_attention"
    return "decoder"


def measure_size(config: ModelConfig) -> ModelSize:
    """Sizes of a model that need not fit anywhere."""
    with torch.device("meta"):
        model = ReactiveTransformer(config)
    embedding = count(model.embedding).parameters
    decoder, encoder = count(model.decoder), count(model.encoder)
    memory, head = count(model.memory_attention), count(model.mlm_head)
    total = Count(
        embedding + decoder.parameters + encoder.parameters + memory.parameters,
        embedding + decoder.active + encoder.active + memory.active,
    )
    state = config.layers * config.memory.slots * config.hidden_size
    flops = ForwardFlops.of(model)
    return ModelSize(
        components={
            "decoder": Count(decoder.parameters + embedding, decoder.active + embedding),
            "encoder": Count(encoder.parameters + embedding, encoder.active + embedding),
            "memory_attention": memory,
            "mlm_head": head,
        },
        total=total,
        weight_bytes={"fp32": 4 * total.parameters, "bf16": 2 * total.parameters},
        memory={"numbers": state, "fp32": 4 * state, "bf16": 2 * state},
        flops_per_token={"decode": flops.generated_token, "write": flops.written_token},
    )


def count(module: nn.Module) -> Count:
    """Parameters of a module, all and active."""
    total = sum(parameter.numel() for parameter in module.parameters())
    idle = 0
    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            size = sum(parameter.numel() for parameter in _routed(part))
            idle += size * (part.config.number - part.config.per_token) // part.config.number
    return Count(total, total - idle)


def _routed(mixture: MixtureOfExperts) -> Iterable[nn.Parameter]:
    weights = (mixture.input_weight, mixture.input_bias, mixture.output_weight, mixture.output_bias)
    return [weight for weight in weights if weight is not None]


def render_sizes(sizes: Mapping[str, ModelSize]) -> str:
    """A table of models, one row each."""
    columns = ("decoder", "active", "encoder", "memory att.", "MLM head", "total", "bf16", "STM bf16", "FLOPs/token")
    lines = [f"{'model':<16}" + "".join(f"{name:>15}" for name in columns)]
    for name, size in sizes.items():
        parts = size.components
        numbers = (
            parts["decoder"].parameters,
            parts["decoder"].active,
            *(parts[part].parameters for part in ("encoder", "memory_attention", "mlm_head")),
            size.total.parameters,
        )
        texts = [
            *(f"{number:,}" for number in numbers),
            _mebibytes(size.weight_bytes["bf16"]),
            _mebibytes(size.memory["bf16"]),
            f"{size.flops_per_token['decode'] / 1e6:,.1f}M",
        ]
        lines.append(f"{name:<16}" + "".join(f"{text:>15}" for text in texts))
    lines.append(
        "Decoder and encoder each count the embedding that they share; total counts it once, without the MLM head.\n"
        "STM: one conversation's memory. FLOPs: one generated token with a full window; --json has more."
    )
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"

"""What training does to a model's layers, whatever model they are of: compile, recompute, balance their experts."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rxt_platform.model.decoder import DecoderLayer
from rxt_platform.model.encoder import EncoderLayer
from rxt_platform.model.feedforward import MixtureOfExperts
from rxt_platform.model.memory import MemoryLayer


def compile_layers(model: nn.Module) -> None:
    """Let torch.compile make each layer's forward faster, for any batch and sequence length; names stay."""
    for layer in _layers(model):
        layer.compile(dynamic=True)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep each layer's input only, and compute the rest again in the backward pass: less memory, more time."""
    for layer in _layers(model):
        layer.forward = _recomputed(layer.forward)


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """A model's mixtures of experts, in the order of `Decoded.usage`."""
    return [part for part in model.modules() if isinstance(part, MixtureOfExperts)]


def rebalance(model: nn.Module, usage: Tensor) -> None:
    """After an optimizer step with `usage` [M, E] over the global batch: move the selection biases, if any."""
    for mixture, counts in zip(mixtures(model), usage, strict=True):
        if mixture.config.balancing == "bias":
            mixture.rebalance(counts)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, DecoderLayer | EncoderLayer | MemoryLayer)]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` whose activations are not kept where a gradient will be asked for."""

    @functools.wraps(forward)
    def wrapped(*inputs: Any, **options: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    return wrapped

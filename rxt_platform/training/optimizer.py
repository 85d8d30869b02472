"""AdamW with one parameter group for each component, and the learning rate of every step."""

import math

import torch
from torch import nn

from rxt_platform.config.stage_base import Component, OptimizerConfig
from rxt_platform.model.parameters import component_of
from rxt_platform.stages.base import Phase


def build_optimizer(model: nn.Module, config: OptimizerConfig, phases: list[Phase]) -> torch.optim.Optimizer:
    """AdamW over the components that any phase trains; the others stop requiring gradients.

    A component that only a later phase trains keeps its group, at learning rate 0: ZeRO sets its partitions up once
    and does not notice a `requires_grad` that changes later. So phases lose no moments; a component that comes later
    starts with moments of zero and the stage's step count, which makes its first ten updates gentler than Adam's own.
    """
    trained = frozenset[Component]().union(*(phase.trains for phase in phases))
    groups: dict[Component, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        component = component_of(name)
        parameter.requires_grad_(component in trained)
        if component != "frozen" and component in trained:
            groups.setdefault(component, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "component": component} for component, parameters in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def schedule(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of `step` (from 0) of `steps`.

    Linear warm-up to `learning_rate`; then half a cosine (arXiv:1608.03983, eq. 5, one cycle), a stable part and a
    linear decay (WSD, arXiv:2404.06395), or no decay.
    """
    warmup = _steps(config.warmup, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    else:
        decay = _steps(config.decay, steps)
        left = min(1.0, (steps - step) / max(1, decay))
    return config.learning_rate * (config.final + (1 - config.final) * left)


def _steps(share: float, steps: int) -> int:
    """Rounded up; 7 % of 100 is 7, whatever binary fractions make of it."""
    return math.ceil(round(share * steps, 6))


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, rate: float, phase: Phase) -> None:
    """Give every group its component's rate, 0 to those that `phase` does not train."""
    for group in optimizer.param_groups:
        component: Component = group["component"]
        group["lr"] = rate * config.learning_rate_scale.get(component, 1.0) if component in phase.trains else 0.0

"""Which part of the trained parameters and of Adam's state this rank holds, whichever way DeepSpeed cut them.

A parameter's fp32 weights and moments live in *holders*: the parameter itself (plain data parallel), or flat tensors in
which ZeRO lays its parameters end to end and of which a rank has a part. A `Stretch` says which elements of a
parameter are where in a holder. Checkpoints are made of stretches, so they fit any number of workers and any ZeRO
stage, and need none of DeepSpeed's pickled files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rxt_platform.config.stage_base import Component
from rxt_platform.model.parameters import component_of

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Stretch:
    """Elements start..start + length of a flattened parameter, at `offset` of a holder."""

    name: str
    parameter: nn.Parameter
    start: int
    length: int
    holder: Tensor
    offset: int

    @property
    def component(self) -> Component:
        """The parameter's."""
        component = component_of(self.name)
        assert component != "frozen"
        return component


class ShardedState:
    """The trained parameters of a DeepSpeed engine, as this rank holds them."""

    def __init__(self, engine: Any, model: nn.Module, zero_stage: int) -> None:
        self.engine, self.zero_stage = engine, zero_stage
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.adam: torch.optim.Optimizer = engine.basic_optimizer
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        masters = self._masters()
        self.held = [stretch for name, each in self.parameters.items() for stretch in self._cut(name, each, masters)]

    @property
    def owned(self) -> list[Stretch]:
        """Those that this rank answers for: over all ranks each element stands in exactly one."""
        if self.zero_stage:
            return self.held
        return [stretch for number, stretch in enumerate(self.held) if number % self.world == self.rank]

    def sizes(self) -> dict[str, int]:
        """Elements of each parameter."""
        return {name: _numel(parameter) for name, parameter in self.parameters.items()}

    def state(self, stretch: Stretch, kind: str) -> Tensor:
        """The stretch's weights or moments in fp32 [length], as a view into its holder."""
        whole = stretch.holder if kind == WEIGHT else self._adam_state(stretch.holder)[kind]
        return whole.detach().view(-1).narrow(0, stretch.offset, stretch.length)

    def updates(self) -> dict[str, int]:
        """Adam's step count of each component."""
        counts = {stretch.component: int(self._adam_state(stretch.holder)["step"]) for stretch in self.held}
        return {str(component): count for component, count in counts.items()}

    def set_updates(self, counts: dict[str, int]) -> None:
        """Continue Adam's step counts; a component that the checkpoint does not know of starts at 0."""
        for stretch in self.held:
            self._adam_state(stretch.holder)["step"].fill_(counts.get(stretch.component, 0))

    @torch.no_grad()
    def show_weights(self, name: str, whole: Tensor | None) -> None:
        """Let the forward compute with new master weights; `whole` [numel] in fp32 where ranks hold all of them."""
        parameter = self.parameters[name]
        if self.zero_stage < 3:
            assert whole is not None
            parameter.data.copy_(whole.view_as(parameter))
            return
        for stretch in self.held:
            if stretch.name == name:
                part = getattr(parameter, "ds_tensor").data.view(-1)  # noqa: B009 - DeepSpeed's own attribute
                part[: stretch.length].copy_(self.state(stretch, WEIGHT))
        # Small parameters stay whole on every rank between steps: without this the forward would use the old ones.
        if getattr(parameter, "ds_status").name == "AVAILABLE":  # noqa: B009
            getattr(parameter, "partition")()  # noqa: B009

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float]:
        """Norm of the gradient of each component after the backward pass, before clipping. All ranks must call it."""
        squares: dict[str, Tensor] = {}
        for stretch in self.held:
            gradient = self._gradient(stretch)
            if gradient is not None:
                before = squares.get(stretch.component, torch.zeros((), device=gradient.device))
                squares[stretch.component] = before + gradient.float().pow(2).sum()
        names = sorted({str(component_of(name)) for name in self.parameters})  # the same on all ranks
        device = next(iter(squares.values())).device if squares else torch.device("cpu")
        sums = torch.stack([squares.get(name, torch.zeros((), device=device)) for name in names])
        if self.zero_stage:
            sums = sums.to(self.engine.device)
            dist.all_reduce(sums)
        return dict(zip(names, sums.sqrt().tolist(), strict=True))

    def poison(self) -> None:
        """Make the gradient not finite, so that DeepSpeed leaves out the update and clears what it gathered."""
        for stretch in self.held:
            gradient = self._gradient(stretch)
            if gradient is not None and len(gradient):
                gradient[0] = float("nan")
                return

    def _masters(self) -> dict[int, Tensor]:
        """Where ranks hold whole parameters in low precision: the fp32 copy of each."""
        optimizer = self.engine.optimizer
        if self.zero_stage or not hasattr(optimizer, "fp32_groups"):
            return {}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _cut(self, name: str, parameter: nn.Parameter, masters: dict[int, Tensor]) -> Iterator[Stretch]:
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            holder = masters.get(id(parameter), parameter)
            yield Stretch(name, parameter, 0, parameter.numel(), holder, 0)
        elif self.zero_stage == 3:
            group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self.rank * part  # all ranks have equal parts, the last ones padded
            length = min(part, _numel(parameter) - start)
            if length > 0:
                holder = optimizer.fp32_partitioned_groups_flat[group]
                yield Stretch(name, parameter, start, length, holder, offset)
        elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            flat = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Stretch(name, parameter, here.start, here.numel, flat[mapping.param_group_index], there.start)

    def _adam_state(self, holder: Tensor) -> dict[str, Tensor]:
        """As `torch.optim.AdamW` would make it at its first step."""
        state: dict[str, Tensor] = self.adam.state[holder]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=holder.device)
            state |= {kind: torch.zeros_like(holder, memory_format=torch.preserve_format) for kind in MOMENTS}
        return state

    def _gradient(self, stretch: Stretch) -> Tensor | None:
        """The reduced gradient of a stretch, flat, None where there is none."""
        parameter, stop = stretch.parameter, stretch.start + stretch.length
        if self.zero_stage == 0:
            return None if parameter.grad is None else parameter.grad.view(-1)
        if self.zero_stage == 3:
            from deepspeed.utils import safe_get_local_grad

            return safe_get_local_grad(parameter).view(-1)[: stretch.length]
        try:
            mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - DeepSpeed's own attribute
            gradient: Tensor = mapping.get_lp_grad_fragment(getattr(parameter, "_index_in_param_group"))  # noqa: B009
        except ValueError:  # "only available immediately after backward"
            return None
        gradient = gradient.view(-1)
        return gradient[stretch.start : stop] if gradient.numel() == parameter.numel() else gradient


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO-3 keeps only a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))

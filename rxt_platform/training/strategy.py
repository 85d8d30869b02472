"""DeepSpeed: how a stage's model is spread over the workers, one forward after the other, and its update.

All that is particular to a ZeRO stage or a precision is here and in `sharding`. DeepSpeed averages gradients over
micro-batches and ranks, while parts of our losses add up, so losses are scaled by their number.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rxt_platform.config.stage_base import OptimizerConfig
from rxt_platform.config.training import TrainingConfig
from rxt_platform.stages.base import Phase
from rxt_platform.training.distributed import set_timeout
from rxt_platform.training.optimizer import build_optimizer, schedule, set_learning_rates
from rxt_platform.training.sharding import ShardedState


class Strategy:
    """A model under DeepSpeed, `program` being the module whose forward gives the loss."""

    def __init__(
        self,
        program: nn.Module,
        model: Any,
        training: TrainingConfig,
        config: OptimizerConfig,
        phases: list[Phase],
        forwards: int,
    ) -> None:
        import deepspeed

        self.training, self.config, self.model, self.forwards = training, config, model, forwards
        self.world = dist.get_world_size()
        self._skeleton = copy.deepcopy(model).to("meta") if training.zero_stage == 3 else None
        self._copy: Any = None
        self.optimizer = build_optimizer(model, config, phases)
        # What no phase trains comes out as it went in, also where DeepSpeed holds it in bf16.
        self.untrained = {
            name: parameter.detach().clone().cpu()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # one of DeepSpeed's optimizers begins with a step of its own
        self.engine, *_ = deepspeed.initialize(model=program, optimizer=self.optimizer, config=self._settings())
        self.sharded = ShardedState(self.engine, model, training.zero_stage)
        self.sharded.set_updates({})
        set_timeout(training.hang_seconds)

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        training, bf16 = self.training, self.training.precision == "bf16"
        zero: dict[str, Any] = {"stage": training.zero_stage}
        where = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if training.offload != "none":
            zero["offload_optimizer"] = where
        if training.offload == "parameters":
            zero["offload_param"] = where
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # only the product with the next matters to DeepSpeed, for its log
            "gradient_accumulation_steps": self.forwards,
            "gradient_clipping": self.config.gradient_clip,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16, **({"check_grad_overflow": True} if bf16 else {})},
            "steps_per_print": 10**9,
        }
        if bf16 and training.zero_stage:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            # Without it, ZeRO-1 of DeepSpeed 0.19.8 counts a step's first forwards again with each later one.
            settings["bf16"]["immediate_grad_update"] = True
        return settings

    @property
    def precision(self) -> torch.dtype:
        """That the forward computes in."""
        return torch.bfloat16 if self.training.precision == "bf16" else torch.float32

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The model for use without gradient outside of DeepSpeed's forward, such as for generation.

        Under ZeRO-3, whose modules hold parts only, a whole copy on every rank. All ranks must call it.
        """
        if self.training.zero_stage < 3:
            yield self.model
            return
        import deepspeed

        if self._copy is None:
            assert self._skeleton is not None
            self._copy = copy.deepcopy(self._skeleton).to_empty(device=self.engine.device)
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter), torch.no_grad():
                self._copy.get_parameter(name).copy_(parameter)
        for name, buffer in self.model.named_buffers():
            self._copy.get_buffer(name).copy_(buffer)
        yield self._copy

    def set_rates(self, step: int, steps: int, phase: Phase) -> float:
        """Set the learning rates of `step` (from 0) of `steps`; returns the rate before components' factors."""
        rate = schedule(self.config, step, steps)
        set_learning_rates(self.optimizer, self.config, rate, phase)
        return rate

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a part's gradient; after the `last` part of a step all ranks' gradients are reduced.

        Plain data parallel and ZeRO-1 reduce once a step. ZeRO-2 and 3 keep only a share of the gradients and reduce
        after each part.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world * self.forwards))
        if not last:
            self.engine.step()

    def update(self) -> float:
        """Clip, update the weights and clear the gradients. Returns the gradient's norm before clipping.

        If it is not finite no weight has changed.
        """
        if self.training.zero_stage == 0 and self.training.precision == "fp32":
            gradients = [one.grad for one in self.sharded.parameters.values() if one.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self.discard()
                return norm
            self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> None:
        """Leave out the update and clear the gradients."""
        if self.training.zero_stage == 0 and self.training.precision == "fp32":
            self.engine.zero_grad()
            return
        self.sharded.poison()
        self.engine.step()

    def full_state(self) -> dict[str, Tensor]:
        """All weights, gathered from the ranks' partitions, on rank 0: fp32 masters, and the untrained as they were."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        zero, state = self.training.zero_stage, dict[str, Tensor]()
        masters = {one.name: one.holder for one in self.sharded.held} if zero == 0 else {}
        state |= {name: buffer.detach().cpu().clone() for name, buffer in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            if name in self.untrained:
                state[name] = self.untrained[name]
                continue
            with deepspeed.zero.GatheredParameters(parameter, enabled=zero == 3):
                full = masters[name] if zero == 0 else safe_get_full_fp32_param(parameter)
                if dist.get_rank() == 0:
                    state[name] = full.detach().float().cpu().clone()
        return state if dist.get_rank() == 0 else {}

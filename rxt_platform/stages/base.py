"""What the engine knows of a stage: its phases, the batch of a step, a loss. A stage knows no engine and no Ray."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rxt_platform.config.stage_base import Component
from rxt_platform.config.stages import StageConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.transformer import ReactiveTransformer

Model = ReactiveTransformer | StatelessTransformer


@dataclass(frozen=True)
class Phase:
    """From `start` (a step) on, `trains` are the components with a learning rate; all others stay bit-identical."""

    name: str
    start: int
    trains: frozenset[Component]


@dataclass
class LossReport:
    """A part's contribution to the loss of the global batch.

    All of it adds up: over micro-batches and ranks the sums are the global batch's values. `usage` [M, E] counts the
    real tokens that each mixture layer sent to each expert.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    usage: Tensor | None = None

    def detached(self) -> "LossReport":
        """Its values without gradient."""
        return LossReport(self.loss.detach(), dict(self.metrics), self.usage)

    def plus(self, other: "LossReport") -> "LossReport":
        """The sums over both parts, without gradient."""
        metrics = {name: value + other.metrics[name] for name, value in self.metrics.items()}
        usage = None if self.usage is None or other.usage is None else self.usage + other.usage
        return LossReport(self.loss + other.loss.detach(), metrics, usage)

    def using(self, usage: Tensor) -> Self:
        """The same report with the experts' usage."""
        self.usage = usage.detach() if usage.numel() else None
        return self


class TrainingBatch(Protocol):
    """The rows of one optimizer step, the same on every rank: texts and conversations, or held episodes."""

    @property
    def rows(self) -> Tensor:
        """Index of each row in its data set [B]."""
        ...

    @property
    def tokens(self) -> int:
        """Real tokens."""
        ...

    def shares(self, rank: int, world: int, micro: int) -> Iterator[Any]:
        """The micro-batches of one of `world` workers, `micro` rows each."""
        ...


class Stage(Protocol):
    """A training stage over rows that are already token ids, for the kind of model that it is made for."""

    @property
    def config(self) -> StageConfig:
        """Its settings."""
        ...

    @property
    def sampler(self) -> BatchSampler:
        """Its training rows, batch by batch."""
        ...

    def phases(self) -> list[Phase]:
        """Which components train from which step on, the first from step 0."""
        ...

    def loss(self, model: Any, batch: Any, phase: Phase) -> LossReport:
        """Loss of a part of a global batch, with gradient to the components that `phase` trains."""
        ...

    def flops(self, model: ForwardFlops, batch: Any, phase: Phase) -> int:
        """FLOPs of `loss` and its backward pass on a part of a global batch, without what is computed again."""
        ...


class RowStage(Stage, Protocol):
    """A stage whose held-out metrics are means over rows; those of conversations that are held are not."""

    @property
    def mean_over(self) -> Mapping[str, str]:
        """For each metric, the field of `Batch` that counts what it is a mean of."""
        ...

    def evaluate(self, model: Any, batch: Batch, phase: Phase) -> LossReport:
        """What `loss before` and `loss after` are: the stage's metrics on a part of a held-out batch."""
        ...


TURNS = 2**16
"""More than a conversation has: purposes of draws that are made for each turn are so far apart."""


def row_noise(seeds: Tensor, shape: tuple[int, ...], purpose: int, like: Tensor) -> Tensor:
    """Standard normal noise [B, *shape], each row from its own seed and `purpose`, so that splits don't matter."""
    generator = torch.Generator()
    rows = [torch.randn(shape, generator=generator.manual_seed(seed ^ purpose)) for seed in seeds.tolist()]
    return torch.stack(rows).to(like)


def row_uniform(seeds: Tensor, shape: tuple[int, ...], purpose: int, device: torch.device) -> Tensor:
    """Uniform [0, 1) numbers [B, *shape], each row from its own seed and `purpose`."""
    generator = torch.Generator()
    rows = [torch.rand(shape, generator=generator.manual_seed(seed ^ purpose)) for seed in seeds.tolist()]
    return torch.stack(rows).to(device)


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase that a step belongs to."""
    return [phase for phase in phases if phase.start <= step][-1]


def with_metrics(total: Tensor, /, **metrics: Tensor) -> LossReport:
    """A report whose metrics carry no gradient."""
    values: Mapping[str, Tensor] = metrics
    return LossReport(total, {name: value.detach().float() for name, value in values.items()})

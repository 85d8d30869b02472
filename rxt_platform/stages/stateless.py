"""The stateless baseline's stages: the rows of the Reactive Transformer's, read as one text each.

A decoder without memory trains on the same batches, with the same schedule, as the stage that it is compared with: a
text or an interaction as it is, a conversation with all its turns one after the other. The targets are the same tokens
(DESIGN 2).
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from rxt_platform.config.stages import InteractionSFTConfig, JointPretrainingConfig, MemoryAwareConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.tokenizer import PAD
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.documents import Documents
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.loss import target_loss
from rxt_platform.stages.base import LossReport, Phase, with_metrics

StatelessConfig = JointPretrainingConfig | InteractionSFTConfig | MemoryAwareConfig
"""Stages that a model without memory can train on."""


class StatelessStage:
    """A causal language model over whole rows."""

    mean_over: ClassVar[Mapping[str, str]] = {
        "loss": "total_targets",
        "accuracy": "total_targets",
        "balance": "total_texts",
    }

    def __init__(self, config: StatelessConfig, sampler: BatchSampler) -> None:
        self.config = config
        self.sampler = sampler

    def phases(self) -> list[Phase]:
        """One phase: the whole model."""
        return [Phase("all", 0, frozenset({"embedding", "decoder", "head"}))]

    def loss(self, model: StatelessTransformer, batch: Batch, phase: Phase) -> LossReport:
        """Cross-entropy of the targets of the global batch, plus the experts' balance."""
        documents = None
        if batch.documents is not None:
            documents = Documents.of(batch.documents, batch.most_documents)
        ids, mask, targets = whole_rows(batch)
        decoded = model.decode_states(ids, mask, documents)
        summed, correct = target_loss(model, decoded.states, ids, targets)
        loss, accuracy = summed / batch.total_targets, correct / batch.total_targets
        balance = decoded.balance.sum() / batch.total_texts
        total = loss + self._balance_weight * balance
        return with_metrics(total, loss=loss, accuracy=accuracy, balance=balance).using(decoded.usage)

    def flops(self, model: ForwardFlops, batch: Batch, phase: Phase) -> int:
        """Forward and backward of decoder and head."""
        ids, mask, targets = whole_rows(batch)
        rows, length = ids.shape
        return 3 * (model.decode(rows, length, int(mask.sum()), 0) + model.head(int(targets.sum())))

    def evaluate(self, model: StatelessTransformer, batch: Batch, phase: Phase) -> LossReport:
        """The training loss, on held-out rows."""
        return self.loss(model, batch, phase)

    @property
    def _balance_weight(self) -> float:
        config = self.config
        return config.balance_weight if isinstance(config, MemoryAwareConfig) else config.loss.balance_weight


def whole_rows(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and targets [B, T] of rows with all their turns one after the other, right-padded.

    A packed row stays as it is.
    """
    if batch.documents is not None:
        return batch.ids[:, 0], batch.mask[:, 0], batch.targets[:, 0]
    real = (batch.mask & batch.turns[..., None]).flatten(1)
    rows, places = real.nonzero(as_tuple=True)
    to = (real.cumsum(dim=1) - 1)[rows, places]
    width = int(real.sum(dim=1).max())

    def moved(values: Tensor, padding: int) -> Tensor:
        made = values.new_full((len(real), width), padding)
        made[rows, to] = values.flatten(1)[rows, places]
        return made

    return moved(batch.ids, PAD), moved(real, 0), moved(batch.targets, 0)

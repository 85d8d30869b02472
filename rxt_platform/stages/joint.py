"""Stages 1 and 2: the masked encoder and the decoder trained together (REF 3.1, 3.2).

The encoder guesses masked tokens; the decoder predicts the clean text while it reads the encoder's states, detached,
as its memory. In stage 1 every token of a text is a target, in stage 2 only the answers, `[EOS]` included.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform.config.stage_base import Component
from rxt_platform.config.stages import InteractionSFTConfig, JointLossConfig, JointPretrainingConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.tokenizer import MASK, SPECIAL_TOKENS
from rxt_platform.model.documents import Documents
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.loss import target_loss
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import LossReport, Phase, row_noise, row_uniform, with_metrics


class JointStage:
    """Language-model pre-training (texts) and interaction SFT (single interactions), joint or separate.

    The older separate way trains the masked encoder and the embedding first, then the decoder over that embedding, with
    its memory cross-attention frozen over a random memory near zero (REF 3.0).
    """

    def __init__(self, config: JointPretrainingConfig | InteractionSFTConfig, sampler: BatchSampler) -> None:
        self.config = config
        self.sampler = sampler

    @property
    def mean_over(self) -> Mapping[str, str]:
        """See `Stage`. `loss` and `accuracy` are the decoder's, where it trains."""
        masked = {"masked_loss": "total_hidden", "masked_accuracy": "total_hidden"}
        decoded = {"loss": "total_targets", "accuracy": "total_targets", "balance": "total_texts"}
        if self.config.trains == "encoder":
            return {"loss": "total_hidden", "accuracy": "total_hidden"}
        return decoded if self.config.trains == "decoder" else {**decoded, **masked}

    def phases(self) -> list[Phase]:
        """One phase: everything but the memory attention, which takes no part; or one half of it."""
        encoder: frozenset[Component] = frozenset({"embedding", "encoder", "mlm_head"})
        decoder: frozenset[Component] = frozenset({"decoder", "head"})
        if self.config.trains == "encoder":
            return [Phase("encoder", 0, encoder)]
        if self.config.trains == "decoder":
            return [Phase("decoder", 0, decoder)]
        return [Phase("joint", 0, frozenset({*encoder, *decoder, "memory_cross_attention"}))]

    def loss(self, model: ReactiveTransformer, batch: Batch, phase: Phase) -> LossReport:
        """`encoder_weight * CE(masked tokens) + decoder_weight * (CE(targets) + balance)`, over the global batch."""
        return self._loss(model, batch, self.config.loss.decoder_only)

    def flops(self, model: ForwardFlops, batch: Batch, phase: Phase) -> int:
        """Forward and backward of encoder, decoder and their heads, of what takes part."""
        rows, _, length = batch.ids.shape
        trains, total = self.config.trains, 0
        if trains != "decoder":
            total += model.train_encoder(rows, length) + 3 * model.masked_head(int(batch.hidden.sum()))
        if trains != "encoder":
            total += 3 * model.head(int(batch.targets.sum()))
        slots = model.config.memory.slots
        if trains == "decoder":
            total += model.train_decoder_alone(rows, length, batch.tokens, slots)
        elif trains == "both":
            read = max(slots, length) if self.config.loss.decoder_only else length
            total += 3 * model.decode(rows, length, batch.tokens, read)
        return total

    def evaluate(self, model: ReactiveTransformer, batch: Batch, phase: Phase) -> LossReport:
        """The same, with every decoder on the empty memory: encoder states of a text would tell it what follows."""
        return self._loss(model, batch, 1.0)

    def _loss(self, model: ReactiveTransformer, batch: Batch, decoder_only: float) -> LossReport:
        settings: JointLossConfig = self.config.loss
        documents = None
        if batch.documents is not None:
            documents = Documents.of(batch.documents, batch.most_documents)
        if self.config.trains == "decoder":
            return self._decoder_loss(model, batch, documents, _Read(self._random_memory(model, batch.seeds)))
        ids, mask, hidden = batch.ids[:, 0], batch.mask[:, 0], batch.hidden[:, 0]
        encoded = model.encode(self._masked(ids, hidden, batch, model.config.vocab_size), mask, documents)
        summed, guessed = model.mlm_head(encoded[-1][hidden], ids[hidden])
        masked_loss, masked_accuracy = (value / max(batch.total_hidden, 1) for value in (summed, guessed))
        if self.config.trains == "encoder":
            return with_metrics(masked_loss, loss=masked_loss, accuracy=masked_accuracy)
        read = self._read(model, encoded.detach(), batch, documents, decoder_only)
        decoded = self._decoder_loss(model, batch, documents, read)
        loss = settings.encoder_weight * masked_loss + settings.decoder_weight * decoded.loss
        metrics = {**decoded.metrics, "masked_loss": masked_loss, "masked_accuracy": masked_accuracy}
        report = with_metrics(loss, **metrics)
        report.usage = decoded.usage
        return report

    def _decoder_loss(
        self, model: ReactiveTransformer, batch: Batch, documents: Documents | None, read: "_Read"
    ) -> LossReport:
        """The decoder's part: cross-entropy of the targets and the experts' balance."""
        ids, mask, targets = batch.ids[:, 0], batch.mask[:, 0], batch.targets[:, 0]
        decoded = model.decode_states(
            ids, mask, read.memory, read.readable, documents=documents, frozen_memory=read.frozen
        )
        summed, correct = target_loss(model, decoded.states, ids, targets)
        loss, accuracy = summed / batch.total_targets, correct / batch.total_targets
        balance = decoded.balance.sum() / batch.total_texts
        total = loss + self.config.loss.balance_weight * balance
        return with_metrics(total, loss=loss, accuracy=accuracy, balance=balance).using(decoded.usage)

    def _random_memory(self, model: ReactiveTransformer, seeds: Tensor) -> Tensor:
        """`trains: decoder`: what is read in place of a memory, [L, B, S, D], each row's from its own seed."""
        config, weight = model.config, model.decoder.head.weight
        shape = (config.layers, config.memory.slots, config.hidden_size)
        return self.config.loss.random_memory * row_noise(seeds, shape, 5, weight).transpose(0, 1)

    def _masked(self, ids: Tensor, hidden: Tensor, batch: Batch, vocab_size: int) -> Tensor:
        """What the encoder sees of ids [B, T]: `[MASK]` where `hidden`, or a random token, or the token itself.

        The standard 80/10/10 is `mask_random` = `mask_kept` = 0.1 (arXiv:1810.04805, 3.1).
        """
        settings = self.config.loss
        shown = torch.full_like(ids, MASK)
        if settings.mask_random or settings.mask_kept:
            draws = row_uniform(batch.seeds, (batch.longest, 2), 4, ids.device)[:, : ids.shape[1]]
            kind, ordinary = draws[..., 0], vocab_size - len(SPECIAL_TOKENS)
            other = len(SPECIAL_TOKENS) + (draws[..., 1] * ordinary).long().clamp(max=ordinary - 1)
            shown = torch.where(kind < settings.mask_random, other, shown)
            kept = (kind >= settings.mask_random) & (kind < settings.mask_random + settings.mask_kept)
            shown = torch.where(kept, ids, shown)
        return torch.where(hidden, shown, ids)

    def _read(
        self,
        model: ReactiveTransformer,
        encoded: Tensor,
        batch: Batch,
        documents: Documents | None,
        decoder_only: float,
    ) -> "_Read":
        """What the decoder reads in joint training.

        Encoder states with noise, positions dropped at random; a text of a packed row reads its own states. Rows that
        are decoder-only read the initial memory.
        """
        settings, seeds, mask = self.config.loss, batch.seeds, batch.mask[:, 0]
        layers, _, length, size = encoded.shape
        drawn = batch.longest  # of the global batch, so that a row's draws don't depend on how it is split
        readable, frozen = mask, None
        if settings.memory_noise:
            noise = row_noise(seeds, (layers, drawn, size), 1, encoded).transpose(0, 1)
            encoded = encoded + settings.memory_noise * noise[:, :, :length]
        if settings.memory_dropout:
            kept = row_uniform(seeds, (drawn,), 2, mask.device)[:, :length] >= settings.memory_dropout
            begins = torch.arange(length, device=mask.device) if documents is None else documents.position
            readable = readable & (kept | (begins == 0))  # never an empty memory
        if documents is not None:  # padding reads padding, so that no row is empty
            readable = documents.together & (readable | ~mask)[:, None, :]
        if decoder_only:
            alone = row_uniform(seeds, (1,), 3, mask.device) < decoder_only  # [B, 1]
            empty = encoded.new_zeros(layers, len(seeds), model.config.memory.slots, size)
            empty[:, alone[:, 0]] = model.initial_memory(seeds[alone[:, 0]])
            slots = max(empty.shape[2], length)
            encoded, empty = (F.pad(x, (0, 0, 0, slots - x.shape[2])) for x in (encoded, empty))
            used = torch.arange(slots, device=mask.device) < model.config.memory.slots
            encoded = torch.where(alone[None, :, :, None], empty, encoded)
            frozen = alone[:, 0] if settings.freeze_memory_path else None
            alone = alone if documents is None else alone[:, :, None]
            readable = torch.where(alone, used, F.pad(readable, (0, slots - length)))
        return _Read(encoded, readable, frozen)


@dataclass(frozen=True)
class _Read:
    """What the decoder reads as its memory.

    memory    [L, B, S', D]
    readable  which positions of it, [B, S'], packed [B, T, S']; None: all
    frozen    [B] rows whose reading is not trained
    """

    memory: Tensor
    readable: Tensor | None = None
    frozen: Tensor | None = None

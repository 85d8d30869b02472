"""Heads over the vocabulary, and their loss without ever holding all logits of a large batch."""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_LOGITS_AT_ONCE = 2**26  # above so many, the loss is computed in parts: 256 MiB of fp32


class VocabularyHead(nn.Linear):
    """A linear layer onto the vocabulary. Given labels, it computes the loss itself.

    The loss is a forward of this module, so that ZeRO-3 gathers the weights once, however many parts it takes.
    """

    @overload
    def forward(self, input: Tensor, labels: None = None) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, labels: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, input: Tensor, labels: Tensor | None = None, temperature: float | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V] of states [..., D]; with `labels` [N] for states [N, D], the summed cross-entropy and the
        number of correct predictions. With a `temperature` too, each label's log-probability and the entropy of the
        distribution that it was drawn from, [N] both."""
        if labels is None:
            return super().forward(input)
        if temperature is not None:
            return self._log_probabilities(input, labels, temperature)
        if input.shape[0] * self.out_features <= _LOGITS_AT_ONCE:
            logits = super().forward(input).float()
            return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(dim=-1) == labels).sum()
        rows = max(1, _LOGITS_AT_ONCE // self.out_features)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_dtype=torch.float32)
        loss = F.linear_cross_entropy(
            input, self.weight, labels, linear_bias=self.bias, reduction="sum", options=options
        )
        with torch.no_grad():
            guesses = torch.cat(
                [super(VocabularyHead, self).forward(part).argmax(dim=-1) for part in input.split(rows)]
            )
        return loss.float(), (guesses == labels).sum()

    def _log_probabilities(self, input: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        def of(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            logs = (F.linear(states, self.weight, self.bias).float() / temperature).log_softmax(dim=-1)
            return logs.gather(-1, wanted[:, None])[:, 0], -(logs.exp() * logs).sum(dim=-1)

        rows = max(1, _LOGITS_AT_ONCE // self.out_features)
        if len(labels) <= rows:
            return of(input, labels)
        parts = [
            checkpoint(of, states, wanted, use_reentrant=False)
            for states, wanted in zip(input.split(rows), labels.split(rows), strict=True)
        ]
        return torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])


class MaskedLanguageHead(nn.Module):
    """Predicts masked tokens from the encoder's last states: Linear, GELU, LayerNorm, Linear (REF 1.6)."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.output = VocabularyHead(hidden_size, vocab_size)

    @overload
    def forward(self, states: Tensor, labels: None = None) -> Tensor: ...
    @overload
    def forward(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As `VocabularyHead`."""
        states = self.norm(F.gelu(self.dense(states)))
        return self.output(states) if labels is None else self.output(states, labels)

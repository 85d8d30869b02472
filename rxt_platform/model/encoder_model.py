"""The encoder on its own: a standard bidirectional encoder with a head of choice, from a joint checkpoint or its own.

A value head is what the critic of memory reinforcement learning is made of (REF 4).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from rxt_platform.config.model import HeadConfig, ModelConfig
from rxt_platform.data.tokenizer import BOS, EOS, PAD, RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from rxt_platform.model import files
from rxt_platform.model.encoder import Encoder
from rxt_platform.model.parameters import count
from rxt_platform.model.pretrained import PretrainedModel, checked_ids


class ValueHead(nn.Module):
    """GLU with SiLU, LayerNorm, Linear to 1, sigmoid, a learned scale and shift (REF 4): values from 0 to `scale`."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.input = nn.Linear(hidden_size, 2 * hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.output = nn.Linear(hidden_size, 1)
        self.scale = nn.Parameter(torch.tensor([scale]))  # not of no dimension: DeepSpeed can't send such
        self.shift = nn.Parameter(torch.tensor([0.0]))

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] -> [B, 1]."""
        linear, gate = self.input(pooled).chunk(2, dim=-1)
        return self.output(self.norm(linear * F.silu(gate))).sigmoid() * self.scale + self.shift


class RxTEncoder(PretrainedModel):
    """Embedding, encoder, mean over the real tokens, head.

    Heads: `classification` gives logits [B, outputs], `regression` numbers [B, outputs], `value` one a row [B, 1].
    """

    has_figures = False  # those of a run are of its whole model

    def __init__(self, config: ModelConfig, head: HeadConfig, tokenizer: RxtTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.head_config, self.tokenizer, self.figures = config, head, tokenizer, None
        size = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.encoder = Encoder(config)
        self.head = (
            ValueHead(size, head.scale)
            if head.kind == "value"
            else nn.Sequential(nn.LayerNorm(size), nn.Linear(size, head.outputs))
        )

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self.config.vocab_size

    @property
    def window(self) -> int:
        """Longest input in tokens. Rotary positions allow more than the model was trained on."""
        return self.head_config.max_length or self.config.max_length

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean of the last layer's states over real tokens: [B, T] -> [B, D].

        Raises DataError for a row without a real token and for an input longer than the window.
        """
        if input_ids.dim() == 2 and input_ids.shape[1] > self.window:
            raise DataError(f"an input of {input_ids.shape[1]} tokens; the encoder's window holds {self.window}")
        input_ids, mask = checked_ids(input_ids, attention_mask, self.vocab_size)
        states = self.encoder(self.embedding(input_ids), mask)[-1]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's output for token ids [B, T]; `attention_mask` [B, T] is 1 (or True) at real tokens."""
        return self.head(self.pooled(input_ids, attention_mask))

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`[BOS]text[EOS]` for each text, right-padded: `input_ids` and `attention_mask` [B, T]."""
        tokenizer = self.own_tokenizer()
        rows = [[BOS, *tokenizer.encode(text), EOS] for text in texts]
        longest = max(map(len, rows), default=0)
        if longest > self.window or not rows:
            raise DataError(f"{len(rows)} texts, the longest of {longest} tokens; the window holds {self.window}")
        device = self.embedding.weight.device
        return {
            "input_ids": torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], device=device),
            "attention_mask": torch.tensor([[n < len(row) for n in range(longest)] for row in rows], device=device),
        }

    @classmethod
    def from_directory(
        cls,
        directory: Path,
        tokenizer: RxtTokenizer | None,
        dtype: torch.dtype | None = None,
        head: HeadConfig | Mapping[str, Any] | None = None,
    ) -> "RxTEncoder":
        """An encoder that was saved with its head; or, with a `head`, the encoder of a Reactive Transformer under a new
        head (which starts from random weights)."""
        raw = files.read_config(directory, (*files.REACTIVE, "RxTEncoder"))
        if "head" in raw:
            if head is not None:
                raise ArtifactError(f"{directory}: has a head of its own; leave out `head`")
            with torch.device("meta"):
                model = cls(files.model_config(raw.get("model"), directory), _head(raw["head"], directory))
            files.load_weights(model, directory, dtype)
        elif head is None:
            raise ArtifactError(
                f"{directory}: a model without an encoder head; choose one, such as head={{'kind': 'value'}}"
            )
        else:
            model = cls(files.model_config(raw, directory), _head(head, directory))
            parts = ("embedding.", "encoder.")
            state = {k: v for k, v in files.read_weights(directory).items() if k.startswith(parts)}
            precision = dtype or next(iter(state.values()), model.embedding.weight).dtype
            files.fill(model, {**model.head_state(), **state}, directory, precision)
        model.set_tokenizer(tokenizer or files.load_tokenizer(directory, model.config))
        return model

    def head_state(self) -> dict[str, Tensor]:
        """The head's tensors, by their names in the whole."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith("head.")}

    def settings(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"model": self.config.model_dump(mode="json"), "head": self.head_config.model_dump(mode="json")}

    def weights(self) -> dict[str, Tensor]:
        """All tensors."""
        return dict(self.state_dict())

    def facts(self) -> Mapping[str, str]:
        """Sizes, for the card."""
        return {
            "Parameters": f"{count(self).parameters:,}",
            "Head": f"{self.head_config.kind}, {self.head_config.outputs} output(s)",
            "Window": f"{self.window} tokens",
        }


def _head(raw: HeadConfig | Mapping[str, Any], directory: Path) -> HeadConfig:
    try:
        return raw if isinstance(raw, HeadConfig) else HeadConfig.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{directory}: not an encoder head: {error}") from error

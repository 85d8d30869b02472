"""The stateless baseline: a decoder-only model of matched size that reads the whole history.

It is made of the same decoder layers, without memory cross-attention; there is no encoder and no memory. What those
cost in parameters goes into more layers and wider experts: both arms of a comparison have the same total.
"""

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.model.decoder import Decoder
from rxt_platform.model.documents import Documents
from rxt_platform.model.parameters import count, measure_size
from rxt_platform.model.transformer import Decoded


class StatelessTransformer(nn.Module):
    """A causal language model: embedding, decoder layers, untied head.

    Takes a `ModelConfig` of which it uses the decoder without cross-attention; `max_length` is the window that the
    whole conversation must fit in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config, stateful=False)

    def decode_states(self, ids: Tensor, mask: Tensor | None = None, documents: Documents | None = None) -> Decoded:
        """Hidden states for ids [B, T]; `mask` [B, T] is True at real tokens, None without padding.

        `documents` of packed rows: they don't see each other.
        """
        return Decoded(*self.decoder(self.embedding(ids), mask, documents=documents))

    def decode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, V]."""
        return self.decoder.head(self.decode_states(ids, mask).states)


def matched_baseline(config: ModelConfig, window: int) -> ModelConfig:
    """The baseline of a Reactive Transformer: total parameters as close to its (without MLM head) as can be.

    About as many layers as come closest, then the width of the feed-forward parts, in steps of 8. `window` is the
    longest history in tokens.
    """
    wanted = measure_size(config).total.parameters
    one, two = (count_parameters(_resized(config, window, layers, 1.0)) for layers in (1, 2))
    nearest = 1 + round((wanted - one) / (two - one))
    candidates = []
    for layers in {max(1, nearest - 1), max(1, nearest), nearest + 1}:
        narrow, wide = (count_parameters(_resized(config, window, layers, width)) for width in (1.0, 2.0))
        width = 1.0 + (wanted - narrow) / (wide - narrow)
        if width > 0:
            candidates.append(_resized(config, window, layers, width))
    return min(candidates, key=lambda candidate: abs(count_parameters(candidate) - wanted))


def _resized(config: ModelConfig, window: int, layers: int, width: float) -> ModelConfig:
    """`config` with other numbers of layers and feed-forward widths multiplied by `width`."""
    decoder = config.decoder.model_dump()
    if decoder["experts"] is not None:
        decoder["experts"]["size"] = max(8, round(decoder["experts"]["size"] * width / 8) * 8)
    elif decoder["feed_forward_size"] is not None:
        decoder["feed_forward_size"] = max(8, round(decoder["feed_forward_size"] * width / 8) * 8)
    # Encoder and memory are not part of it: whatever the model's are, the baseline is the same.
    attention = decoder["cross_attention"] = decoder["self_attention"]
    encoder = {"attention": attention, "feed_forward_size": 8}
    memory = {"slots": 1, "attention": attention, "variant": "simple"}
    changes = {"layers": layers, "max_length": window, "decoder": decoder, "encoder": encoder, "memory": memory}
    return ModelConfig.model_validate({**config.model_dump(), **changes})


def count_parameters(config: ModelConfig) -> int:
    """Parameters of a `StatelessTransformer`."""
    with torch.device("meta"):
        return count(StatelessTransformer(config)).parameters

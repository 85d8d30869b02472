"""Models and prompts to measure generation with: random, but such that equal tokens mean something."""

from typing import TypeVar

import torch

from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, QUERY, SPECIAL_TOKENS
from rxt_platform.model.attention import Attention
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.transformer import ReactiveTransformer

Model = TypeVar("Model", ReactiveTransformer, StatelessTransformer)
SHARPNESS = 8.0


def random_model(model: Model) -> Model:
    """`model` in evaluation mode, with answers that never end early and depend on all that was read.

    The bias of [EOS] becomes -1e4. Fresh attention reads a near-even mean of all values, faintly: much of what is
    read could be lost without another next token. Larger queries and values change that.
    """
    with torch.no_grad():
        model.decoder.head.bias[EOS] = -1e4
        for part in model.decoder.modules():
            if isinstance(part, Attention):
                part.query.weight *= SHARPNESS
                part.value.weight *= SHARPNESS
    return model.eval()


def random_queries(lengths: list[int], vocab: int, seed: int) -> list[list[int]]:
    """`[BOS][Q]query[A]` of random ordinary tokens, so many tokens together in each."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(len(SPECIAL_TOKENS), vocab, (length - 3,), generator=generator) for length in lengths]
    return [[BOS, QUERY, *query.tolist(), ANSWER] for query in words]

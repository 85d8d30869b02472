"""How the next token is drawn: one uniform number for each token of each conversation, from the conversation's seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_platform.data.tokenizer import EOS
from rxt_platform.errors import DataError

NOT_FINITE = -1  # in place of a token, where the logits held NaN or infinity
_FIRST = 512  # tokens that are sorted first when drawing from a nucleus


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and when an answer ends.

    temperature 0 takes the most likely token. Otherwise tokens are drawn from the `top_k` likeliest (all if not given),
    of those from the smallest set whose probability reaches `top_p`. Row i of a batch draws with seed + i, unless rows
    are given their own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None  # until the model's window is full, if not given
    top_k: int | None = None
    stop: tuple[int, ...] = (EOS,)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise DataError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p {self.top_p}: must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k {self.top_k}: must be 1 or more")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens {self.max_new_tokens}: must be 1 or more")


GREEDY = SamplingOptions()


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises DataError unless every seed is a whole number in [0, 2**63)."""
    if wrong := [seed for seed in seeds if not isinstance(seed, int) or not 0 <= seed < 2**63]:
        raise DataError(f"seed {wrong[0]}: must be a whole number in [0, 2**63)")


def uniform_draws(seeds: Sequence[int], options: SamplingOptions, window: int) -> Tensor:
    """Uniform numbers [B, window] in [0, 1), one for each token, each row's from its own seed; [B, 1] when greedy."""
    if options.temperature == 0:
        return torch.zeros(len(seeds), 1)
    check_seeds(seeds)
    return torch.stack([torch.rand(window, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def choose(logits: Tensor, options: SamplingOptions, draws: Tensor, look: bool = True) -> Tensor:
    """The next token of each row [B] from logits [B, V] and uniform `draws` [B]; -1 where a logit is not finite.

    Drawn by inverting the cumulative distribution, in the vocabulary's order, of the tokens that may be drawn. Tokens
    as likely as the last that `top_k` or `top_p` keeps are kept too, so that no order of equals matters. `look` lets
    values be read on the host where that saves work; the result is the same.
    """
    broken = ~logits.sum(dim=-1, dtype=torch.float32).isfinite()  # one pass; NaN and infinity survive a sum
    if options.temperature == 0:
        return logits.argmax(dim=-1).masked_fill(broken, NOT_FINITE)
    logits = logits.float()
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / options.temperature).softmax(dim=-1)
    if options.top_k is not None or options.top_p < 1:
        probabilities = probabilities * (probabilities >= _least_kept(probabilities, options, look))
    ends = probabilities.cumsum(dim=-1)
    place = (ends <= draws[:, None] * ends[:, -1:]).sum(dim=-1)
    # Rounding may take a draw next to 1 past the end; the last token with any probability is where the sum is reached.
    place = place.minimum((ends < ends[:, -1:]).sum(dim=-1))
    return place.masked_fill(broken, NOT_FINITE)


def _least_kept(probabilities: Tensor, options: SamplingOptions, look: bool) -> Tensor:
    """Probability [B, 1] of the least likely token that `top_k` and `top_p` keep.

    Sorting a whole vocabulary costs more than a small model's step, so where one may `look`, it is done only if the
    first tokens don't reach `top_p`.
    """
    vocabulary = probabilities.shape[-1]
    likeliest: Tensor | None = None
    if look and options.top_k is None and vocabulary > _FIRST:
        first = probabilities.topk(_FIRST, dim=-1).values
        likeliest = first if bool((first.sum(dim=-1) >= options.top_p).all()) else None
    if likeliest is None:
        likeliest = probabilities.topk(min(options.top_k or vocabulary, vocabulary), dim=-1).values
    mass = 1.0 if options.top_k is None else likeliest.sum(dim=-1, keepdim=True)
    kept = likeliest.cumsum(dim=-1) - likeliest < options.top_p * mass
    return likeliest.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)

"""What counting tokens predicts: unigram and bigram losses on the same targets as a model's (interpolated add-k)."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from rxt_platform.data.batches import Example

_ADD = 0.1
_BIGRAM_SHARE = 0.9  # of the bigram estimate where its context was seen; the rest is the unigram's


def count_baselines(train: Sequence[Example], held_out: Sequence[Example], vocab_size: int) -> dict[str, float]:
    """Mean negative log-likelihood (nats per target token) of `held_out` under counts of `train`'s targets."""
    pairs = Counter(_targets(train))
    singles: Counter[int] = Counter()
    contexts: Counter[int] = Counter()
    for (before, token), count in pairs.items():
        singles[token] += count
        contexts[before] += count
    total = sum(singles.values())
    unigram = bigram = 0.0
    count = 0
    for before, token in _targets(held_out):
        single = (singles[token] + _ADD) / (total + _ADD * vocab_size)
        share = _BIGRAM_SHARE if contexts[before] else 0.0
        pair = pairs[before, token] / contexts[before] if contexts[before] else 0.0
        unigram -= math.log(single)
        bigram -= math.log(share * pair + (1 - share) * single)
        count += 1
    return {"unigram": unigram / count, "bigram": bigram / count, "tokens": count}


def _targets(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    for example in examples:
        for turn, start in zip(example.turns, example.target_starts, strict=True):
            for index in range(start, len(turn)):
                yield turn[index - 1], turn[index]

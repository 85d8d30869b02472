"""What counting tokens predicts: unigram and bigram losses on the same targets as a model's (interpolated add-k)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rxt_platform.data.examples import Example

_ADD = 0.1
_BIGRAM_SHARE = 0.9  # of the bigram estimate where its context was seen; the rest is the unigram's
_MOST_TOKENS = 20_000_000  # of the training rows, taken from their start


def count_baselines(train: Sequence[Example], held_out: Sequence[Example], vocab_size: int) -> dict[str, float]:
    """Mean negative log-likelihood (nats per target token) of `held_out` under counts of `train`'s targets."""
    before, after = _targets(train)
    singles = np.bincount(after, minlength=vocab_size).astype(np.float64)
    contexts = np.bincount(before, minlength=vocab_size).astype(np.float64)
    seen, counts = np.unique(before * vocab_size + after, return_counts=True)
    asked_before, asked = _targets(held_out)
    code = asked_before * vocab_size + asked
    at = np.minimum(np.searchsorted(seen, code), len(seen) - 1)
    pairs = np.where(seen[at] == code, counts[at], 0)
    single = (singles[asked] + _ADD) / (singles.sum() + _ADD * vocab_size)
    context = contexts[asked_before]
    share = np.where(context > 0, _BIGRAM_SHARE, 0.0)
    both = share * pairs / np.maximum(context, 1) + (1 - share) * single
    return {
        "unigram": float(-np.log(single).mean()),
        "bigram": float(-np.log(both).mean()),
        "tokens": len(asked),
    }


def _targets(examples: Sequence[Example]) -> tuple[Any, Any]:
    """Each target token and the one before it, int64 [targets] both."""
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    size = 0
    for example in examples:
        for turn, start in zip(example.turns, example.target_starts, strict=True):
            ids = np.asarray(turn, dtype=np.int64)
            before.append(ids[start - 1 : -1])
            after.append(ids[start:])
            size += len(ids)
        if size >= _MOST_TOKENS:
            break
    return np.concatenate(before), np.concatenate(after)

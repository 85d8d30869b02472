"""Sentence BLEU of many rows at once, on integer ids: n-grams become compact ids, counted where they are sorted."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

_SMOOTHING = 5.0  # Chen and Cherry's K
_LARGEST = 2**31


def sentence_bleu(
    candidates: Sequence[Sequence[int]], references: Sequence[Sequence[int]], weights: Sequence[float] = (0.5, 0.5)
) -> np.ndarray:
    """BLEU of each candidate against its one reference, [rows], float64 in 0..1; rows may differ in length.

    `weights` of the 1-grams, 2-grams, ... BLEU = BP * exp(sum_n w_n log p_n), BP = exp(1 - r/c) for c < r. A p_n of no
    match is smoothed by method 4 of Chen and Cherry (2014), as NLTK's `sentence_bleu` does it; without a common word
    BLEU is 0. Raises ValueError if there are more candidates than references or the other way round.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates, {len(references)} references: give each its one reference")
    texts = [*candidates, *references]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    matches = _matches(np.fromiter(chain.from_iterable(texts), np.int64), lengths, len(weights))
    candidate, reference = np.split(lengths, 2)

    totals = np.maximum(1, candidate[:, None] - np.arange(len(weights)))
    missing = (matches == 0) & (candidate[:, None] > 1)
    smoothed = np.log(np.maximum(candidate, 2))[:, None] / (_SMOOTHING * 2.0 ** missing.cumsum(axis=1))
    precisions = np.where(missing, smoothed, matches) / totals
    logarithms = np.log(precisions, out=np.zeros_like(precisions), where=precisions > 0)
    brevity = np.exp(np.minimum(0.0, 1 - reference / np.maximum(candidate, 1)))
    return np.where(matches[:, 0] > 0, brevity * np.exp(logarithms @ np.asarray(weights, dtype=np.float64)), 0.0)


def _matches(ids: np.ndarray, lengths: np.ndarray, orders: int) -> np.ndarray:
    """Clipped n-gram matches [rows, orders]; `ids` of all candidates, then all references, and their lengths [2 rows].

    A gram's id is its own in its row: candidate and reference share it, other rows don't. So counts take memory for
    the grams that occur, not for rows times vocabulary. A gram that both have has its beginning in both: the others
    are not looked at again.
    """
    rows = len(lengths) // 2
    row = np.repeat(np.tile(np.arange(rows), 2), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(ids))  # ids from here to the end of the text
    said = np.arange(len(ids)) < lengths[:rows].sum()
    if len(ids) and not 0 <= ids.min() <= ids.max() < _LARGEST:  # their products with gram ids must fit 64 bits
        ids = np.unique(ids, return_inverse=True)[1]
    vocabulary = ids.max(initial=0) + 1
    starts, grams = np.arange(len(ids)), row  # all 0-grams of a row are the same
    matches = np.zeros((rows, orders))
    for order in range(orders):
        inside = left[starts] > order
        starts, grams = starts[inside], grams[inside]
        if not len(starts):
            break
        keys = grams * vocabulary + ids[starts + order]
        by_gram = np.argsort(keys)
        keys, starts = keys[by_gram], starts[by_gram]
        first = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
        counts = np.diff(first, append=len(keys))
        in_candidate = np.add.reduceat(said[starts], first, dtype=np.int64)
        clipped = np.minimum(in_candidate, counts - in_candidate)
        matches[:, order] = np.bincount(row[starts[first]], clipped, minlength=rows)
        shared = np.repeat(clipped > 0, counts)
        starts, grams = starts[shared], np.repeat(np.arange(len(first)), counts)[shared]
    return matches

"""Confidence intervals of ratios by bootstrap over conversations, whose questions and tokens are not independent."""

from collections.abc import Iterable, Sequence

import numpy as np

RESAMPLES = 1000
_TAILS = (2.5, 97.5)  # percentiles: a 95 % interval

Interval = list[float] | None
"""[low, high]; None where fewer than two conversations have something to say: nothing is known of their spread."""


class Bootstrap:
    """Percentile bootstrap (Efron, 1979): `RESAMPLES` times, as many conversations are drawn with replacement.

    The draws depend on the seed and the number of conversations alone: they are the same for all measures.
    """

    def __init__(self, conversations: int, seed: int) -> None:
        self.conversations = conversations
        share = np.full(conversations, 1 / conversations)
        generator = np.random.default_rng(seed)
        self._drawn = generator.multinomial(conversations, share, size=RESAMPLES).astype(np.float64)

    def totals(self, rows: Iterable[tuple[int, Sequence[float]]], columns: int) -> np.ndarray:
        """[conversations, columns]: the sums of rows that are given with their conversation's number."""
        sums = np.zeros((self.conversations, columns))
        for conversation, values in rows:
            sums[conversation] += values
        return sums

    def intervals(self, numerators: np.ndarray, denominators: np.ndarray) -> list[Interval]:
        """The 95 % intervals of sum(numerators) / sum(denominators), one for each column of `numerators`.

        Each conversation's own sums: `numerators` [conversations, k], `denominators` [conversations]. A resample
        without anything to divide by is left out.
        """
        if np.count_nonzero(denominators) < 2:
            return [None] * numerators.shape[1]
        below = self._drawn @ denominators
        ratios = (self._drawn @ numerators)[below > 0] / below[below > 0, None]
        return [[float(low), float(high)] for low, high in np.percentile(ratios, _TAILS, axis=0).T]

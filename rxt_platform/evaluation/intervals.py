"""Confidence intervals over conversations, whose questions and tokens are not independent of one another.

Means get a bootstrap interval. It collapses to a point where every answer is right, so shares get Wilson's instead,
with as many opinions as the conversations are worth.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

RESAMPLES = 1000
FEWEST = 10
"""Conversations below which nothing is said of the spread."""

_TAILS = (2.5, 97.5)  # percentiles: a 95 % interval
_Z = 1.959964  # the normal distribution's 97.5th percentile

Interval = list[float] | None
"""[low, high], 95 %; None where fewer than `FEWEST` conversations have something to say."""


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

    def interval(self, numerators: np.ndarray, denominators: np.ndarray) -> Interval:
        """The 95 % interval of sum(numerators) / sum(denominators): each conversation's own sums, [conversations].

        A resample without anything to divide by is left out.
        """
        if np.count_nonzero(denominators) < FEWEST:
            return None
        below = self._drawn @ denominators
        ratios = (self._drawn @ numerators)[below > 0] / below[below > 0]
        low, high = np.percentile(ratios, _TAILS).tolist()
        return [low, high]


def share_interval(right: np.ndarray, asked: np.ndarray) -> Interval:
    """The 95 % interval of the share sum(right) / sum(asked): each conversation's own sums, [conversations].

    Wilson's (1927), with the number of questions divided by the design effect: how much more the share varies between
    conversations than it would if all questions were independent (Dean and Pagano, 2015). Where all are right, or none,
    a conversation counts as one.
    """
    if np.count_nonzero(asked) < FEWEST:
        return None
    share = float(right.sum() / asked.sum())
    variance = float(_covariance(right, right, asked))
    count = share * (1 - share) / variance if variance > 0 and 0 < share < 1 else float(np.count_nonzero(asked))
    count = min(count, float(asked.sum()))
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def gain_interval(right: np.ndarray, reset: np.ndarray, asked: np.ndarray) -> Interval:
    """The 95 % interval of the difference of two shares of the same questions (Newcombe, 1998, method 10).

    It is put together from the two shares' intervals and their correlation over conversations.
    """
    one, other = share_interval(right, asked), share_interval(reset, asked)
    if one is None or other is None:
        return None
    shares = [float(hits.sum() / asked.sum()) for hits in (right, reset)]
    spread = math.sqrt(_covariance(right, right, asked) * _covariance(reset, reset, asked))
    alike = float(np.clip(_covariance(right, reset, asked) / spread, -1, 1)) if spread > 0 else 0.0
    gain = shares[0] - shares[1]
    below = _apart(shares[0] - one[0], other[1] - shares[1], alike)
    above = _apart(one[1] - shares[0], shares[1] - other[0], alike)
    return [max(-1.0, gain - below), min(1.0, gain + above)]


def _apart(one: float, other: float, alike: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * alike * one * other + other**2))


def _covariance(one: np.ndarray, other: np.ndarray, asked: np.ndarray) -> float:
    """Of two shares of the same questions, between conversations: a ratio estimator's (Cochran, 1977)."""
    whole, groups = asked.sum(), np.count_nonzero(asked)
    residuals = [hits - hits.sum() / whole * asked for hits in (one, other)]
    return float((residuals[0] * residuals[1]).sum() / whole**2 * groups / (groups - 1))

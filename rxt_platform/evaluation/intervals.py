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

        A resample without anything to divide by is left out. What few conversations vary too little for is made up
        for: both ends are moved away from the mean (Student's t for the normal, n - 1 for n).
        """
        groups = int(np.count_nonzero(denominators))
        if groups < FEWEST:
            return None
        below = self._drawn @ denominators
        ratios = (self._drawn @ numerators)[below > 0] / below[below > 0]
        low, high = np.percentile(ratios, _TAILS).tolist()
        mean, wider = float(numerators.sum() / denominators.sum()), _student(groups - 1) / _Z
        wider *= math.sqrt(groups / (groups - 1))
        return [mean + wider * (low - mean), mean + wider * (high - mean)]


def share_interval(right: np.ndarray, asked: np.ndarray) -> Interval:
    """The 95 % interval of the share sum(right) / sum(asked): each conversation's own sums, [conversations].

    Wilson's (1927), with as many independent questions as the conversations are worth: the share varies more between
    them than that of independent questions would (the design effect, Dean and Pagano, 2015), and few of them tell
    little of how much (Student's t).
    """
    groups = int(np.count_nonzero(asked))
    if groups < FEWEST:
        return None
    share = float(right.sum() / asked.sum())
    count = _effective(right, asked) * (_Z / _student(groups - 1)) ** 2
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half_width = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return [max(0.0, min(middle - half_width, share)), min(1.0, max(middle + half_width, share))]


def gain_interval(right: np.ndarray, reset: np.ndarray, asked: np.ndarray) -> Interval:
    """The 95 % interval of the difference of two shares of the same questions (Newcombe, 1998, method 10).

    It is put together from the two shares' intervals and their correlation over conversations, if positive less the
    continuity correction.
    """
    one, other = share_interval(right, asked), share_interval(reset, asked)
    if one is None or other is None:
        return None
    shares = [float(hits.sum() / asked.sum()) for hits in (right, reset)]
    spread = math.sqrt(math.prod(share * (1 - share) for share in shares))
    deviations = math.sqrt(_covariance(right, right, asked) * _covariance(reset, reset, asked))
    correlation = 0.0
    if spread > 0 and deviations > 0:
        correlation = float(np.clip(_covariance(right, reset, asked) / deviations, -1, 1))
        if correlation > 0:
            correlation = max(0.0, correlation - 1 / (2 * np.count_nonzero(asked) * spread))
    gain = shares[0] - shares[1]
    below = _distance(shares[0] - one[0], other[1] - shares[1], correlation)
    above = _distance(one[1] - shares[0], shares[1] - other[0], correlation)
    return [max(-1.0, gain - below), min(1.0, gain + above)]


def _effective(right: np.ndarray, asked: np.ndarray) -> float:
    """Independent questions with the same variance of their share; at most those that were asked.

    Two conversations more are assumed, one all right and one all wrong: where all answers are right, nothing is known
    of how alike those of one conversation are.
    """
    each = float(asked.sum()) / np.count_nonzero(asked)
    right, asked = np.append(right, (each, 0.0)), np.append(asked, (each, each))
    share = float(right.sum() / asked.sum())
    return min(share * (1 - share) / _covariance(right, right, asked), float(asked.sum() - 2 * each))


def _distance(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))


def _covariance(one: np.ndarray, other: np.ndarray, asked: np.ndarray) -> float:
    """Of two shares of the same questions, between conversations: a ratio estimator's (Cochran, 1977)."""
    whole, groups = asked.sum(), np.count_nonzero(asked)
    residuals = [hits - hits.sum() / whole * asked for hits in (one, other)]
    return float((residuals[0] * residuals[1]).sum() / whole**2 * groups / (groups - 1))


def _student(freedom: int) -> float:
    """The 97.5th percentile of Student's t, from 9 degrees of freedom on within 0.004 (Cornish and Fisher, 1938)."""
    cubic, fifth = _Z**3, _Z**5
    return _Z + (cubic + _Z) / (4 * freedom) + (5 * fifth + 16 * cubic + 3 * _Z) / (96 * freedom**2)

"""Promises of the confidence intervals."""

import numpy as np
import pytest

from rxt_platform.evaluation.intervals import Bootstrap


def of(values: np.ndarray, counts: np.ndarray | None = None, seed: int = 0) -> list[float] | None:
    counts = np.ones(len(values)) if counts is None else counts
    (interval,) = Bootstrap(len(values), seed).intervals(values[:, None].astype(float), counts.astype(float))
    return interval


def test_the_interval_of_a_constant_is_that_constant() -> None:
    assert of(np.full(7, 0.25)) == pytest.approx([0.25, 0.25], abs=1e-12)
    assert of(np.array([3.0, 6.0, 9.0]), np.array([1, 2, 3])) == pytest.approx([3.0, 3.0], abs=1e-12)


def test_the_interval_holds_the_true_share_about_19_times_of_20() -> None:
    generator = np.random.default_rng(5)
    trials, hits = 400, 0
    for trial in range(trials):
        low, high = of(generator.random(60) < 0.4, seed=trial) or (1.0, 0.0)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / trials <= 0.98


def test_the_interval_is_as_wide_as_the_normal_approximation_says() -> None:
    right = np.arange(400) % 4 == 0
    low, high = of(right) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.25, abs=0.01)


def test_questions_of_one_conversation_count_as_one_opinion() -> None:
    """Ten questions that are all right or all wrong tell no more than one; ten independent ones do."""
    right = np.arange(40) % 2
    one, ten = of(right), of(10 * right, np.full(40, 10))
    assert one == pytest.approx(ten)
    low, high = of(np.arange(400) % 2) or (0.0, 0.0)
    assert one is not None
    assert high - low < 0.5 * (one[1] - one[0])


def test_conversations_weigh_what_they_hold() -> None:
    low, high = of(np.array([1.0] * 20 + [0.0] * 20), np.array([9] * 20 + [1] * 20)) or (0.0, 0.0)
    assert low < 20 / 200 < high
    assert high < 0.2


@pytest.mark.parametrize("counts", [[5, 0, 0, 0], [0, 0, 0, 0]])
def test_one_conversation_says_nothing_of_the_spread(counts: list[int]) -> None:
    assert of(np.array(counts), np.array(counts)) is None


def test_a_rare_question_has_an_interval_of_the_resamples_that_hold_it() -> None:
    counts = np.array([1, 1, *[0] * 98])
    assert of(np.array([1, 0, *[0] * 98]), counts) == [0.0, 1.0]


def test_the_seed_decides() -> None:
    values = np.arange(30) % 3
    assert of(values, seed=1) == of(values, seed=1) != of(values, seed=2)


def test_totals_are_summed_by_conversation() -> None:
    totals = Bootstrap(3, 0).totals([(0, (1, 2)), (2, (5, 6)), (0, (10, 20))], 2)
    assert totals.tolist() == [[11, 22], [0, 0], [5, 6]]

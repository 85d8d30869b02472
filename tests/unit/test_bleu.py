"""Promises of BLEU: it is NLTK's with smoothing method 4 to 1e-12, and a row's score does not depend on its batch."""

import math
import random

import numpy as np
import pytest
from nltk.translate import bleu_score

from rxt_platform.rl.bleu import sentence_bleu

WEIGHTS = [(1.0,), (0.5, 0.5), (0.3, 0.0, 0.7), (0.25, 0.25, 0.25, 0.25), (0.2, 0.2, 0.3, 0.3)]
Rows = list[list[int]]


def nltk_bleu(candidates: Rows, references: Rows, weights: tuple[float, ...]) -> np.ndarray:
    smoothing = bleu_score.SmoothingFunction().method4
    return np.array(
        [
            float(bleu_score.sentence_bleu([reference], candidate, weights=weights, smoothing_function=smoothing))
            for candidate, reference in zip(candidates, references, strict=True)
        ]
    )


def random_rows(count: int, longest: int, words: int, seed: int) -> tuple[Rows, Rows]:
    """Candidates and references of 0 to `longest` ids; half of the candidates are changed references."""
    rng = random.Random(seed)

    def text() -> list[int]:
        return [rng.randrange(words) for _ in range(rng.randint(0, longest))]

    references = [text() for _ in range(count)]
    changed = [[word if rng.random() < 0.7 else rng.randrange(words) for word in row] for row in references]
    return [row[: rng.randint(0, longest)] if rng.random() < 0.5 else text() for row in changed], references


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("count", "longest", "words"), [(1000, 6, 3), (1000, 12, 8), (1000, 40, 30), (60, 400, 15)])
def test_random_rows_score_as_in_nltk(weights: tuple[float, ...], count: int, longest: int, words: int) -> None:
    candidates, references = random_rows(count, longest, words, seed=longest)
    assert {0, 1} <= {len(row) for row in candidates} or longest > 100
    expected = nltk_bleu(candidates, references, weights)
    assert len(set(expected)) > 30
    np.testing.assert_allclose(sentence_bleu(candidates, references, weights), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        pytest.param([], [1, 2, 3], id="empty candidate"),
        pytest.param([1, 2, 3], [], id="empty reference"),
        pytest.param([], [], id="both empty"),
        pytest.param([1], [1], id="one word, right"),
        pytest.param([1], [2], id="one word, wrong"),
        pytest.param([1, 2], [1, 2], id="shorter than the longest gram"),
        pytest.param([1, 2], [2, 1], id="right words, wrong order"),
        pytest.param([4, 5, 6, 7], [1, 2, 3], id="no overlap"),
        pytest.param([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], id="identical"),
        pytest.param([1, 1, 1, 1, 1, 1, 1], [1, 2, 1, 3], id="a word repeated too often"),
        pytest.param([1, 2, 1, 2, 1, 2], [1, 2, 1, 2], id="grams repeated"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], [1, 2, 3], id="longer than the reference"),
        pytest.param([1, 2, 3], [1, 2, 3, 4, 5, 6, 7], id="shorter than the reference"),
        pytest.param([1, 9, 2, 8, 3, 7], [1, 2, 3], id="single words in common only"),
    ],
)
def test_edge_cases_score_as_in_nltk(weights: tuple[float, ...], candidate: list[int], reference: list[int]) -> None:
    score = sentence_bleu([candidate], [reference], weights)
    assert score == pytest.approx(nltk_bleu([candidate], [reference], weights), abs=1e-12)


def test_a_score_is_what_the_formula_gives_by_hand() -> None:
    """Clipped 1-grams 3 of 4, 2-grams 1 of 3, two words short of the reference; then 2-grams smoothed."""
    short, unordered = sentence_bleu([[1, 2, 3, 3], [2, 1]], [[1, 2, 9, 3, 9, 9], [1, 2]])
    assert short == pytest.approx(math.exp(1 - 6 / 4) * math.sqrt(3 / 4 * 1 / 3))
    assert unordered == pytest.approx(math.sqrt(1 * math.log(2) / (2 * 5)))


def test_a_rows_score_does_not_depend_on_its_batch() -> None:
    candidates, references = random_rows(60, 12, 6, seed=1)
    together = sentence_bleu(candidates, references)
    alone = [sentence_bleu([c], [r])[0] for c, r in zip(candidates, references, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-15)
    assert sentence_bleu(candidates[::-1], references[::-1])[::-1].tolist() == together.tolist()


@pytest.mark.parametrize(("first", "step"), [(2**62, -7), (-3, 1), (2**31 - 2, 1), (5, 2**40)])
def test_only_which_ids_are_equal_counts(first: int, step: int) -> None:
    candidates, references = random_rows(60, 12, 6, seed=2)
    others: tuple[Rows, Rows] = tuple(
        [[first + step * i for i in row] for row in rows] for rows in (candidates, references)
    )
    assert sentence_bleu(*others).tolist() == sentence_bleu(candidates, references).tolist()


def test_no_rows_have_no_scores() -> None:
    assert sentence_bleu([], []).shape == (0,)


def test_every_candidate_needs_its_reference() -> None:
    with pytest.raises(ValueError, match="2 candidates, 1 references"):
        sentence_bleu([[1], [2]], [[1]])

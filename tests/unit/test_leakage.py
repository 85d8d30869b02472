"""Promises of the leakage check: a held-out row said again is found, exactly or nearly, and no other row is."""

import random
from collections import Counter
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import pytest

from rxt_platform.data import leakage
from rxt_platform.data.leakage import Duplicate, HeldOutIndex


def index(*held_out: str, shingle: int = 8, threshold: float = 0.8, shortest: int = 16) -> HeldOutIndex:
    built = HeldOutIndex(shingle, threshold, shortest)
    built.add(held_out)
    return built


def numbered(start: int, stop: int) -> str:
    """A text in which every word is another one."""
    return " ".join(f"w{i}" for i in range(start, stop))


def random_rows(rng: random.Random, held_out: int, training: int) -> tuple[list[str], list[str]]:
    """Rows made from the same few phrases; some training rows are held-out rows in capitals."""
    phrases = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(12)]
    rows = [". ".join(rng.choices(phrases, k=rng.randint(0, 6))) for _ in range(held_out + training)]
    return rows[:held_out], rows[held_out:] + [row.upper() for row in rng.sample(rows[:held_out], held_out // 4)]


def expected(held_out: list[str], text: str, shingle: int, threshold: float, shortest: int) -> Duplicate | None:
    """The definition, with Python's sets and one held-out row at a time."""

    def words(row: str) -> list[str]:
        return row.lower().replace(".", " ").split()

    def shingles(row: str) -> set[tuple[str, ...]]:
        return {tuple(words(row)[i : i + shingle]) for i in range(len(words(row)) - shingle + 1)}

    best = None
    for row, other in enumerate(held_out):
        if words(text) and words(text) == words(other):
            return Duplicate(row, exact=True, overlap=1.0)
        a, b = shingles(text), shingles(other)
        shorter = min(len(a), len(b))
        if shorter < shortest or len(a & b) / shorter < threshold:
            continue
        if best is None or len(a & b) / shorter > best.overlap:
            best = Duplicate(row, exact=False, overlap=len(a & b) / shorter)
    return best


# ---- exact


@pytest.mark.parametrize(
    "text",
    [
        "Zoë's cat\u2014a tabby\u2014ran off.",
        "ZOË'S CAT A TABBY RAN OFF",
        "  zoë’s\tcat:\r\n “a tabby”  ran   off!!! ",
        "Zoe\u0308's cat a tabby ran off",
        "\ufeffZoë's cat, a tab\u00adby, ran off 🐈",
        "zoë s cat _a_ tabby ran off \ud800",
    ],
)
def test_case_punctuation_spacing_and_unicode_form_hide_no_exact_duplicate(text: str) -> None:
    held_out = index("Something else.", "Zoë's cat, a tabby, ran off.")
    assert held_out.find([text]) == [Duplicate(row=1, exact=True, overlap=1.0)]


@pytest.mark.parametrize(
    ("held_out", "text"),
    [
        ("Lily has a red hat.", "Lily has a blue hat."),
        ("Lily has a red hat.", "A red hat has Lily."),
        ("Lily has a red hat.", "Lily has a redhat."),
        ("He is 7.", "He is 8."),
        ("Zoë ran.", "Zoe ran."),
        ("\u0915\u093f", "\u0915\u0940"),  # Hindi ki and kii: the vowel is a mark, not a letter
    ],
)
def test_rows_with_other_words_are_no_exact_duplicates(held_out: str, text: str) -> None:
    assert index(held_out).find([text]) == [None]


def test_a_row_without_words_duplicates_nothing() -> None:
    assert index("", "?!", "🙂").find(["", "?!", " \n", "🙂"]) == [None] * 4


# ---- near


def test_answers_are_those_of_the_definition() -> None:
    kinds: Counter[bool | None] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        held_out, rows = random_rows(rng, 12, 30)
        settings: dict[str, Any] = {"shingle": rng.randint(1, 4), "threshold": rng.choice([0.2, 0.5, 0.8, 1.0])}
        settings["shortest"] = rng.randint(1, 6)
        found = index(*held_out, **settings).find(rows)
        assert found == [expected(held_out, row, **settings) for row in rows], f"seed {seed}, {settings}"
        kinds.update(match.exact if match else None for match in found)
    assert min(kinds[None], kinds[True], kinds[False]) > 100, kinds


def test_a_row_with_a_few_words_changed_is_a_near_duplicate() -> None:
    row = numbered(0, 100)
    changed = row.replace("w50", "another")
    assert index(row).find([changed]) == [Duplicate(row=0, exact=False, overlap=85 / 93)]
    assert index(row, threshold=0.92).find([changed]) == [None]  # 85/93 is 0.914


@pytest.mark.parametrize("quoted_in_training", [True, False])
def test_a_row_quoted_in_a_longer_one_is_a_near_duplicate(quoted_in_training: bool) -> None:
    quote, longer = numbered(100, 130), numbered(0, 400)
    held_out, text = (quote, longer) if quoted_in_training else (longer, quote)
    assert index(held_out).find([text]) == [Duplicate(row=0, exact=False, overlap=1.0)]


def test_rows_of_few_shingles_are_compared_exactly_only() -> None:
    short, long_enough, longer = numbered(0, 22), numbered(0, 23), numbered(0, 60)  # 15, 16 and 53 shingles of 8
    assert index(short).find([longer, short]) == [None, Duplicate(row=0, exact=True, overlap=1.0)]
    assert index(longer).find([short]) == [None]
    assert index(long_enough).find([longer]) == [Duplicate(row=0, exact=False, overlap=1.0)]
    assert index(longer).find([long_enough]) == [Duplicate(row=0, exact=False, overlap=1.0)]
    repeated = " ".join([numbered(0, 8)] * 9)  # 65 shingles, 8 distinct
    assert index(repeated).find([f"{repeated} w0"]) == [None]


def test_no_shingle_runs_from_one_row_into_the_next() -> None:
    row = numbered(0, 40)
    assert index(row, shortest=1).find(row.split()) == [None] * 40
    assert index(*row.split(), shortest=1).find([row]) == [None]


def test_the_best_match_is_named() -> None:
    rows = [numbered(0, 96) + " x y z q", numbered(0, 98) + " x y", numbered(0, 98) + " p q", numbered(0, 100)]
    assert index(*rows[:3]).find([rows[3]]) == [Duplicate(row=1, exact=False, overlap=91 / 93)]
    quoted_too = index(numbered(0, 200), rows[3], rows[3])
    assert quoted_too.find([rows[3]]) == [Duplicate(row=1, exact=True, overlap=1.0)]


def test_near_duplicates_are_found_in_text_without_spaces() -> None:
    row = "从前有一个小女孩名叫莉莉她住在森林旁边的一座小房子里每天早上她都会去花园里浇花"
    (found,) = index(row).find([row.replace("莉莉", "安娜") + "然后回家"])
    assert found is None
    (found,) = index(row).find([row + "然后回家"])
    assert found == Duplicate(row=0, exact=False, overlap=1.0)


# ---- batches


def test_how_rows_are_split_into_batches_changes_nothing() -> None:
    rng = random.Random(0)
    held_out, rows = random_rows(rng, 20, 60)
    at_once = index(*held_out, shingle=3, shortest=4)
    one_by_one = index(shingle=3, shortest=4)
    for row in held_out:
        one_by_one.add([row])
        one_by_one.find(rows[:1])  # a question in between changes nothing either
    found = at_once.find(rows)
    assert {match.exact for match in found if match} == {True, False}
    assert [one_by_one.find([row])[0] for row in rows] == found


def test_nothing_is_found_without_held_out_rows_and_nothing_in_an_empty_batch() -> None:
    assert HeldOutIndex().find([numbered(0, 100), ""]) == [None, None]
    assert index(numbered(0, 100)).find([]) == []


def test_word_hashes_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    held_out, rows = random_rows(rng, 20, 60)
    found = index(*held_out, shingle=3, shortest=4).find(rows)
    monkeypatch.setattr(leakage, "_CACHED_WORDS", 3)
    small = index(*held_out, shingle=3, shortest=4)
    assert small.find(rows) == found
    assert len(small._hashes) <= 3


def test_fingerprints_are_the_same_on_every_machine() -> None:
    words = ["lily", "zoë", "7"]
    hashes = [int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little") for word in words]
    factor, modulus = 0x9E3779B97F4A7C15, 2**64
    shingles, rows = HeldOutIndex(shingle=2)._shingles([[], words])
    assert shingles.tolist() == [(a * factor + b) % modulus for a, b in pairwise(hashes)]
    assert rows.tolist() == [1, 1]
    assert hashes[0] == 0x0EE5B4770B329D36


@pytest.mark.parametrize(
    "settings", [{"shingle": 0}, {"shortest": 0}, {"threshold": 0.0}, {"threshold": 1.1}, {"threshold": float("nan")}]
)
def test_settings_that_match_every_row_or_none_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        HeldOutIndex(**settings)

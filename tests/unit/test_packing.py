"""Promises of packing: each document once, no row too long, as full as best-fit decreasing, in fair order."""

import re
from collections.abc import Sequence

import numpy as np
import pytest

from rxt_platform.data.packing import Packs, pack


def loads(packs: Packs, lengths: np.ndarray) -> list[int]:
    """Tokens in each pack."""
    return [int(lengths[packs.documents(i)].sum()) for i in range(len(packs))]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[int]:
    """Tokens in each pack, one document after the other, as in the textbook."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return [capacity - room for room in rooms]


def story_lengths(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(200, 80, count).round().clip(20, 256).astype(np.int64)


def random_case(seed: int) -> tuple[np.ndarray, int]:
    """Up to 120 lengths: even, mostly short, or of few kinds; and a capacity of 1 to 300."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 301))
    count = int(rng.integers(1, 121))
    even = rng.integers(1, capacity + 1, count)
    short = 1 + rng.geometric(0.1, count) % capacity
    few = rng.choice(rng.integers(1, capacity + 1, 4), count)
    return (even, short, few)[seed % 3], capacity


@pytest.mark.parametrize("group", range(4))
def test_packs_are_as_full_as_by_sequential_best_fit_decreasing(group: int) -> None:
    for seed in range(100 * group, 100 * group + 100):
        lengths, capacity = random_case(seed)
        packs = pack(lengths, capacity, seed)
        assert sorted(loads(packs, lengths)) == sorted(best_fit_decreasing(lengths.tolist(), capacity)), f"seed {seed}"


def test_every_document_is_in_exactly_one_pack_and_no_pack_is_over_capacity() -> None:
    for seed in range(100):
        lengths, capacity = random_case(seed)
        packs = pack(lengths, capacity, seed)
        assert sorted(packs.order.tolist()) == list(range(len(lengths)))
        assert packs.starts[0] == 0
        assert packs.starts[-1] == len(lengths)
        assert np.all(np.diff(packs.starts) > 0)
        assert max(loads(packs, lengths)) <= capacity


def test_packs_are_nearly_full_when_a_row_holds_four_documents_or_more() -> None:
    lengths = story_lengths(20_000)
    for capacity in (1024, 2048, 8192):
        assert lengths.sum() / (len(pack(lengths, capacity, 0)) * capacity) > 0.99


def test_packs_are_a_function_of_lengths_capacity_and_seed() -> None:
    lengths = story_lengths(2000)
    first, again, other = pack(lengths, 512, 7), pack(lengths.astype(np.uint16), 512, 7), pack(lengths, 512, 8)
    assert first.order.dtype == first.starts.dtype == again.order.dtype == np.int64
    assert np.array_equal(first.order, again.order)
    assert np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.order, other.order)
    assert sorted(loads(first, lengths)) == sorted(loads(other, lengths))  # a seed never costs fullness


def test_documents_of_one_length_meet_at_random() -> None:
    packs = pack(np.full(2000, 100), 200, 0)
    pairs = packs.order.reshape(1000, 2)
    mixed = np.mean((pairs[:, 0] < 1000) != (pairs[:, 1] < 1000))  # first half of the documents with second half
    assert 0.4 < mixed < 0.6


def test_the_first_packs_are_a_fair_sample() -> None:
    lengths = story_lengths(20_000)
    packs = pack(lengths, 512, 0)
    first = packs.order[: packs.starts[len(packs) // 10]]
    assert lengths[first].mean() == pytest.approx(lengths.mean(), rel=0.03)
    assert lengths[first].std() == pytest.approx(lengths.std(), rel=0.05)


def test_documents_within_a_pack_are_in_random_order() -> None:
    lengths = story_lengths(20_000)
    packs = pack(lengths, 512, 0)
    longest_first = [np.all(np.diff(lengths[packs.documents(i)]) <= 0) for i in range(len(packs))]
    assert np.mean(longest_first) < 0.7


@pytest.mark.parametrize("bad", [257, 0, -3])
def test_a_document_that_no_pack_can_hold_is_named(bad: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"document 2 has {bad} tokens, and a pack holds 1 to 256")):
        pack(np.array([256, 1, bad, 5, 300]), 256, 0)


@pytest.mark.parametrize("lengths", [np.array([1.0, 2.5]), np.array([[1, 2], [3, 4]])])
def test_lengths_that_are_no_row_of_integers_are_refused(lengths: np.ndarray) -> None:
    with pytest.raises(ValueError, match="integers"):
        pack(lengths, 256, 0)


def test_no_documents_give_no_packs() -> None:
    packs = pack(np.array([], dtype=np.int64), 256, 0)
    assert len(packs) == 0
    assert packs.starts.tolist() == [0]
    assert packs.order.tolist() == []


def test_a_pack_that_does_not_exist_is_an_error() -> None:
    packs = pack(np.array([200, 200]), 256, 0)
    for number in (-1, 2):
        with pytest.raises(IndexError, match=f"pack {number} of 2"):
            packs.documents(number)

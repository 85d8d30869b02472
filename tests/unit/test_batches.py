"""Promises of batches: only answers are targets, a batch is a function of (seed, step), workers share it exactly."""

import random
import threading
import time
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, collate, derive_seed
from rxt_platform.data.examples import Example, ExampleSet, evenly, windows
from rxt_platform.data.prefetch import prefetched
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD
from rxt_platform.errors import DataError
from tests.unit.helpers import FIRST_WORD, batch_of, conversation, rows_of, sampler_of, word_tokenizer

# ---- what is a target


def target_ids(batch: Batch) -> list[list[int]]:
    """The target tokens of every turn that has any."""
    pairs = zip(batch.ids.flatten(0, 1), batch.targets.flatten(0, 1), strict=True)
    return [ids[targets].tolist() for ids, targets in pairs if targets.any()]


def test_targets_of_a_conversation_are_answers_and_eos_only() -> None:
    examples = [conversation((2, 3), (4, 1), seed=1), conversation((5, 2), seed=2)]
    batch = batch_of(examples)
    assert batch.ids.shape == (2, 2, 11)
    turns = [ids for example in examples for ids in example.turns]
    assert target_ids(batch) == [list(ids[ids.index(ANSWER) + 1 :]) for ids in turns]
    assert [ids[-1] for ids in target_ids(batch)] == [EOS] * 3
    assert batch.total_targets == 4 + 2 + 3
    assert not (batch.targets & ~batch.mask).any()
    assert (batch.ids[batch.targets] != PAD).all()


def test_targets_of_a_text_are_all_its_real_tokens_but_the_first() -> None:
    tokenizer = word_tokenizer()
    (short,), (long,) = (windows(tokenizer.encode(text), 64) for text in ("Tom.", "Tom has a red hat."))
    batch = batch_of([short, long])
    assert target_ids(batch) == [list(example.turns[0][1:]) for example in (short, long)]
    assert [example.turns[0][0] for example in (short, long)] == [BOS, BOS]
    assert [example.turns[0][-1] for example in (short, long)] == [EOS, EOS]


def test_a_long_text_is_cut_into_windows_that_hold_all_of_it() -> None:
    tokenizer = word_tokenizer()
    text = "Tom has a red hat. Lily likes cake. " * 5
    cut = [example.turns[0] for example in windows(tokenizer.encode(text), 16)]
    assert [BOS, *(token for window in cut for token in window[1:])] == [BOS, *tokenizer.encode(text), EOS]
    assert all(after[0] == before[-1] for before, after in pairwise(cut))
    assert max(map(len, cut)) == 16


def test_mask_and_turns_are_true_exactly_where_there_is_something() -> None:
    examples = [conversation((2, 3), (4, 1), (1, 1), seed=1), conversation((5, 2), seed=2)]
    batch = batch_of(examples)
    assert batch.turns.tolist() == [[True, True, True], [True, False, False]]
    for b, example in enumerate(examples):
        for n, ids in enumerate(example.turns):
            assert batch.ids[b, n][batch.mask[b, n]].tolist() == list(ids)
    absent = batch.mask[1, 1:]
    assert absent.sum(dim=-1).tolist() == [1, 1], "one readable position, so that no attention row is empty"
    assert batch.tokens == sum(len(ids) for example in examples for ids in example.turns)
    assert (batch.total_rows, batch.total_turns) == (2, 4)


# ---- hidden tokens of the masked encoder


def test_hidden_tokens_are_ordinary_real_ones_at_about_the_given_rate() -> None:
    examples = [conversation((6, 10), (3, 4), seed=i) if i % 2 else conversation((12, 8), seed=i) for i in range(60)]
    batch = batch_of(examples, mask_probability=0.3)
    ordinary = batch.mask & batch.turns[:, :, None] & (batch.ids >= FIRST_WORD)
    assert not (batch.hidden & ~ordinary).any()
    assert float(batch.hidden.sum() / ordinary.sum()) == pytest.approx(0.3, abs=0.03)
    assert batch.total_hidden == int(batch.hidden.sum())
    queries = ordinary & ~batch.targets
    assert float(batch.hidden[queries].float().mean()) == pytest.approx(0.3, abs=0.05), "queries are hidden too"


def test_no_token_is_hidden_unless_asked_for_and_all_ordinary_ones_at_probability_one() -> None:
    examples = [conversation((6, 10), seed=i) for i in range(3)]
    assert not batch_of(examples).hidden.any()
    batch = batch_of(examples, mask_probability=1.0)
    assert torch.equal(batch.hidden, batch.ids >= FIRST_WORD)


def test_the_same_row_is_hidden_elsewhere_at_another_step() -> None:
    sampler = sampler_of([conversation((12, 8))], 1, seed=3, mask_probability=0.3)
    first, again, later = (sampler.global_batch(step).hidden for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


# ---- which rows a step trains on


def numbered(rows: int) -> list[Example]:
    return [Example(((BOS, FIRST_WORD + i, EOS),), (1,)) for i in range(rows)]


def tensors(batch: Batch) -> dict[str, Tensor | int]:
    return {field.name: getattr(batch, field.name) for field in fields(Batch)}


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in tensors(one).items():
        same = getattr(other, name)
        assert torch.equal(value, same) if isinstance(value, Tensor) else value == same, name


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    examples = [conversation((6, 10), (3, 4), seed=i) for i in range(7)]
    one, other = (sampler_of(examples, 4, seed=9, mask_probability=0.2) for _ in range(2))
    straight = [one.global_batch(step) for step in range(6)]
    for step in (5, 0, 3, 3, 1, 4, 2):  # a resumed run starts anywhere
        assert_same(other.global_batch(step), straight[step])
    different = sampler_of(examples, 4, seed=10, mask_probability=0.2)
    assert [b.rows.tolist() for b in straight] != [different.global_batch(step).rows.tolist() for step in range(6)]


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (10, 4), (7, 7), (3, 5)])
def test_every_row_comes_exactly_once_in_every_epoch(rows: int, size: int) -> None:
    sampler = sampler_of(numbered(rows), size, seed=1)
    order = [row for step in range(-(-4 * rows // size)) for row in sampler.global_batch(step).rows.tolist()]
    epochs = [order[start : start + rows] for start in range(0, 4 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "every epoch has its own order"


def test_rows_say_which_example_they_are() -> None:
    sampler = sampler_of(numbered(10), 4, seed=1)
    batch = sampler.global_batch(2)
    assert (batch.ids[:, 0, 1] - FIRST_WORD).tolist() == batch.rows.tolist()


def test_rows_of_all_steps_have_seeds_of_their_own() -> None:
    sampler = sampler_of(numbered(10), 4, seed=1)
    seeds = [seed for step in range(50) for seed in sampler.global_batch(step).seeds.tolist()]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(12)
    assert derive_seed(7, "evaluation", 3) == derive_seed(7, "evaluation", 3)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_shares_of_all_workers_are_the_whole_batch_with_its_totals(workers: int, micro: int) -> None:
    examples = [conversation((2 + i, 3), *[(1, 1)] * (i % 3), seed=i) for i in range(8)]
    whole = sampler_of(examples, 8, seed=2, mask_probability=0.3).global_batch(1)
    shares = [list(whole.shares(rank, workers, micro)) for rank in range(workers)]
    assert {len(share) for share in shares} == {8 // workers // micro}
    parts = [part for share in shares for part in share]
    assert sorted(digest for part in parts for digest in part.digests()) == sorted(whole.digests())
    assert len(set(whole.digests())) == 8
    for name in ("total_rows", "total_targets", "total_hidden", "total_turns", "total_texts", "longest"):
        assert {getattr(part, name) for part in parts} == {getattr(whole, name)}, "totals are global"
    assert sum(int(part.targets.sum()) for part in parts) == whole.total_targets
    assert sum(int(part.hidden.sum()) for part in parts) == whole.total_hidden
    assert sum(int(part.turns.sum()) for part in parts) == whole.total_turns


def test_workers_get_rows_of_like_length_at_the_same_time() -> None:
    rows = [conversation((i + 1, i + 1), seed=i) for i in range(8)]
    whole = collate(rows, range(8), range(8))
    taken = [[part.rows.tolist() for part in whole.shares(rank, 2, 2)] for rank in range(2)]
    assert taken == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_workers_compute_the_same_shapes_without_what_none_of_them_has() -> None:
    rows = [conversation(*[(i + 1, i + 1)] * (1 + i // 2), seed=i) for i in range(8)]
    whole = collate(rows, range(8), range(8))
    shares = [list(whole.shares(rank, 2, 2)) for rank in range(2)]
    for number, parts in enumerate(zip(*shares, strict=True)):
        block = rows[4 * number : 4 * number + 4]
        longest = max(len(turn) for row in block for turn in row.turns)
        assert {part.ids.shape for part in parts} == {(2, max(len(row.turns) for row in block), longest)}
        assert parts[0].turn_lengths == parts[1].turn_lengths
        assert max(parts[0].turn_lengths) == longest
        assert {part.longest for part in parts} == {whole.longest}


@pytest.mark.parametrize("changed", ["ids", "targets", "hidden", "seeds", "rows", "documents"])
def test_a_row_s_digest_changes_with_whatever_it_trains_on(changed: str) -> None:
    texts = [Example(((BOS, FIRST_WORD + i, EOS),), (1,)) for i in range(4)]
    batch = collate(texts, [1, 2], [0, 1], documents=[2, 2])
    before = batch.digests()
    value = getattr(batch, changed)
    value[(0,) * value.dim()] = ~value[(0,) * value.dim()]
    assert batch.digests()[0] != before[0]
    assert batch.digests()[1] == before[1]


def test_steps_are_the_epochs_rows_over_the_batch() -> None:
    sampler = sampler_of(numbered(10), 4, seed=1)
    assert [sampler.steps(epochs) for epochs in (1, 2, 0.5, 0.01)] == [2, 5, 1, 1]


def test_no_rows_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        sampler_of([], 4, seed=1)


def test_lessons_cut_conversations_for_their_epochs_and_then_no_more() -> None:
    examples = [conversation(*[(2, 2)] * 4, seed=i) for i in range(8)]
    sampler = sampler_of(examples, 4, seed=1, lessons=[(2, 2), (1.5, 3)])  # 2 steps an epoch: 4, then 3 steps
    batches = [sampler.global_batch(step) for step in range(10)]
    assert [batch.ids.shape[1] for batch in batches] == [2] * 4 + [3] * 3 + [4] * 3
    assert [batch.total_targets for batch in batches] == [4 * 3 * turns for turns in [2] * 4 + [3] * 3 + [4] * 3]
    plain = sampler_of(examples, 4, seed=1)
    for step, batch in enumerate(batches):
        assert torch.equal(batch.rows, plain.global_batch(step).rows), "lessons change lengths, not the order of rows"
        turns = batch.ids.shape[1]
        assert torch.equal(batch.ids, plain.global_batch(step).ids[:, :turns])


def test_a_conversation_shorter_than_its_lesson_stays_whole() -> None:
    short = conversation((2, 2), (2, 2))
    assert short.first_turns(5) == short == short.first_turns(None)
    assert short.first_turns(1).turns == short.turns[:1]


def test_a_row_s_ids_do_not_depend_on_the_rows_beside_it() -> None:
    rows = [Example((tuple(ids),), (1,)) for ids in rows_of(3, 9, 5)]
    together = collate(rows, [1, 2, 3], [0, 1, 2], 0.4)
    for i, row in enumerate(rows):
        alone = collate([row], [i + 1], [i], 0.4)
        length = len(row.turns[0])
        for name in ("ids", "mask", "targets", "hidden"):
            assert torch.equal(getattr(together, name)[i, :, :length], getattr(alone, name)[0]), name


def test_consecutive_epochs_run_on_in_one_batch() -> None:
    sampler = sampler_of(numbered(6), 4, seed=1)
    first, middle, last = (sampler.global_batch(step).rows.tolist() for step in range(3))
    assert sorted(first + middle[:2]) == sorted(middle[2:] + last) == list(range(6))


# ---- rows of like length together


def lengths_of(batch: Batch) -> list[int]:
    return [int(row.sum()) for row in batch.mask[:, 0]]


def varied(rows: int) -> list[Example]:
    """Texts of many lengths, in no order."""
    return [Example((tuple(ids),), (1,)) for ids in rows_of(*[3 + i * 7 % 19 for i in range(rows)])]


def test_rows_of_a_batch_are_sorted_by_turns_and_length_and_no_others() -> None:
    examples = [conversation(*[(2 + i * 5 % 7, 2)] * (1 + i % 4), seed=i) for i in range(40)]
    drawn = sorted(row for step in range(5) for row in sampler_of(examples, 8).global_batch(step).rows.tolist())
    assert drawn == list(range(40))
    for step in range(5):
        batch = sampler_of(examples, 8).global_batch(step)
        keys = [(len(examples[row].turns), max(map(len, examples[row].turns))) for row in batch.rows.tolist()]
        assert keys == sorted(keys)


def test_a_lesson_s_rows_are_sorted_by_what_is_left_of_them() -> None:
    examples = [conversation((2 + i * 5 % 7, 2), *[(9, 9)] * (i % 4), seed=i) for i in range(40)]
    batch = sampler_of(examples, 40, lessons=[(1, 1)]).global_batch(0)
    assert batch.ids.shape[1] == 1
    assert lengths_of(batch) == sorted(lengths_of(batch))


def test_micro_batches_of_like_length_save_padding() -> None:
    share = []
    for micro in (32, 4):
        sampler = sampler_of(varied(400), 32)
        parts = [part for step in range(12) for part in sampler.global_batch(step).shares(0, 1, micro)]
        share.append(sum(part.tokens for part in parts) / sum(part.mask.numel() for part in parts))
    assert share[0] < 0.75
    assert share[1] > 0.9


@pytest.mark.parametrize(("overhead", "micro"), [(0, 1), (20, 8), (10_000, 32)])
def test_a_forward_takes_as_many_rows_as_cost_least(overhead: int, micro: int) -> None:
    sampler = sampler_of(varied(400), 64)
    assert sampler.forward_rows(32, 2, overhead) == micro


def test_rows_of_one_length_go_through_in_one_forward() -> None:
    assert sampler_of(numbered(64), 32).forward_rows(32, 1, 1) == 32


# ---- packs


def packed_sampler(rows: int = 60, size: int = 4, **settings: Any) -> BatchSampler:
    return sampler_of(varied(rows), size, capacity=32, **settings)


def test_packs_hold_every_text_once_an_epoch_and_fill_their_rows() -> None:
    sampler = packed_sampler(mask_probability=0.2)
    texts = {text.turns[0]: 0 for text in varied(60)}
    for step in range(sampler.rows // 4):
        batch = sampler.global_batch(step)
        assert batch.documents is not None
        assert batch.ids.shape[-1] <= 32
        assert batch.total_texts == int((batch.documents.max(dim=1).values + 1).sum())
        assert torch.equal(batch.mask[:, 0], batch.documents >= 0)
        for ids, documents in zip(batch.ids[:, 0], batch.documents, strict=True):
            for document in range(int(documents.max()) + 1):
                texts[tuple(ids[documents == document].tolist())] += 1
    assert set(texts.values()) <= {0, 1}
    assert sum(texts.values()) >= 60 - 4 * 10


def test_the_first_token_of_a_packed_text_is_no_target() -> None:
    batch = packed_sampler().global_batch(0)
    assert batch.documents is not None
    first = torch.ones_like(batch.documents, dtype=torch.bool)
    first[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert torch.equal(batch.targets[:, 0], batch.mask[:, 0] & ~first)


def test_conversations_are_not_packed() -> None:
    with pytest.raises(DataError, match="only texts can be packed"):
        sampler_of([conversation((2, 2), (1, 1))], 1, capacity=64)


# ---- weights of sources


class FromSources(ExampleSet):
    """Examples of several sources."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(varied(sum(sizes)))
        self._sizes = sizes

    @property
    def sources(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._sizes), dtype=np.int16), self._sizes)


@pytest.mark.parametrize("capacity", [None, 32])
def test_weights_are_how_often_an_epoch_holds_a_source_s_rows(capacity: int | None) -> None:
    sampler = sampler_of(FromSources(10, 20, 8), 1, weights=[2.0, 0.5, 1.25], capacity=capacity)
    plain = [sampler_of(FromSources(*sizes), 1, capacity=capacity).rows for sizes in ((10,), (20,), (8,))]
    if capacity is None:
        assert plain == [10, 20, 8]
        assert sampler.rows == 20 + 10 + 10
        epochs = [[int(sampler.global_batch(e * 40 + i).rows[0]) for i in range(40)] for e in range(4)]
        for epoch in epochs:
            counts = np.bincount(epoch, minlength=38)
            assert set(counts[:10]) == {2}
            assert sorted(counts[10:30]) == [0] * 10 + [1] * 10
            assert sorted(counts[30:]) == [1] * 6 + [2] * 2
        half = [{row for row in epoch if 10 <= row < 30} for epoch in epochs]
        assert half[0] | half[1] == half[2] | half[3] == set(range(10, 30)), "another half each time"
    else:
        assert sampler.rows > sum(plain) / 2


def test_weights_that_leave_no_row_are_an_error() -> None:
    with pytest.raises(DataError, match="no epoch holds one"):
        sampler_of(FromSources(3), 1, weights=[0.1])


# ---- exact resume (what the issue calls the sequence of batch hashes)


@pytest.mark.parametrize("capacity", [None, 32])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_stopped_after_any_step_the_rest_of_the_batches_is_the_same(workers: int, capacity: int | None) -> None:
    def stream(first: int, last: int, world: int) -> list[str]:
        sampler = sampler_of(varied(120), 8, epochs=8, mask_probability=0.2, capacity=capacity)
        hashes = []
        with prefetched(sampler.global_batch, first, last) as next_batch:
            for _ in range(first, last):
                batch = next_batch()
                parts = [list(batch.shares(rank, world, 2)) for rank in range(world)]
                rows = [digest for step in zip(*parts, strict=True) for part in step for digest in part.digests()]
                assert rows == batch.digests(), "workers' rows, put together, are the batch"
                hashes.append("".join(rows))
        return hashes

    straight = stream(0, 40, 1)
    for stop in random.Random(0).sample(range(40), 12):
        assert straight[stop:] == stream(stop, 40, workers)


def test_an_error_while_a_batch_is_made_reaches_the_step_and_the_thread_ends() -> None:
    def make(step: int) -> Batch:
        if step == 2:
            raise DataError("row 7 can't be read")
        return batch_of(varied(2))

    before = threading.active_count()
    with prefetched(make, 0, 5) as next_batch:
        next_batch(), next_batch()
        with pytest.raises(DataError, match="row 7"):
            next_batch()
    assert threading.active_count() == before


def test_prefetching_stops_with_its_block_and_runs_only_a_little_ahead() -> None:
    made = []

    def make(step: int) -> Batch:
        made.append(step)
        return batch_of(varied(2))

    with prefetched(make, 0, 1000) as next_batch:
        next_batch()
        time.sleep(0.3)
    assert len(made) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_rows_for_a_measurement_are_taken_evenly_from_all() -> None:
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(0, 5) == []
    assert evenly(400, 4) == [0, 100, 200, 300]
    assert evenly(7, 3) == [0, 2, 4]

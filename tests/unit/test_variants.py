"""Promises that every variant of the model keeps: cached = recomputed, batched = one by one, padding, causality."""

import pytest
import torch
from torch import Tensor

from rxt_platform.data.tokenizer import PAD
from rxt_platform.model.generation import MemoryUpdated, Tokens, answer_batch, interact_batch
from rxt_platform.model.sampling import SamplingOptions
from tests.unit.helpers import FIRST_WORD, VOCAB, padded, rows_of
from tests.unit.variants import WINDOW, every_variant, recomputed

# ---- what every variant promises


@every_variant
@pytest.mark.parametrize("batch", [1, 8])
def test_cached_answers_are_those_of_recomputation(name: str, batch: int) -> None:
    case = recomputed(name)
    answers = answer_batch(case.model, case.prompts[:batch], case.memory[:, :batch], SamplingOptions())
    assert answers == case.answers[:batch]
    assert len({token for answer in case.answers for token in answer}) > 3, "too dull an answer to show anything"


@every_variant
@pytest.mark.parametrize("batch", [1, 8])
def test_cached_logits_are_those_of_recomputation(name: str, batch: int) -> None:
    case = recomputed(name)
    model, prompts, answers = case.model, case.prompts[:batch], case.answers[:batch]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = padded(prompts)
    with torch.no_grad():
        cache = model.decoder.start_cache(case.memory[:, :batch], batch, WINDOW)
        states = model.decoder.prefill(model.embedding(ids), mask, cache)
        logits = model.head(states[torch.arange(batch), mask.sum(dim=1) - 1])
        for turn in range(max(map(len, answers))):
            live = [turn < len(answer) for answer in answers]
            for i in range(batch):
                if live[i]:
                    torch.testing.assert_close(logits[i], case.logits[i][turn], atol=1e-5, rtol=0)
            places = [len(prompt) + turn if on else WINDOW - 1 for prompt, on in zip(prompts, live, strict=True)]
            tokens = [row[place] if on else PAD for row, place, on in zip(rows, places, live, strict=True)]
            used = max(place for place, on in zip(places, live, strict=True) if on) + 1
            new = model.embedding(torch.tensor(tokens))[:, None]
            logits = model.head(model.decoder.step(new, torch.tensor(places)[:, None], cache, used)[:, 0])


@every_variant
def test_a_batch_of_turns_gives_what_they_give_one_by_one(name: str) -> None:
    case = recomputed(name)

    def turn(rows: slice) -> tuple[list[list[int]], Tensor]:
        *_, updated = events = list(interact_batch(case.model, case.prompts[rows], case.memory[:, rows]))
        steps = [event.ids for event in events if isinstance(event, Tokens)]
        assert isinstance(updated, MemoryUpdated)
        return [[token for token in row if token is not None] for row in zip(*steps, strict=True)], updated.memory

    answers, written = turn(slice(0, 8))
    assert len({len(answer) for answer in answers}) > 2, "rows must end at different steps"
    for i in range(8):
        (alone,), mine = turn(slice(i, i + 1))
        assert alone == answers[i]
        torch.testing.assert_close(mine[:, 0], written[:, i], atol=2e-6, rtol=1e-6)


@every_variant
def test_padding_changes_nothing(name: str) -> None:
    model, memory = recomputed(name).model, recomputed(name).memory[:, :3]
    rows = rows_of(9, 4, 6)
    ids, mask = padded(rows)
    wide, wide_mask = padded(rows, 20)
    with torch.no_grad():
        expected, written = model.decode_states(ids, mask, memory), model.write(memory, ids, mask)
        for other, real in ((wide, wide_mask), (ids.masked_fill(~mask, FIRST_WORD + 3), mask)):
            decoded = model.decode_states(other, real, memory)
            logits, expected_logits = model.head(decoded.states[real]), model.head(expected.states[mask])
            torch.testing.assert_close(logits, expected_logits, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(decoded.balance, expected.balance)
            assert decoded.usage.tolist() == expected.usage.tolist()
            torch.testing.assert_close(model.write(memory, other, real), written, atol=1e-6, rtol=1e-6)


@every_variant
def test_no_mask_is_a_mask_without_padding(name: str) -> None:
    model, memory = recomputed(name).model, recomputed(name).memory[:, :2]
    ids, mask = padded(rows_of(9, 9))
    with torch.no_grad():
        whole, masked = model.decode_states(ids, None, memory), model.decode_states(ids, mask, memory)
        torch.testing.assert_close(whole.states, masked.states, atol=1e-6, rtol=0)
        torch.testing.assert_close(whole.balance, masked.balance)
        assert whole.usage.tolist() == masked.usage.tolist()
        torch.testing.assert_close(model.write(memory, ids), model.write(memory, ids, mask), atol=1e-6, rtol=1e-6)


@every_variant
def test_a_token_sees_nothing_that_comes_later(name: str) -> None:
    model, memory = recomputed(name).model, recomputed(name).memory[:, :1]
    ids, mask = padded(rows_of(12))
    changed = ids.clone()
    changed[0, 7] = FIRST_WORD + (int(ids[0, 7]) - FIRST_WORD + 1) % (VOCAB - FIRST_WORD)
    with torch.no_grad():
        before, after = model.decode(ids, mask, memory), model.decode(changed, mask, memory)
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-6, rtol=0)
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(dim=-1) > 1e-5).all(), "every later token reads the changed one"


@every_variant
def test_several_tokens_at_once_extend_a_cache_as_one_by_one(name: str) -> None:
    model, memory = recomputed(name).model, recomputed(name).memory[:, :2]
    ids, mask = padded(rows_of(12, 12))
    with torch.no_grad():
        cache = model.decoder.start_cache(memory, 2, WINDOW)
        model.decoder.prefill(model.embedding(ids[:, :5]), mask[:, :5], cache)
        positions = torch.arange(5, 12).expand(2, -1)
        states = model.decoder.step(model.embedding(ids[:, 5:]), positions, cache)
        expected = model.decode_states(ids, mask, memory).states[:, 5:]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


@every_variant
def test_every_stateful_layer_reads_its_own_memory(name: str) -> None:
    model, memory = recomputed(name).model, recomputed(name).memory[:, :1]
    ids, mask = padded(rows_of(6))
    stateful = [layer for layer in model.decoder.layers if layer.stateful]
    assert len(stateful) == model.config.layers
    for i, layer in enumerate(stateful):
        output = layer.cross_attention.output.weight
        kept, mixed = output.detach().clone(), memory.clone()
        mixed[i] = torch.randn(memory.shape[1:], generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            moved = (model.decode(ids, mask, mixed) - model.decode(ids, mask, memory)).abs().amax(dim=-1)
            output.zero_()  # layer i no longer reads
            still = (model.decode(ids, mask, mixed) - model.decode(ids, mask, memory)).abs().max()
            output.copy_(kept)
        assert (moved > 1e-5).all(), f"memory layer {i} is not read"
        assert still == 0, f"memory layer {i} is read by another layer than stateful layer {i}"

"""Promises of generation: cached = recomputed, batched = one by one, sampling by seed, where an answer ends, events."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, QUERY
from rxt_platform.errors import DataError
from rxt_platform.model.generation import (
    MemoryUpdated,
    MemoryUpdateStarted,
    SamplingOptions,
    Token,
    answer_batch,
    choose,
    generate,
    interact,
)
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import rows_of, tiny_config, tiny_model

LENGTHS = (5, 1, 9, 14, 3, 20, 7, 2)
NEVER, SOMETIMES, ALWAYS = -1e4, 0.3, 1e4  # how much likelier `[EOS]` is made


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[BOS, QUERY, *row, ANSWER] for row in rows_of(*lengths, seed=3)]


def model_that_ends(bias: float) -> ReactiveTransformer:
    """A model for which `[EOS]` is more (or less) likely by `bias`."""
    model = tiny_model(seed=1)
    model.decoder.head.bias.data[EOS] += bias
    return model


def recomputed(model: ReactiveTransformer, prompt: Sequence[int], memory: Tensor) -> list[int]:
    """The greedy answer, with the whole sequence decoded anew for every token."""
    ids, answer = list(prompt), []
    while len(ids) < model.config.max_length and EOS not in answer:
        row = torch.tensor([ids])
        with torch.no_grad():
            token = int(model.decode(row, torch.ones_like(row, dtype=torch.bool), memory)[0, -1].argmax())
        ids.append(token)
        answer.append(token)
    return answer


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("bias", [NEVER, SOMETIMES])
def test_cached_generation_gives_the_tokens_that_recomputation_gives(batch: int, bias: float) -> None:
    model, prompts = model_that_ends(bias), prompts_of(*LENGTHS[:batch])
    memory = model.initial_memory(torch.arange(batch))
    expected = [recomputed(model, prompt, memory[:, i : i + 1]) for i, prompt in enumerate(prompts)]
    assert answer_batch(model, prompts, memory, SamplingOptions()) == expected
    assert len({token for answer in expected for token in answer}) > 3, "too dull an answer to show anything"


def test_a_batch_is_answered_as_its_rows_are_one_by_one() -> None:
    model, prompts = model_that_ends(SOMETIMES), prompts_of(*LENGTHS)
    memory = model.initial_memory(torch.arange(8))
    together = answer_batch(model, prompts, memory, SamplingOptions())
    alone = [
        answer_batch(model, [prompt], memory[:, i : i + 1], SamplingOptions())[0] for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len({len(answer) for answer in together}) > 2, "rows must end at different steps"


def test_an_answer_depends_on_its_own_memory() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(5, 5)
    prompts[1] = prompts[0]
    first, second = answer_batch(model, prompts, model.initial_memory(torch.tensor([1, 2])), SamplingOptions())
    assert first != second


def test_the_same_seed_samples_the_same_answers_and_another_seed_others() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(*LENGTHS)
    memory = model.initial_memory(torch.arange(8))
    torch.manual_seed(1)
    once = answer_batch(model, prompts, memory, SamplingOptions(temperature=1.0, seed=4))
    torch.manual_seed(2)  # the global generator plays no part
    again = answer_batch(model, prompts, memory, SamplingOptions(temperature=1.0, seed=4))
    other = answer_batch(model, prompts, memory, SamplingOptions(temperature=1.0, seed=400))
    assert once == again
    assert once != other


def test_rows_of_a_batch_sample_independently() -> None:
    model = model_that_ends(NEVER)
    prompts = prompts_of(5) * 3
    memory = model.initial_memory(torch.tensor([1, 1, 1]))
    answers = answer_batch(model, prompts, memory, SamplingOptions(temperature=1.0))
    assert len({tuple(answer) for answer in answers}) == 3


def test_sampling_follows_the_temperature_and_keeps_the_nucleus() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0))

    def shares(**options: float) -> list[float]:
        picks = choose(logits, SamplingOptions(**options), draws)  # type: ignore[arg-type]
        return [float((picks == token).float().mean()) for token in range(4)]

    assert shares(temperature=1.0) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    assert shares(temperature=1.0, top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.04)
    assert shares(temperature=1.0, top_p=0.3) == [1, 0, 0, 0]
    assert shares(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.04)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_an_answer_ends_with_eos() -> None:
    model, prompts = model_that_ends(ALWAYS), prompts_of(4, 7)
    memory = model.initial_memory(torch.arange(2))
    assert answer_batch(model, prompts, memory, SamplingOptions()) == [[EOS], [EOS]]


def test_a_row_that_ended_gives_none_while_others_go_on() -> None:
    model, prompts = model_that_ends(SOMETIMES), prompts_of(*LENGTHS)
    steps = list(generate(model, prompts, model.initial_memory(torch.arange(8))))
    for row in zip(*steps, strict=True):
        ended = next((i for i, token in enumerate(row) if token in (EOS, None)), len(row))
        assert all(token is None for token in row[ended + 1 :])
        assert EOS not in row[:ended]
        assert None not in row[:ended]
    assert any(token is not None for token in steps[-1]), "nothing is yielded after the last row ended"


def test_an_answer_ends_where_the_window_is_full() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(*LENGTHS)
    answers = answer_batch(model, prompts, model.initial_memory(torch.arange(8)), SamplingOptions())
    filled = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert filled == [model.config.max_length] * 8


def test_an_answer_ends_after_max_new_tokens() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(4, 19)
    memory = model.initial_memory(torch.arange(2))
    answers = answer_batch(model, prompts, memory, SamplingOptions(max_new_tokens=3))
    assert [len(answer) for answer in answers] == [3, 2]  # the second row's window has room for 2
    whole = answer_batch(model, prompts, memory, SamplingOptions())
    assert [answer[:3] for answer in whole] == answers


def test_a_prompt_that_fills_the_window_is_refused_by_its_row_and_length() -> None:
    model = tiny_model()
    fits, full = prompts_of(20, 21)
    memory = model.initial_memory(torch.arange(2))
    assert len(answer_batch(model, [fits], memory[:, :1], SamplingOptions())[0]) == 1
    with pytest.raises(DataError, match=r"prompt 1 has 24 tokens: no room to answer in a window of 24"):
        answer_batch(model, [fits, full], memory, SamplingOptions())


@pytest.mark.parametrize("bias", [NEVER, ALWAYS])
def test_a_turn_is_tokens_then_one_write_of_query_and_answer(bias: float) -> None:
    model, (prompt,) = model_that_ends(bias), prompts_of(6)
    memory = model.initial_memory(torch.tensor([1]))
    before = memory.clone()
    events = list(interact(model, prompt, memory))
    *tokens, started, updated = events
    assert all(isinstance(event, Token) for event in tokens)
    assert isinstance(started, MemoryUpdateStarted)
    assert isinstance(updated, MemoryUpdated)
    answer = [event.id for event in tokens if isinstance(event, Token)]
    assert answer == answer_batch(model, [prompt], memory, SamplingOptions())[0]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        written = model.write(memory, ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(updated.memory, written, atol=1e-6, rtol=0)
    assert updated.change == pytest.approx(float((written - memory).norm() / memory.norm()), rel=1e-4)
    assert torch.equal(memory, before), "the caller's memory is a value"


def test_two_conversations_can_take_turns_on_one_model() -> None:
    model, (prompt, other) = model_that_ends(NEVER), prompts_of(6, 4)
    memory = model.initial_memory(torch.tensor([1]))
    alone = list(interact(model, prompt, memory))
    mixed, elsewhere = interact(model, prompt, memory), interact(model, other, model.initial_memory(torch.tensor([2])))
    tokens = []
    for event in mixed:
        tokens.append(event)
        next(elsewhere, None)
    assert [e for e in tokens if isinstance(e, Token)] == [e for e in alone if isinstance(e, Token)]
    last, expected = tokens[-1], alone[-1]
    assert isinstance(last, MemoryUpdated)
    assert isinstance(expected, MemoryUpdated)
    assert torch.equal(last.memory, expected.memory)


def test_generation_works_with_any_sharing_of_heads() -> None:
    full = {"query_heads": 4, "key_value_heads": 4}
    shared = {"query_heads": 4, "key_value_heads": 2}
    decoder = {**tiny_config().decoder.model_dump(), "self_attention": shared, "cross_attention": full}
    model = tiny_model(tiny_config(decoder=decoder), seed=2)
    memory = model.initial_memory(torch.arange(2))
    prompts = prompts_of(4, 9)
    expected = [recomputed(model, prompt, memory[:, i : i + 1]) for i, prompt in enumerate(prompts)]
    assert answer_batch(model, prompts, memory, SamplingOptions()) == expected

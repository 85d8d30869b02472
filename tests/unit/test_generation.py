"""Promises of generation: cached = recomputed, batched = one by one, sampling by seed, where an answer ends, events."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD, QUERY
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.generation import (
    MemoryUpdated,
    MemoryUpdateStarted,
    Token,
    Tokens,
    answer_batch,
    generate,
    interact,
    interact_batch,
)
from rxt_platform.model.sampling import SamplingOptions, choose
from rxt_platform.model.stepper import Stepper
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import VOCAB, padded, rows_of, tiny_config, tiny_model

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


def test_sampling_keeps_the_likeliest_and_of_these_the_nucleus() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(4000, 4)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0))

    def shares(**options: float) -> list[float]:
        picks = choose(logits, SamplingOptions(**options), draws)  # type: ignore[arg-type]
        return [float((picks == token).float().mean()) for token in range(4)]

    assert shares(temperature=1.0, top_k=3) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.04)
    assert shares(temperature=1.0, top_k=1) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_k=9) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert shares(temperature=0.5, top_k=2) == pytest.approx([0, 16 / 25, 0, 9 / 25], abs=0.04)
    # The share of the nucleus is that of the kept tokens: 0.4 of 0.7 reaches 0.55, of all it would take two tokens.
    assert shares(temperature=1.0, top_k=2, top_p=0.55) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_k=2, top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert shares(temperature=1.0, top_k=3, top_p=0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)


def test_a_draw_next_to_one_takes_a_token_that_may_be_drawn() -> None:
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    last, first = torch.ones(200), torch.zeros(200)  # 1 as rounding may leave it; no draw is
    for options in (SamplingOptions(1.0, 0.5), SamplingOptions(1.0, top_k=7), SamplingOptions(1.0, 0.9, top_k=50)):
        kept = logits.topk(options.top_k or 2500, dim=-1).indices
        for draws in (last, first):
            assert (choose(logits, options, draws)[:, None] == kept).any(dim=-1).all()
    everything = SamplingOptions(1.0)
    barred = logits.index_fill(1, torch.arange(4000, 5000), -1e9)
    assert (choose(barred, everything, last) < 4000).all()


def test_a_temperature_next_to_zero_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert choose(logits, SamplingOptions(temperature=1e-39), torch.tensor([0.5])).tolist() == [1]


def test_a_row_s_sample_depends_on_its_own_seed_only() -> None:
    model, prompts = model_that_ends(SOMETIMES), prompts_of(*LENGTHS)
    memory, options = model.initial_memory(torch.arange(8)), SamplingOptions(temperature=1.0, top_p=0.9)
    seeds = [50, 3, 77, 2**62, 0, 9, 12, 5]
    together = answer_batch(model, prompts, memory, options, seeds)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    mixed = answer_batch(model, [prompts[i] for i in order], memory[:, order], options, [seeds[i] for i in order])
    assert mixed == [together[i] for i in order]
    for i in (0, 3, 6):
        assert answer_batch(model, [prompts[i]], memory[:, i : i + 1], options, [seeds[i]])[0] == together[i]
    assert answer_batch(model, prompts, memory, options, range(8)) == answer_batch(model, prompts, memory, options)
    assert answer_batch(model, prompts, memory, options, [*seeds[:7], 6])[:7] == together[:7]


def test_rows_of_one_seed_sample_the_same() -> None:
    model = model_that_ends(NEVER)
    memory = model.initial_memory(torch.tensor([1, 1, 1]))
    answers = answer_batch(model, prompts_of(5) * 3, memory, SamplingOptions(temperature=1.0), [4, 4, 5])
    assert answers[0] == answers[1] != answers[2]


def test_several_answers_to_a_prompt_that_is_read_once() -> None:
    """They are those of as many rows, each with its seed and the limit of its prompt."""
    model, prompts = model_that_ends(SOMETIMES), prompts_of(*LENGTHS[:3])
    memory, options = model.initial_memory(torch.arange(3)), SamplingOptions(temperature=1.0)
    seeds, copies, limits = [5, 6, 7, 8, 9, 10], [3, 1, 2], [9, 4, 30]
    source = [0, 0, 0, 1, 2, 2]
    each = answer_batch(
        model, [prompts[i] for i in source], memory[:, source], options, seeds, [limits[i] for i in source]
    )
    assert answer_batch(model, prompts, memory, options, seeds, limits, copies=copies) == each
    assert len({tuple(answer) for answer in each}) == 6
    with pytest.raises(DataError, match="0 copies"):
        answer_batch(model, prompts, memory, options, copies=[1, 0, 1])


@pytest.mark.parametrize("what", ["seeds", "limits", "copies"])
def test_seeds_limits_and_copies_that_are_not_one_a_row_are_refused(what: str) -> None:
    model = model_that_ends(NEVER)
    memory = model.initial_memory(torch.arange(3))
    with pytest.raises(DataError, match=what):
        answer_batch(model, prompts_of(3, 4, 5), memory, SamplingOptions(temperature=1.0), **{what: [3]})


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


def test_every_row_ends_at_its_own_limit() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(4, 7, 9, 19)
    memory = model.initial_memory(torch.arange(4))
    whole = answer_batch(model, prompts, memory, SamplingOptions())
    answers = answer_batch(model, prompts, memory, SamplingOptions(max_new_tokens=2), limits=[5, 1, 100, 3])
    assert [len(answer) for answer in answers] == [5, 1, 12, 2], "the window is never left"
    assert [answer[: len(short)] for answer, short in zip(whole, answers, strict=True)] == answers


def test_a_limit_below_one_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(DataError, match="limit"):
        answer_batch(model, prompts_of(4), model.initial_memory(torch.tensor([0])), SamplingOptions(), limits=[0])


def test_other_tokens_can_end_an_answer_and_then_eos_does_not() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(*LENGTHS)
    memory = model.initial_memory(torch.arange(8))
    whole = answer_batch(model, prompts, memory, SamplingOptions())
    stops = (whole[0][3], whole[2][1])
    cut = []
    for answer in whole:
        end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        cut.append(answer[: end + 1])
    assert cut != whole
    assert answer_batch(model, prompts, memory, SamplingOptions(stop=stops)) == cut
    saying_eos = model_that_ends(ALWAYS)
    (answer,) = answer_batch(saying_eos, prompts[:1], memory[:, :1], SamplingOptions(stop=(stops[0],)))
    assert answer == [EOS] * (24 - len(prompts[0]))
    (answer,) = answer_batch(saying_eos, prompts[:1], memory[:, :1], SamplingOptions(stop=()))
    assert answer == [EOS] * (24 - len(prompts[0]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts to answer"),
        ([[BOS, QUERY, ANSWER], []], "prompt 1 is empty"),
        (
            [[BOS, QUERY, ANSWER], [BOS, VOCAB, 20]],
            f"prompt 1 holds token id {VOCAB}: the model knows 0 to {VOCAB - 1}",
        ),
        ([[BOS, -3, 20]], "prompt 0 holds token id -3"),
        ([[BOS, -3, VOCAB + 5]], "prompt 0 holds token id -3"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_by_row(prompts: list[list[int]], message: str) -> None:
    model = tiny_model()
    with pytest.raises(DataError, match=message):
        next(generate(model, prompts, model.initial_memory(torch.arange(max(1, len(prompts))))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, r"top_p 0.0: must be in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"top_k": 0}, "top_k 0: must be 1 or more"),
        ({"top_k": -1}, "top_k -1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused_by_name_and_value(options: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_a_memory_that_is_not_the_model_s_is_refused() -> None:
    model, prompts = tiny_model(), prompts_of(4, 7)
    memory = model.initial_memory(torch.arange(2))
    for wrong, message in (
        (None, "answers over a memory: pass model.initial_memory"),
        (memory[:, :1], r"the memory is \[2, 1, 8, 32\], this model's is .* = \[2, 2, 8, 32\]"),
        (memory[:1], r"the memory is \[1, 2, 8, 32\]"),
        (memory[:, :, :5], r"the memory is \[2, 2, 5, 32\]"),
        (memory.double(), r"the memory is torch\.float64 on cpu, the model torch\.float32 on cpu"),
    ):
        for use in (generate, interact_batch):
            with pytest.raises(ModelError, match=message):
                list(use(model, prompts, wrong))  # type: ignore[operator]
    with pytest.raises(ModelError, match="float64"):
        list(interact(model, prompts[0], memory[:, :1].double()))


def first_words(answer: list[int], others: list[list[int]]) -> int:
    """A place of `answer`, from 1, whose token is nowhere before in it and nowhere in `others`."""
    elsewhere = {token for other in others for token in other}
    return next(i for i, token in enumerate(answer, 1) if i > 1 and token not in {*elsewhere, *answer[: i - 1]})


def test_logits_that_are_not_finite_are_named_by_row_and_token() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(4, 7, 2)
    memory = model.initial_memory(torch.arange(3))
    answers = answer_batch(model, prompts, memory, SamplingOptions())
    place = first_words(answers[1], [*prompts, answers[0], answers[2]])
    model.embedding.weight.data[answers[1][place - 1]] = torch.nan
    steps = []
    with pytest.raises(ModelError, match=f"row 1: the logits of token {place + 1} are not finite"):
        steps.extend(generate(model, prompts, memory))
    assert [list(row) for row in zip(*steps, strict=True)] == [answer[:place] for answer in answers]
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match=r"row 0: the logits of token 1 are not finite: the weights or the memory"):
            list(generate(model, prompts, memory * torch.inf, SamplingOptions(temperature)))


def test_what_an_ended_row_computes_is_not_looked_at() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(6, 6)
    memory = model.initial_memory(torch.arange(2))
    whole = answer_batch(model, prompts, memory, SamplingOptions())
    assert PAD not in whole[1]
    model.embedding.weight.data[PAD] = torch.nan
    answers = answer_batch(model, prompts, memory, SamplingOptions(), limits=[2, 99])
    assert answers == [whole[0][:2], whole[1]]


def test_of_rows_that_are_not_finite_a_running_one_is_named() -> None:
    model, prompts = model_that_ends(NEVER), prompts_of(6, 6)
    memory = model.initial_memory(torch.arange(2))
    answers = answer_batch(model, prompts, memory, SamplingOptions())
    place = first_words(answers[1], [*prompts, answers[0][:1]])
    model.embedding.weight.data[[PAD, answers[1][place - 1]]] = torch.nan
    with pytest.raises(ModelError, match="row 1: the logits"):
        list(generate(model, prompts, memory, limits=[1, 99]))


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


def test_a_batch_s_turn_is_steps_of_tokens_then_one_write_of_every_row() -> None:
    model, prompts = model_that_ends(SOMETIMES), prompts_of(*LENGTHS[:4])
    memory = model.initial_memory(torch.arange(4))
    before, options, seeds = memory.clone(), SamplingOptions(temperature=1.0), [4, 8, 1, 3]
    *steps, started, updated = interact_batch(model, prompts, memory, options, seeds, limits=[3, 9, 2, 9])
    assert [event.ids for event in steps if isinstance(event, Tokens)] == list(
        generate(model, prompts, memory, options, seeds, [3, 9, 2, 9])
    )
    assert all(isinstance(event, Tokens) for event in steps)
    assert isinstance(started, MemoryUpdateStarted)
    assert isinstance(updated, MemoryUpdated)
    answers = answer_batch(model, prompts, memory, options, seeds, [3, 9, 2, 9])
    ids, mask = padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        written = model.write(memory, ids, mask)
        alone = [model.write(memory[:, i : i + 1], ids[i : i + 1, mask[i]]) for i in range(4)]
    assert torch.equal(updated.memory, written)
    torch.testing.assert_close(updated.memory, torch.cat(alone, dim=1), atol=1e-5, rtol=0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999])
def test_a_row_is_drawn_alike_alone_in_a_batch_and_without_a_look(dtype: torch.dtype, top_p: float) -> None:
    """In bf16 many tokens are equally likely, and a vocabulary of 3,000 is sorted in part where one may look."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 8, 40)[:, None]  # from flat, which needs the whole vocabulary, to peaked
    logits = (torch.randn(40, 3000, generator=generator) * scale).to(dtype)
    draws = torch.rand(40, generator=generator)
    options = SamplingOptions(temperature=1.0, top_p=top_p)
    together = choose(logits, options, draws)
    assert torch.equal(choose(logits, options, draws, look=False), together)
    alone = [choose(logits[i : i + 1], options, draws[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(alone), together)
    assert len(set(together.tolist())) > 30


# ---- how steps are run


def test_a_cuda_graph_needs_a_model_on_a_cuda_device() -> None:
    with pytest.raises(ModelError, match="cuda_graph needs a model on a CUDA device, this one is on cpu"):
        Stepper(tiny_model(), "cuda_graph")


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a CUDA device of compute capability 9.0",
)
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1.0, top_p=0.9)])
def test_a_cuda_graph_gives_the_tokens_of_eager_steps(options: SamplingOptions) -> None:
    model, prompts = model_that_ends(SOMETIMES).to("cuda", torch.bfloat16), prompts_of(*LENGTHS)
    stepper = Stepper(model, "cuda_graph")
    for seed in range(3):  # the later ones replay what the first captured
        memory = model.initial_memory(torch.arange(8) + 10 * seed)
        rows = prompts[seed:] + prompts[:seed]
        eager = answer_batch(model, rows, memory, options)
        assert answer_batch(model, rows, memory, options, stepper=stepper) == eager
        assert len({len(answer) for answer in eager}) > 2
    (alone,) = answer_batch(model, prompts[:1], memory[:, :1], options, stepper=stepper)
    assert alone == answer_batch(model, prompts[:1], memory[:, :1], options)[0]

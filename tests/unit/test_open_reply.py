"""Promises of how a reply is opened: the marker asked for, or, once for each row, the one that the model prefers."""

import pytest
import torch
from torch import Tensor

from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD, QUERY, THINK
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.generation import ThinkingMode, answer_batch, open_reply
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import VOCAB, rows_of, tiny_config, tiny_model

LENGTHS = (5, 1, 9, 14, 3, 20, 7, 2, 11, 6)
MODES: tuple[ThinkingMode, ...] = ("fast", "extended", "auto")


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[BOS, QUERY, *row] for row in rows_of(*lengths, seed=3)]


def undecided(seed: int = 1) -> ReactiveTransformer:
    """A model that prefers `[T]` after some prompts and `[A]` after others."""
    return tiny_model(seed=seed)


def preferred(model: ReactiveTransformer, prompt: list[int], memory: Tensor) -> int:
    """The likelier marker after a prompt, which is decoded alone, without padding."""
    with torch.no_grad():
        logits = model.decode(torch.tensor([prompt]), None, memory)[0, -1]
    return THINK if logits[THINK] > logits[ANSWER] else ANSWER


def test_a_mode_that_says_how_to_begin_appends_its_marker() -> None:
    model, prompts = undecided(), prompts_of(4, 7)
    memory = model.initial_memory(torch.arange(2))
    kept = [list(prompt) for prompt in prompts]
    assert open_reply(model, prompts, memory, "fast") == [[*prompt, ANSWER] for prompt in prompts]
    assert open_reply(model, prompts, memory, "extended") == [[*prompt, THINK] for prompt in prompts]
    open_reply(model, prompts, memory, "auto")
    assert prompts == kept, "the caller's prompts are values"


def test_every_row_gets_the_marker_that_is_likelier_after_it_alone_over_its_own_memory() -> None:
    model, prompts = undecided(), prompts_of(*LENGTHS)
    memory = model.initial_memory(torch.arange(len(prompts)))
    expected = [preferred(model, prompt, memory[:, i : i + 1]) for i, prompt in enumerate(prompts)]
    assert {ANSWER, THINK} == set(expected), "or nothing is decided"
    opened = open_reply(model, prompts, memory, "auto")
    assert opened == [[*prompt, marker] for prompt, marker in zip(prompts, expected, strict=True)]


def test_a_row_s_marker_does_not_depend_on_the_other_rows() -> None:
    model, prompts = undecided(), prompts_of(*LENGTHS)
    memory = model.initial_memory(torch.arange(len(prompts)))
    together = open_reply(model, prompts, memory, "auto")
    for rows in ([8, 2, 5], [0], [7, 6, 5, 4, 3, 2, 1, 0], [4, 4, 1]):
        some = open_reply(model, [prompts[i] for i in rows], memory[:, rows], "auto")
        assert some == [together[i] for i in rows]


def test_the_memory_has_its_say() -> None:
    model, (prompt,) = undecided(), prompts_of(5)
    memory = model.initial_memory(torch.tensor([1, 2]))
    with torch.no_grad():  # [T] is likelier by as much as a state is nearer to that over the second memory
        first, second = model.decode_states(torch.tensor([prompt] * 2), None, memory).states[:, -1]
        head = model.decoder.head
        head.weight[THINK] = head.weight[ANSWER] + (second - first)
        head.bias[THINK] = head.bias[ANSWER] - (second - first) @ (first + second) / 2
    opened = open_reply(model, [prompt, prompt, prompt], memory[:, [0, 1, 0]], "auto")
    assert [row[-1] for row in opened] == [ANSWER, THINK, ANSWER]


def test_equally_likely_markers_mean_an_answer() -> None:
    model, prompts = undecided(), prompts_of(4, 9, 2)
    memory = model.initial_memory(torch.arange(3))
    head = model.decoder.head
    head.weight.data[[ANSWER, THINK]] = 0.0  # so that the bias alone decides
    head.bias.data[[ANSWER, THINK]] = 0.25
    assert [row[-1] for row in open_reply(model, prompts, memory, "auto")] == [ANSWER] * 3
    head.bias.data[THINK] = torch.tensor(0.25).nextafter(torch.tensor(1.0))
    assert [row[-1] for row in open_reply(model, prompts, memory, "auto")] == [THINK] * 3


def test_what_the_model_prefers_of_all_tokens_plays_no_part() -> None:
    model, prompts = undecided(), prompts_of(*LENGTHS)
    memory = model.initial_memory(torch.arange(len(prompts)))
    before = open_reply(model, prompts, memory, "auto")
    model.decoder.head.bias.data[[PAD, EOS, 40]] += 1e4
    assert open_reply(model, prompts, memory, "auto") == before


def test_the_decoder_runs_once_over_the_prompts_and_only_to_decide() -> None:
    model, prompts = undecided(), prompts_of(4, 9, 2)
    memory = model.initial_memory(torch.arange(3))
    widths: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    for mode, runs in (("fast", []), ("extended", []), ("auto", [11])):
        widths.clear()
        answer_batch(model, open_reply(model, prompts, memory, mode), memory, SamplingOptions())  # type: ignore[arg-type]
        assert widths == runs, mode


def test_a_model_without_memory_can_decide_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StatelessTransformer(tiny_config()).eval()
    prompts = prompts_of(*LENGTHS)
    opened = open_reply(model, prompts, None, "auto")
    with torch.no_grad():
        alone = [model.decode(torch.tensor([prompt]))[0, -1] for prompt in prompts]
    assert [row[-1] for row in opened] == [THINK if row[THINK] > row[ANSWER] else ANSWER for row in alone]
    assert {row[-1] for row in opened} == {ANSWER, THINK}


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_leaves_no_room_for_marker_and_answer_is_refused(mode: ThinkingMode) -> None:
    model, (fits, full) = undecided(), prompts_of(20, 21)
    memory = model.initial_memory(torch.arange(2))
    opened = open_reply(model, [fits], memory[:, :1], mode)
    assert len(answer_batch(model, opened, memory[:, :1], SamplingOptions())[0]) == 1
    with pytest.raises(DataError, match="prompt 1 has 24 tokens: no room to answer in a window of 24"):
        open_reply(model, [fits, full], memory, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts to answer"),
        ([[BOS, QUERY, 20], []], "prompt 1 is empty"),
        ([[BOS, VOCAB]], f"prompt 0 holds token id {VOCAB}: the model knows 0 to {VOCAB - 1}"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(
    mode: ThinkingMode, prompts: list[list[int]], message: str
) -> None:
    model = undecided()
    with pytest.raises(DataError, match=message):
        open_reply(model, prompts, model.initial_memory(torch.arange(max(1, len(prompts)))), mode)


def test_an_unknown_mode_is_refused_and_the_known_are_named() -> None:
    model = undecided()
    with pytest.raises(DataError, match="thinking mode 'slow': one of fast, extended, auto"):
        open_reply(model, prompts_of(4), model.initial_memory(torch.arange(1)), "slow")  # type: ignore[arg-type]


def test_logits_that_are_not_finite_decide_nothing() -> None:
    model, prompts = undecided(), prompts_of(4, 7, 9)
    memory = model.initial_memory(torch.arange(3))
    model.embedding.weight.data[prompts[1][3]] = torch.nan
    assert prompts[1][3] not in prompts[0] + prompts[2]
    with pytest.raises(ModelError, match="row 1: the logits of the marker are not finite: the weights or the memory"):
        open_reply(model, prompts, memory, "auto")
    model.decoder.head.weight.data[50, 3] = torch.inf
    with pytest.raises(ModelError, match="row 0: the logits of the marker are not finite"):
        open_reply(model, prompts, memory, "auto")


def test_a_memory_that_is_not_the_model_s_decides_nothing() -> None:
    model, prompts = undecided(), prompts_of(4, 7)
    memory = model.initial_memory(torch.arange(2))
    for wrong, message in (
        (None, "answers over a memory: pass model.initial_memory"),
        (memory[:, :1], r"the memory is \[2, 1, 8, 32\], this model's is .* = \[2, 2, 8, 32\]"),
    ):
        with pytest.raises(ModelError, match=message):
            open_reply(model, prompts, wrong, "auto")

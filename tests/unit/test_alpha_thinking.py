"""Promises of a held hybrid-reasoning model: when it thinks, what memory then holds, which words are thoughts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_platform import RxTAlpha
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD, QUERY, THINK, ReplyPiece, ReplyStream
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.alpha import Encoded
from rxt_platform.model.generation import ThinkingMode
from tests.unit.alphas import DONE, HYBRID, STARTED, alpha, hybrid, thinker
from tests.unit.helpers import padded, word_tokenizer

MODES: tuple[ThinkingMode, ...] = ("fast", "extended", "auto")
MARKERS = {name: hybrid(name)[1][0] for name in HYBRID}
FORCED: dict[int, ThinkingMode] = {ANSWER: "fast", THINK: "extended"}


def asked(*names: str) -> Encoded:
    """Prompts of interactions that the model has learned, right-padded."""
    ids, mask = padded([hybrid(name)[0] for name in names])
    return {"input_ids": ids, "attention_mask": mask}


def reply(model: RxTAlpha, name: str, mode: ThinkingMode, **options: Any) -> list[int]:
    """The ids that a turn yields, without the signals."""
    *ids, started, done = model.interact(**asked(name), thinking_mode=mode, **{"temperature": 0.0, **options})
    assert (started, done) == (STARTED, DONE)
    return ids


def read(model: RxTAlpha, name: str, mode: ThinkingMode) -> dict[str, str]:
    """The text of each part of a reply, in their order."""
    parts: dict[str, str] = {}
    for token in model.interact(**asked(name), temperature=0.0, thinking_mode=mode):
        piece = model.read_token(token)
        parts[piece.part] = parts.get(piece.part, "") + piece.text
    return parts


def test_what_was_learned_holds_both_ways_of_beginning() -> None:
    assert set(MARKERS.values()) == {ANSWER, THINK}


# ---- when it thinks


@pytest.mark.parametrize("name", HYBRID)
def test_left_to_itself_the_model_thinks_where_it_has_learned_to(name: str) -> None:
    model, (_, taught) = thinker(), hybrid(name)
    assert reply(model, name, "auto") == taught[1:], "the marker belongs to the prompt and is not yielded"
    assert model.reply_markers == taught[:1]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", HYBRID)
def test_a_marker_of_the_model_s_choice_is_followed_by_what_follows_it_when_forced(
    name: str, temperature: float
) -> None:
    free, forced, other = thinker(), thinker(), thinker()
    ids = reply(free, name, "auto", temperature=temperature, seed=4)
    assert ids == reply(forced, name, FORCED[MARKERS[name]], temperature=temperature, seed=4)
    assert torch.equal(free.memory, forced.memory)
    reply(other, name, FORCED[THINK if MARKERS[name] == ANSWER else ANSWER], temperature=temperature, seed=4)
    assert not torch.equal(free.memory, other.memory), "it makes a difference"


def test_the_model_chooses_once_for_its_whole_reply() -> None:
    """A head that prefers `[T]` after every token would insert one everywhere if it were asked again."""
    model = thinker()
    model.model.decoder.head.bias.data[[ANSWER, THINK]] -= 1e4
    model.model.decoder.head.bias.data[THINK] += 5e3
    ids = reply(model, "answers", "auto")
    assert model.reply_markers == [THINK]
    assert not {ANSWER, THINK} & set(ids)
    runs: list[Tensor] = []
    model.model.decoder.register_forward_hook(lambda *arguments: runs.append(arguments[1][0]))
    reply(model, "thinks", "auto")
    assert len(runs) == 1


def test_the_choice_is_made_over_the_conversation_s_own_memory() -> None:
    model, (prompt, _) = thinker(), hybrid("answers")
    model.set_batch_mode(True, 3)
    memory = model.model.initial_memory(torch.tensor([1, 2, 1]))
    head = model.model.decoder.head
    with torch.no_grad():  # [T] is likelier by as much as a state is nearer to that over the second memory
        first, second, _ = model.model.decode_states(torch.tensor([prompt] * 3), None, memory).states[:, -1]
        head.weight[THINK] = head.weight[ANSWER] + 1e3 * (second - first)
        head.bias[THINK] = head.bias[ANSWER] - 1e3 * (second - first) @ (first + second) / 2
    for seeds in ([1, 2, 1], [2, 1, 1]):
        model.reset_stm_state(seeds)
        model.batch_interactions(**asked(*["answers"] * 3), temperature=0.0, thinking_mode="auto")
        assert model.reply_markers == [THINK if seed == 2 else ANSWER for seed in seeds]


def test_without_a_mode_the_answer_comes_at_once() -> None:
    for name in HYBRID:
        plain, fast = thinker(), thinker()
        ids = list(plain.interact(**asked(name), temperature=0.0))
        assert ids[:-2] == reply(fast, name, "fast")
        assert plain.reply_markers == [ANSWER]
        assert torch.equal(plain.memory, fast.memory)
    model = thinker()
    for take in turns(model, asked("thinks"), temperature=0.0):
        take()
        assert model.reply_markers == [ANSWER]
        model.reset_stm_state()


def test_told_to_think_the_model_marks_the_end_of_its_thoughts_itself() -> None:
    ids = reply(thinker(), "thinks", "extended")
    thoughts, answer = word_tokenizer().encode("a red hat, cake"), word_tokenizer().encode("Tom has cake.")
    assert ids == [*thoughts, ANSWER, *answer, EOS]


# ---- in a batch


def batch_of(names: list[str], mode: ThinkingMode) -> tuple[list[list[int]], list[int], Tensor]:
    """Of conversations held together: the replies, their markers and the memories [L, B, S, D]."""
    streaming, whole = thinker(), thinker()
    for model in (streaming, whole):
        model.set_batch_mode(True, len(names))
        model.reset_stm_state([1] * len(names))
    ids, mask = whole.batch_interactions(**asked(*names), temperature=0.0, thinking_mode=mode)
    *steps, _, _ = streaming.batch_interact(**asked(*names), temperature=0.0, thinking_mode=mode)
    assert ids.T.tolist() == steps
    assert torch.equal(streaming.memory, whole.memory)
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)], whole.reply_markers, whole.memory


@pytest.mark.parametrize("mode", MODES)
def test_every_row_of_a_batch_is_as_it_is_alone(mode: ThinkingMode) -> None:
    names = list(HYBRID)
    replies, markers, memories = batch_of(names, mode)
    if mode == "auto":
        assert markers == list(MARKERS.values())
    for row, name in enumerate(names):
        model = thinker()
        model.reset_stm_state([1])
        assert reply(model, name, mode) == replies[row]
        assert model.reply_markers == [markers[row]]
        torch.testing.assert_close(memories[:, row : row + 1], model.memory, atol=1e-5, rtol=0)


def test_who_else_is_in_the_batch_plays_no_part() -> None:
    names = list(HYBRID)
    replies, markers, _ = batch_of(names, "auto")
    for order in ([3, 0], [5, 4, 3, 2, 1, 0], [2, 2, 0]):
        some, some_markers, _ = batch_of([names[i] for i in order], "auto")
        assert some == [replies[i] for i in order]
        assert some_markers == [markers[i] for i in order]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["thinks", "answers", "calls"])
def test_padding_plays_no_part(mode: ThinkingMode, name: str) -> None:
    plain = thinker()
    expected = reply(plain, name, mode)
    for left, right, value in ((0, 9, PAD), (0, 9, 77), (4, 2, 77)):
        model, prompt = thinker(), asked(name)
        ids = torch.nn.functional.pad(prompt["input_ids"], (left, right), value=value)
        mask = torch.nn.functional.pad(prompt["attention_mask"], (left, right), value=False)
        *tokens, _, _ = model.interact(ids, mask, temperature=0.0, thinking_mode=mode)
        assert tokens == expected
        assert torch.equal(model.memory, plain.memory)


# ---- what memory holds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["thinks", "answers", "calls", "tool"])
def test_memory_holds_the_whole_interaction_thoughts_and_all(name: str, mode: ThinkingMode) -> None:
    model, (prompt, _) = thinker(), hybrid(name)
    model.init_stm_state(**model.tokenize_system_prompt("Tom has a red hat."))
    before = model.export_stm_state()
    ids = reply(model, name, mode)
    marker = {"fast": ANSWER, "extended": THINK, "auto": MARKERS[name]}[mode]
    with torch.no_grad():
        written = model.model.write(before, torch.tensor([[*prompt, marker, *ids]]))
    assert torch.equal(model.export_stm_state(), written)


def test_a_taught_reply_leaves_in_memory_what_training_would() -> None:
    for name in HYBRID:
        model, (prompt, taught) = thinker(), hybrid(name)
        before = model.export_stm_state()
        reply(model, name, "auto")
        with torch.no_grad():
            assert torch.equal(model.export_stm_state(), model.model.write(before, torch.tensor([[*prompt, *taught]])))


# ---- what cannot be


def turns(model: RxTAlpha, encoded: Encoded, **options: Any) -> list[Callable[[], object]]:
    """The same turn in its three forms."""
    return [
        lambda: list(model.interact(**encoded, **options)),
        lambda: list(model.batch_interact(**encoded, **options)),
        lambda: model.batch_interactions(**encoded, **options),
    ]


def test_an_unknown_mode_names_the_known_and_loses_nothing() -> None:
    model = thinker()
    before = model.export_stm_state()
    for take in turns(model, asked("thinks"), thinking_mode="slow"):
        with pytest.raises(DataError, match="thinking mode 'slow': one of fast, extended, auto"):
            take()
    assert torch.equal(model.export_stm_state(), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_leaves_no_room_is_refused_in_every_mode(mode: ThinkingMode) -> None:
    model = thinker()
    length = asked("thinks")["input_ids"].shape[1] + 1
    assert len(reply(model, "thinks", mode, max_seq_len=length + 1)) == 1
    before = model.export_stm_state()
    full = {"input_ids": torch.tensor([[BOS, QUERY, *[20] * 61]]), "attention_mask": torch.ones(1, 63)}
    for encoded, window, size in ((asked("thinks"), length, length), (full, None, 64)):
        for take in turns(model, encoded, max_seq_len=window, thinking_mode=mode):  # type: ignore[arg-type]
            with pytest.raises(DataError, match=f"a prompt of {size} tokens leaves no room for an answer in a window"):
                take()
    assert torch.equal(model.export_stm_state(), before)


def test_logits_that_are_not_finite_choose_nothing_and_lose_nothing() -> None:
    model = thinker()
    before = model.export_stm_state()
    model.model.decoder.head.weight.data[40, 3] = torch.nan
    for take in turns(model, asked("thinks"), thinking_mode="auto"):
        with pytest.raises(ModelError, match="row 0: the logits of the marker are not finite"):
            take()
    assert torch.equal(model.export_stm_state(), before)


# ---- which words are thoughts


def test_thoughts_answer_and_tool_call_are_told_apart() -> None:
    model = thinker()
    assert read(model, "thinks", "auto") == {"thoughts": "a red hat, cake", "answer": "Tom has cake."}
    model.reset_stm_state()
    assert read(model, "answers", "auto") == {"answer": "red hat."}
    model.reset_stm_state()
    assert read(model, "calls", "auto") == {"thoughts": "What plays", "tool_call": "lake cake"}
    model.reset_stm_state()
    assert list(read(model, "thinks", "fast")) == ["answer"], "each turn begins anew with its own marker"


def test_each_conversation_of_a_batch_can_be_read_by_its_own_marker() -> None:
    names = ["thinks", "answers", "calls"]
    replies, markers, _ = batch_of(names, "auto")
    found = []
    for ids, marker in zip(replies, markers, strict=True):
        stream = ReplyStream(word_tokenizer(), marker)
        pieces = [*map(stream.push, ids), stream.end()]
        found.append({part: "".join(p.text for p in pieces if p.part == part) for part in {p.part for p in pieces}})
    assert found == [
        {"thoughts": "a red hat, cake", "answer": "Tom has cake."},
        {"answer": "red hat."},
        {"thoughts": "What plays", "tool_call": "lake cake"},
    ]


def test_signals_have_no_text_but_what_the_reply_left_over() -> None:
    model, cat = alpha(), word_tokenizer().encode("🐈")
    assert [model.read_token(token) for token in cat[:-1]] == [ReplyPiece("answer", "")] * (len(cat) - 1)
    left = model.read_token(STARTED)
    assert left.part == "answer"
    assert set(left.text) == {"\ufffd"}
    assert model.read_token(DONE) == ReplyPiece("answer", "")


def test_another_tokenizer_reads_anew() -> None:
    model, cat = alpha(), word_tokenizer().encode("🐈")
    model.read_token(cat[0])
    model.set_tokenizer(word_tokenizer())
    assert "".join(model.read_token(token).text for token in cat) == "🐈"


def test_without_a_tokenizer_nothing_is_read() -> None:
    with pytest.raises(DataError, match="no tokenizer: use set_tokenizer"):
        RxTAlpha(alpha().model).read_token(20)

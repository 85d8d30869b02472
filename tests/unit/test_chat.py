"""Promises of `rxt chat`: each part of a reply on its own line, memory from turn to turn, bad input loses nothing."""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rxt_platform import RxTAlpha
from rxt_platform.cli import chat, guarded, rxt
from rxt_platform.data.batches import derive_seed
from rxt_platform.model.generation import ThinkingMode
from tests.unit.alphas import saved_alpha, thinker
from tests.unit.helpers import word_tokenizer

THINKS, ANSWERS, CALLS = "What has Tom?", "Hat?", "Tom plays?"
Chat = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that thinks before some answers."""
    return saved_alpha(tmp_path_factory.mktemp("model"), thinker())


@pytest.fixture
def talk(directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Chats until the messages end: the exit code, and the lines printed after the greeting (on an error, it alone)."""

    def run(*messages: str | bytes, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        lines = [line.encode() if isinstance(line, str) else line for line in messages]
        monkeypatch.setattr(
            "sys.stdin", io.TextIOWrapper(io.BytesIO(b"".join(line + b"\n" for line in lines)), "utf-8")
        )
        code = guarded(lambda: rxt(["chat", str(directory), *options], standalone_mode=False))
        printed = capsys.readouterr()
        return code, printed.out.replace("you   > ", "").splitlines()[2:] if code == 0 else printed.err.splitlines()

    return run


def test_the_modes_are_those_of_generation() -> None:
    (option,) = (option for option in chat.params if option.name == "thinking")
    assert tuple(option.type.choices) == get_args(ThinkingMode)  # type: ignore[attr-defined]
    assert option.default == "fast"


def written(lines: list[str]) -> list[str]:
    """The notes on memory writes."""
    return [line for line in lines if re.fullmatch(r" {8}\[memory written, changed by \d+%\]", line)]


def test_thoughts_and_answer_are_on_lines_of_their_own(talk: Chat) -> None:
    code, lines = talk(THINKS, options=("--thinking", "auto"))
    assert code == 0
    assert lines[:2] == ["[thinks] a red hat, cake", "model > Tom has cake."]
    assert lines[2:3] == written(lines)


def test_left_to_itself_the_model_thinks_where_it_sees_fit(talk: Chat) -> None:
    _, lines = talk(ANSWERS, "/reset", THINKS, options=("--thinking", "auto"))
    assert [line for line in lines if not line.startswith("  ")] == [
        "model > red hat.",
        "memory reset",
        "[thinks] a red hat, cake",
        "model > Tom has cake.",
        "",
    ]


def test_a_tool_call_is_on_a_line_of_its_own(talk: Chat) -> None:
    _, lines = talk(CALLS, options=("--thinking", "extended"))
    assert lines[:2] == ["[thinks] What plays", "[calls] lake cake"]
    assert len(written(lines)) == 1


@pytest.mark.parametrize("options", [(), ("--thinking", "fast")])
def test_a_fast_answer_shows_no_thoughts(talk: Chat, options: tuple[str, ...]) -> None:
    _, lines = talk(ANSWERS, THINKS, options=options)
    assert lines[0] == "model > red hat."
    assert lines[2].startswith("model > ")
    assert not any("[thinks]" in line for line in lines)
    assert len(written(lines)) == 2


def test_a_message_may_be_a_tool_s_result(talk: Chat) -> None:
    assert talk(f"/tool {ANSWERS}")[1][0] == "model > Tom has a red hat."
    hot = ("--temperature", "5")  # any difference would show
    assert talk(f"/tool   {ANSWERS}  ", options=hot) == talk(f"/tool {ANSWERS}", options=hot)
    assert talk(ANSWERS)[1][0] == "model > red hat."
    assert len(written(talk(f"/tools {ANSWERS}")[1])) == 1, "an ordinary message, with a slash in front"


def test_a_system_prompt_is_in_memory_from_the_start_and_again_after_a_reset(talk: Chat) -> None:
    system = ("--system", "Lily likes cake.")
    without = talk(THINKS, "/reset", THINKS)[1]
    lines = talk(THINKS, "/reset", THINKS, options=system)[1]
    assert written(lines)[0] == written(lines)[1]
    assert written(without)[0] == written(without)[1]
    assert written(lines)[0] != written(without)[0]
    model = thinker()
    model.reset_stm_state([0])
    model.init_stm_state(**model.tokenize_system_prompt("Lily likes cake."))
    before = model.export_stm_state()
    list(model.interact(**model.tokenize_query(THINKS), temperature=0.0))
    change = float((model.memory - before).norm() / before.norm())
    assert written(lines)[0] == f"        [memory written, changed by {change:.0%}]"


@pytest.mark.parametrize("mode", get_args(ThinkingMode))
def test_bad_messages_are_named_and_the_conversation_goes_on(talk: Chat, mode: str) -> None:
    options = ("--thinking", mode, "--temperature", "1.5")
    _, whole = talk(THINKS, CALLS, options=options)
    long = "Tom has a red hat. " * 9
    size = len(word_tokenizer().encode(long.strip()))
    _, lines = talk(THINKS, long, f"/tool {long}", "/tool", "/tool  ", b"Tom \xff.", "", CALLS, options=options)
    refused = [line for line in lines if line.startswith("[not answered")]
    assert refused == [
        f"[not answered: query of {size} tokens leaves no room for an answer in a window of 64: shorten it, or ask for "
        "truncation]",
        f"[not answered: tool result of {size} tokens leaves no room for an answer in a window of 64: shorten it, or "
        "ask for truncation]",
        "[not answered: empty tool result: there is nothing to answer]",
        "[not answered: empty tool result: there is nothing to answer]",
        "[not answered: character 5 of the text is no Unicode character: surrogates not allowed]",
    ]
    assert [line for line in lines if line not in refused] == whole, "memory, seeds and all"


def test_every_answer_draws_from_a_seed_of_its_own_and_after_a_reset_from_the_first(
    talk: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, interact = [], RxTAlpha.interact

    def noting(*arguments: Any, seed: int, **options: Any) -> Iterator[int]:
        seeds.append(seed)
        yield from interact(*arguments, seed=seed, **options)

    monkeypatch.setattr(RxTAlpha, "interact", noting)
    talk(ANSWERS, "Tom has a red hat. " * 9, THINKS, "/reset", ANSWERS, options=("--seed", "7"))
    assert seeds == [derive_seed(7, 0), derive_seed(7, 1), derive_seed(7, 0)]


def test_a_command_that_is_none_is_named_and_not_answered(talk: Chat) -> None:
    hot = ("--temperature", "5")  # any difference in the seed would show
    code, lines = talk("/rest", THINKS, options=hot)
    assert code == 0
    assert lines[0] == "[no such command: /rest; there are /tool TEXT, /reset, /quit]"
    assert lines[1:] == talk(THINKS, options=hot)[1]


def test_a_message_too_long_can_be_cut(talk: Chat) -> None:
    long = "Tom has a red hat. " * 9
    for message in (long, f"/tool {long}"):
        _, lines = talk(message, options=("--truncate",))
        assert len(written(lines)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--system", " "), "error: empty system prompt: leave it out, or say something in it"),
        (("--system", "Tom has a red hat. " * 9), "the window holds 64, shorten it"),
        (("--thinking", "slow"), "'slow' is not one of 'fast', 'extended', 'auto'"),
    ],
)
def test_an_option_that_cannot_be_ends_before_the_first_message(
    talk: Chat, options: tuple[str, ...], message: str
) -> None:
    code, lines = talk(THINKS, options=options)
    assert code == 2
    assert message in lines[-1]

"""Promises of what counts as recalled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rxt_platform.data.recall import matches
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.story_world import TASKS, StoryWorld
from rxt_platform.data.tokenizer import ANSWER, CALL, EOS, THINK, answer_ids, assemble, interaction_texts
from rxt_platform.evaluation.conversations import hold_conversations
from rxt_platform.evaluation.responders import Turns
from tests.unit.evaluations import WINDOW, Listener, talks_of
from tests.unit.helpers import word_tokenizer

REFERENCE = "Tom has a kite and he lives near the river."


@pytest.mark.parametrize(
    ("answer", "spans", "right"),
    [
        ("Tom has a kite and he lives near the river.", ("kite", "river"), True),
        ("near the RIVER, with a kite", ("kite", "river"), True),  # in any order, with any case and punctuation
        ("Tom has a kite and he lives near the hill.", ("kite", "river"), False),
        ("Tom lives near the river.", ("kite", "river"), False),
        ("Tom has a kite.", ("kite",), True),
        ("Tom has two kites.", ("kite",), False),  # whole words only
        ("Kate lives near the river.", ("Mia", "river"), False),
        ("tom has a kite, and he lives near the river", None, True),
        ("Tom has a kite.", None, False),
        ("", ("!!!",), False),  # what has no words must be there as it is
        ("A hat 🎩!", ("🎩",), True),
        ("A hat!", ("🎩",), False),
        ("我住在东京。", ("东京",), True),  # no spaces between words
        ("我住在北京。", ("东京",), False),
        ("서울에 살아요.", ("서울",), True),
        ("Tom 住在东京。", ("Tom 北京",), False),
        ("At the Cafe\u0301.", ("Café",), True),  # one letter, or a letter and an accent
    ],
)
def test_an_answer_is_right_if_it_holds_every_asked_fact(
    answer: str, spans: tuple[str, ...] | None, right: bool
) -> None:
    assert matches(answer, REFERENCE, spans) == right


def test_an_answer_without_words_is_compared_as_it_is() -> None:
    assert matches(" 👍 ", "👍", None)
    assert not matches("", "👍", None)
    assert not matches("👎", "👍", None)


def test_the_reference_answer_is_right_for_every_task() -> None:
    for talk in StoryWorld(0).conversations("train", 200, 8, TASKS):
        for turn in talk.interactions:
            if turn.recall:
                assert matches(turn.answer, turn.answer, turn.recall.spans)


def test_a_hybrid_reply_may_think_as_long_as_its_reference_and_is_judged_by_what_it_says() -> None:
    thought = "Tom told me that he has a kite and that he likes it very much."
    turns = (
        Interaction("Tom has a kite.", "Good.", hybrid=True),
        Interaction("What has Tom?", "Tom has a kite.", hybrid=True, think=thought),
        Interaction("Fly it.", "", hybrid=True, tool_call="fly kite"),
    )
    tokenizer = word_tokenizer()
    replies = [assemble(turn, tokenizer.encode_all(interaction_texts(turn)), WINDOW) for turn in turns]

    class Hybrid(Listener):
        """Says the whole reference reply of as many turns as it was told."""

        def stream(self, prompts: Any, state: Turns, limits: Sequence[int], options: Any = None) -> Any:
            (told,), (limit,) = state, limits
            ids = replies[len(told)]
            return ([token] for token in ids.ids[ids.answer_start :][:limit])

    talks = talks_of(Conversation(turns))
    outcomes = hold_conversations(Hybrid(lambda *_: ""), tokenizer, talks, 0)
    assert [one.answer for one in outcomes] == ["Good.", "Tom has a kite.", "fly kite"]
    assert [one.question and one.question.right for one in outcomes] == [None, True, True]


def test_what_a_reply_says_is_its_answer_else_its_tool_call() -> None:
    assert answer_ids([20, 21, EOS]) == [20, 21]
    assert answer_ids([THINK, 20, ANSWER, 21, 22, CALL, 23, EOS]) == [21, 22]
    assert answer_ids([THINK, 20, CALL, 23, EOS]) == [23]
    assert answer_ids([THINK, 20]) == [20]
    assert answer_ids([]) == []

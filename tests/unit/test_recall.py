"""Promises of what counts as recalled, and of recall broken down by distance and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from rxt_platform.data.rows import Conversation, Interaction, Recall
from rxt_platform.data.story_world import TASKS, StoryWorld
from rxt_platform.data.tokenizer import ANSWER, CALL, EOS, THINK, answer_ids, assemble, interaction_texts
from rxt_platform.evaluation import conversations
from rxt_platform.evaluation.conversations import evaluate_conversations
from rxt_platform.evaluation.recall import matches, mean_recall, recall_of
from tests.unit.helpers import tiny_config, tiny_model, word_tokenizer

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
    ],
)
def test_an_answer_is_right_if_it_holds_every_asked_fact(
    answer: str, spans: tuple[str, ...] | None, right: bool
) -> None:
    assert matches(answer, REFERENCE, spans) == right


def test_the_reference_answer_is_right_for_every_task() -> None:
    for talk in StoryWorld(0).conversations("train", 200, 8, TASKS):
        for turn in talk.interactions:
            if turn.recall:
                assert matches(turn.answer, turn.answer, turn.recall.spans)


def test_recall_is_broken_down_by_distance_and_by_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a trained model: it answers like the reference whatever is an update, and from memory only."""
    talks = StoryWorld(0).conversations("validation", 6, 5, ("recall", "update"))
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(vocab_size=tokenizer.vocab_size, max_length=128))
    asked = [turn for talk in talks for turn in talk.interactions if turn.recall]
    known = {
        tuple(tokenizer.encode_query(turn.query)): turn.answer
        for turn in asked
        if turn.recall and turn.recall.task == "update"
    }
    calls: list[Tensor] = []

    def answers(_: Any, prompts: Sequence[list[int]], memory: Tensor, *rest: Any, **options: Any) -> list[list[int]]:
        calls.append(memory)
        written = len(calls) % 2 == 1  # asked first with the memory, then with the initial one
        return [tokenizer.encode(known.get(tuple(prompt), "No.") if written else "No.") for prompt in prompts]

    monkeypatch.setattr(conversations, "answer_batch", answers)
    result = evaluate_conversations(model, tokenizer, talks)
    tasks = [turn.recall.task for turn in asked if turn.recall]
    assert result.recall_by_task == {
        "recall": recall_of([(False, False)] * tasks.count("recall")),
        "update": recall_of([(True, False)] * tasks.count("update")),
    }
    assert tasks.count("recall")
    assert tasks.count("update")
    assert mean_recall(result.recall) == pytest.approx(mean_recall(result.recall_by_task))
    assert {int(distance) for distance in result.recall} == {turn.recall.distance for turn in asked if turn.recall}


def test_rows_without_answer_keys_have_no_tasks() -> None:
    turns = (
        Interaction("Tom has a kite.", "Good."),
        Interaction("What has Tom?", "Tom has a kite.", Recall(("kite",), 1, False)),
    )
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(vocab_size=tokenizer.vocab_size, max_length=64))
    keyed = evaluate_conversations(model, tokenizer, [Conversation(turns)])
    assert set(keyed.recall_by_task) == {"recall"}
    bare = Conversation(tuple(replace(turn, recall=None) for turn in turns))
    result = evaluate_conversations(model, tokenizer, [bare])
    assert set(result.recall) == {"1"}
    assert result.recall_by_task == {}


def test_a_hybrid_reply_may_think_as_long_as_its_reference_and_is_judged_by_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thought = "Tom told me that he has a kite and that he likes it very much."
    turns = (
        Interaction("Tom has a kite.", "Good.", hybrid=True),
        Interaction("What has Tom?", "Tom has a kite.", hybrid=True, think=thought),
        Interaction("Fly it.", "", hybrid=True, tool_call="fly kite"),
    )
    tokenizer = word_tokenizer()
    model = tiny_model(tiny_config(vocab_size=tokenizer.vocab_size, max_length=96))
    replies = [assemble(turn, tokenizer.encode_all(interaction_texts(turn)), 96) for turn in turns[1:]]
    said = iter([reply for reply in replies for _ in range(2)])  # with the memory, and with it reset

    def answers(*_: Any, limits: list[int], **options: Any) -> list[list[int]]:
        ids = next(said)
        reply = list(ids.ids[ids.answer_start :])
        return [reply[: limits[0]]]

    monkeypatch.setattr(conversations, "answer_batch", answers)
    result = evaluate_conversations(model, tokenizer, [Conversation(turns)])
    assert result.recall == {"1": recall_of([(True, True)]), "2": recall_of([(True, True)])}


def test_what_a_reply_says_is_its_answer_else_its_tool_call() -> None:
    assert answer_ids([20, 21, EOS]) == [20, 21]
    assert answer_ids([THINK, 20, ANSWER, 21, 22, CALL, 23, EOS]) == [21, 22]
    assert answer_ids([THINK, 20, CALL, 23, EOS]) == [23]
    assert answer_ids([THINK, 20]) == [20]
    assert answer_ids([]) == []

"""Promises of row kinds: every row comes back as it was written, and a bad one is named by its column."""

import json
from dataclasses import replace
from typing import Any

import pytest

from rxt_platform.data.rows import (
    Conversation,
    Interaction,
    PreferenceEpisode,
    PreferenceTurn,
    Recall,
    Row,
    RowError,
    RowKind,
    guess_kind,
    parse_row,
    row_to_json,
)
from tests.unit.data_files import talk, talk_row, turn

KEY = {"answer_span": "answer 2", "distance": 1, "long_range": False}
HYBRID = Interaction("Where is Tom?", "By the lake.", hybrid=True, internal="Be short.", think="Lake.", tool_call="f()")
REJECTED = replace(HYBRID, answer="No.", think=None, tool_call=None)
NEUTRAL = replace(HYBRID, answer="", think=None)
CALL = Interaction("12 degrees", "", hybrid=True, from_tool=True, tool_call="weather(city='Łódź')")
BARE = Interaction("Hello?", "Hi.", hybrid=True)
ODD = "line\nbreak\ttab \u2028 \u0085 zażółć 🐈‍⬛ \ufeff \"quoted\" \\ {'a': 1} </s> [A]"


def as_written(row: Row) -> Any:
    """The row's object after a way through a JSON file."""
    return json.loads(json.dumps(row_to_json(row)))


def reply(**parts: str | None) -> dict[str, str | None]:
    return {"think": None, "answer": "fine", "tool_call": None, **parts}


def preference_row(**changes: Any) -> dict[str, Any]:
    return {"interactions": [{"query": "Well?", "accepted": reply(), "rejected": reply(), **changes}]}


# ---- what was written is read again


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("text", "Once upon a time."),
        ("text", ODD),
        ("interaction", talk(1)),
        ("interaction", Conversation((Interaction(ODD, ODD),))),
        ("conversation", talk(1)),
        ("conversation", talk(1, 2, 3)),
        ("conversation", Conversation((*talk(1).interactions, Interaction("q", "a cat", Recall(("cat",), 1, False))))),
        (
            "conversation",
            Conversation(
                (*talk(1, 2).interactions, Interaction("q", "a cat, b", Recall(("cat", "b"), 2, True, "sum")))
            ),
        ),
        ("conversation", Conversation(talk(1, 2).interactions, system="Be kind.")),
        ("hybrid", Conversation((HYBRID,), system="Be kind.")),
        ("hybrid", Conversation((HYBRID,))),
        ("hybrid", Conversation((BARE, CALL, HYBRID))),
        (
            "hybrid",
            Conversation((BARE, Interaction("q", "the lake", Recall(("lake",), 1, False), hybrid=True, think="hm"))),
        ),
        ("preference", PreferenceEpisode((PreferenceTurn(HYBRID, REJECTED, NEUTRAL), PreferenceTurn(CALL, CALL)))),
    ],
)
def test_every_row_comes_back_from_its_json(kind: RowKind, row: Row) -> None:
    assert parse_row(kind, as_written(row)) == row


def test_written_conversations_have_the_published_columns() -> None:
    assert as_written("A text.") == {"text": "A text."}
    assert as_written(talk(1, 2)) == talk_row(1, 2)
    question = Interaction("question 2", "answer 2", Recall(("answer 2",), 1, False))
    assert as_written(Conversation((*talk(1).interactions, question)))["interactions"] == [
        turn(2, **KEY, task="recall")
    ]
    parts = ("query", "internal", "think", "answer", "tool_call")
    assert {key: as_written(Conversation((HYBRID,)))[key] for key in parts} == {
        "query": "Where is Tom?",
        "internal": "Be short.",
        "think": "Lake.",
        "answer": "By the lake.",
        "tool_call": "f()",
    }
    assert as_written(Conversation((CALL,)))["tool_use"] == "12 degrees"


def test_both_conversation_layouts_and_a_single_turn_are_read() -> None:
    assert parse_row("conversation", talk_row(1, 2, 3)) == talk(1, 2, 3)
    assert parse_row("conversation", {"interactions": [turn(1), turn(2), turn(3)]}) == talk(1, 2, 3)
    assert parse_row("conversation", turn(1)) == talk(1)
    assert parse_row("conversation", talk_row(1)) == talk(1), "an empty list of follow-ups"


def test_columns_that_parquet_fills_with_null_are_absent() -> None:
    null_key = dict.fromkeys([*KEY, "task"])
    assert parse_row("conversation", {"query": None, "answer": None, "interactions": [turn(1, **null_key)]}) == talk(1)
    nulls = dict.fromkeys(["tool_use", "internal", "think", "tool_call"])
    (plain,) = parse_row("hybrid", turn(1, **nulls, **null_key)).interactions  # type: ignore[union-attr]
    assert plain == Interaction("question 1", "answer 1", hybrid=True)
    assert parse_row("preference", preference_row(neutral=None)).turns[0].neutral is None  # type: ignore[union-attr]


def test_unknown_columns_are_ignored() -> None:
    more = {"subset": 3, "other": None, "rejected_by": [1], "\ud83d": "\ud83d"}
    assert parse_row("text", {"text": "A text.", **more}) == "A text."
    assert parse_row("conversation", {**talk_row(1, 2), **more}) == talk(1, 2)
    assert parse_row("conversation", {"interactions": [turn(1, **more)]}) == talk(1)


def test_a_hybrid_turn_says_from_where_the_query_comes_and_what_the_reply_is() -> None:
    row = {"tool_use": "ok", "answer": "done", "interactions": [{"query": "next", "think": "hm", "tool_call": "g()"}]}
    first, second = parse_row("hybrid", row).interactions  # type: ignore[union-attr]
    assert first == Interaction("ok", "done", hybrid=True, from_tool=True)
    assert second == Interaction("next", "", hybrid=True, think="hm", tool_call="g()")


def test_preference_turns_hold_what_was_accepted_rejected_and_neutral() -> None:
    episode = parse_row(
        "preference",
        preference_row(
            internal="Be kind.", accepted=reply(think="hm"), rejected=reply(answer="no"), neutral=reply(tool_call="g()")
        ),
    )
    assert isinstance(episode, PreferenceEpisode)
    (one,) = episode.turns
    assert one.accepted == Interaction("Well?", "fine", hybrid=True, internal="Be kind.", think="hm")
    assert one.rejected == Interaction("Well?", "no", hybrid=True, internal="Be kind.")
    assert one.neutral == Interaction("Well?", "fine", hybrid=True, internal="Be kind.", tool_call="g()")


# ---- a bad row is named by its column, with the reason

HALF = "half \ud83d"
BAD_TEXT: list[tuple[dict[str, Any], str]] = [
    ({}, "missing"),
    ({"text": None}, "null"),
    ({"text": 3}, "expected text, got int"),
    ({"text": True}, "expected text, got bool"),
    ({"text": ["a"]}, "expected text, got list"),
    ({"text": b"a"}, "expected text, got bytes"),
    ({"text": ""}, "empty"),
    ({"text": " \n\t\u00a0"}, "empty"),
    ({"text": HALF}, "half of a surrogate pair: not Unicode text"),
    ({"text": "ab\0c"}, "control character U+0000 at position 2"),
    ({"text": "\x1b[31mred"}, "control character U+001B at position 0"),
    ({"text": "a\x9f"}, "control character U+009F at position 1"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_TEXT)
def test_a_bad_text_is_named_with_the_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row("text", row)
    assert (caught.value.column, caught.value.reason) == ("text", reason)
    assert str(caught.value) == f"column 'text': {reason}"


@pytest.mark.parametrize("kind", ["interaction", "conversation", "hybrid"])
@pytest.mark.parametrize("column", ["query", "answer"])
@pytest.mark.parametrize(("bad", "reason"), [(row["text"], why) for row, why in BAD_TEXT[2:] if row["text"] != ""])
def test_every_text_of_an_interaction_is_checked(kind: RowKind, column: str, bad: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(kind, turn(1, **{column: bad}))
    assert (caught.value.column, caught.value.reason) == (column, reason)


@pytest.mark.parametrize(
    ("kind", "row", "column", "reason"),
    [
        ("text", ["a"], "", "expected an object, got list"),
        ("text", None, "", "null"),
        ("interaction", {"query": "q"}, "answer", "missing"),
        ("interaction", turn(1, query=None), "query", "null"),
        ("interaction", turn(1, answer=" "), "answer", "empty"),
        ("conversation", {}, "query", "missing"),
        ("conversation", {**talk_row(1, 2), "query": None}, "query", "null"),
        ("conversation", {"query": "q", "interactions": [turn(1)]}, "answer", "missing"),
        ("conversation", {"interactions": []}, "interactions", "empty"),
        ("conversation", turn(1, interactions=None), "interactions", "null"),
        ("conversation", turn(1, interactions="none"), "interactions", "expected a list, got str"),
        ("conversation", turn(1, interactions={"a": 1}), "interactions", "expected a list, got dict"),
        ("conversation", turn(1, interactions=[None]), "interactions[0]", "null"),
        ("conversation", turn(1, interactions=[turn(2), "q"]), "interactions[1]", "expected an object, got str"),
        ("conversation", turn(1, interactions=[turn(2), {"query": "q"}]), "interactions[1].answer", "missing"),
        ("conversation", turn(1, interactions=[turn(2, query=HALF)]), "interactions[0].query", BAD_TEXT[8][1]),
        ("hybrid", {"answer": "a"}, "query", "missing (or 'tool_use')"),
        ("hybrid", {"query": "q"}, "answer", "missing (or 'tool_call')"),
        ("hybrid", {"query": "q", "think": "hm"}, "answer", "missing (or 'tool_call')"),
        ("hybrid", turn(1, tool_use="r"), "query", "given together with 'tool_use'"),
        ("hybrid", turn(1, think=3), "think", "expected text, got int"),
        ("hybrid", turn(1, tool_call=" "), "tool_call", "empty"),
        ("hybrid", turn(1, interactions=[turn(2, internal=[])]), "interactions[0].internal", "expected text, got list"),
        ("preference", {}, "interactions", "missing"),
        ("preference", {"interactions": []}, "interactions", "empty"),
        ("preference", {"interactions": [None]}, "interactions[0]", "null"),
        ("preference", {"interactions": [{"query": "q", "accepted": reply()}]}, "interactions[0].rejected", "missing"),
        ("preference", preference_row(accepted=None), "interactions[0].accepted", "null"),
        ("preference", preference_row(neutral="n"), "interactions[0].neutral", "expected an object, got str"),
        ("preference", preference_row(rejected=reply(answer=3)), "interactions[0].rejected.answer", BAD_TEXT[2][1]),
        (
            "preference",
            preference_row(rejected=reply(answer=None)),
            "interactions[0].rejected.answer",
            "missing (or 'tool_call')",
        ),
        ("preference", preference_row(query=" "), "interactions[0].query", "empty"),
    ],
)
def test_a_bad_row_is_named_by_its_column(kind: RowKind, row: Any, column: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(kind, row)
    assert (caught.value.column, caught.value.reason) == (column, reason)
    assert str(caught.value) == (f"column '{column}': {reason}" if column else f"row: {reason}")


@pytest.mark.parametrize(
    ("key", "column", "reason"),
    [
        ({"distance": None}, "distance", "missing (answer_span, distance, long_range come together or not at all)"),
        ({"answer_span": "blue"}, "answer_span", "'blue' does not occur in the answer 'answer 2', as whole words"),
        (
            {"answer_span": ["answer", "blue"]},
            "answer_span",
            "'blue' does not occur in the answer 'answer 2', as whole words",
        ),
        (
            {"answer_span": "nswer"},
            "answer_span",
            "'nswer' does not occur in the answer 'answer 2', as whole words",
        ),
        ({"answer_span": []}, "answer_span", "empty"),
        ({"answer_span": 2}, "answer_span", "expected text, got int"),
        ({"distance": 0}, "distance", "expected at least 1, got 0"),
        ({"distance": 1.0}, "distance", "expected a whole number, got float"),
        ({"distance": True}, "distance", "expected a whole number, got bool"),
        ({"distance": 2}, "distance", "2 turns back is before the conversation starts"),
        ({"long_range": "yes"}, "long_range", "expected true or false, got str"),
        ({"long_range": True}, "long_range", "true, but distance 1 leaves no turn between telling and asking"),
        ({"task": 3}, "task", "expected text, got int"),
    ],
)
def test_an_answer_key_that_does_not_fit_its_answer_is_a_bad_row(key: dict[str, Any], column: str, reason: str) -> None:
    asked = turn(2, **{**KEY, **key})
    for row, where in ((turn(1, interactions=[asked]), 0), ({"interactions": [turn(1), asked]}, 1)):
        with pytest.raises(RowError) as caught:
            parse_row("conversation", row)
        assert (caught.value.column, caught.value.reason) == (f"interactions[{where}].{column}", reason)


def test_a_reason_quotes_no_more_than_the_beginning_of_a_long_text() -> None:
    long = "word " * 100_000
    with pytest.raises(RowError, match="does not occur in the answer 'word ") as caught:
        parse_row("conversation", turn(1, interactions=[turn(2, answer=long, **{**KEY, "answer_span": "x" * 5000})]))
    assert len(str(caught.value)) < 500


# ---- kinds


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"text"}, "text"),
        ({"text", "title"}, "text"),
        ({"query", "answer"}, "interaction"),
        ({"query", "answer", "text"}, "interaction"),
        ({"query", "answer", "interactions"}, "conversation"),
        ({"interactions", "query", "answer", "answer_span", "distance", "long_range"}, "conversation"),
        ({"query", "answer", "think"}, "hybrid"),
        ({"tool_use", "answer"}, "hybrid"),
        ({"interactions", "query", "answer", "tool_call"}, "hybrid"),
        ({"interactions", "query", "accepted", "rejected", "answer", "think"}, "preference"),
        ({"body"}, None),
        ({"query"}, None),
        (set(), None),
    ],
)
def test_the_kind_is_guessed_from_the_columns(columns: set[str], kind: RowKind | None) -> None:
    assert guess_kind(columns) == kind

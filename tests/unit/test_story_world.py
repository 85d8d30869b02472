"""Promises of the story world (the embedded data source) and of the row layouts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest

from rxt_platform.data.rows import (
    Conversation,
    Interaction,
    Recall,
    conversation_from_row,
    conversation_to_row,
    interaction_from_row,
    interaction_to_row,
)
from rxt_platform.data.story_world import (
    ATTRIBUTES,
    CHARACTERS,
    GREETINGS,
    MAX_TURNS,
    MIN_TURNS,
    SMALL_TALK,
    STORY_WORLD_VERSION,
    Fact,
    Split,
    StoryWorld,
    facts_of_split,
)

ATTRIBUTE_OF_VALUE = {value: name for name, attribute in ATTRIBUTES.items() for value in attribute.values}


def words(text: str) -> list[str]:
    return re.findall(r"'s|[A-Za-z]+", text)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!]) ", text)


def facts_in(text: str) -> set[Fact]:
    """Every fact in the text, told or asked: each sentence with a value word must name exactly one character."""
    facts = set()
    for sentence in sentences(text):
        values = [word for word in words(sentence) if word in ATTRIBUTE_OF_VALUE]
        names = {word for word in words(sentence) if word in CHARACTERS}
        assert not values or len(names) == 1, f"whose fact is it? {sentence!r}"
        facts |= {Fact(name, ATTRIBUTE_OF_VALUE[value], value) for value in values for name in names}
    return facts


def texts(split: Split, count: int) -> list[str]:
    """`count` rows of every kind, as text."""
    world = StoryWorld(seed=3)
    turns = [turn for turns in (4, 9) for row in world.conversations(split, count, turns) for turn in row.interactions]
    turns += world.interactions(split, count)
    return world.stories(split, count) + [f"{turn.query} {turn.answer}" for turn in turns]


def rows_as_text(world: StoryWorld, split: Split, count: int) -> list[str]:
    return [
        repr(row)
        for rows in (
            world.stories(split, count),
            world.interactions(split, count),
            world.conversations(split, count),
        )
        for row in rows
    ]


def test_same_seed_gives_the_same_rows_and_another_seed_or_split_others() -> None:
    assert rows_as_text(StoryWorld(1), "train", 50) == rows_as_text(StoryWorld(1), "train", 50)
    first = set(rows_as_text(StoryWorld(1), "train", 50))
    assert len(first & set(rows_as_text(StoryWorld(2), "train", 50))) < 15  # small talk repeats
    assert len(first & set(rows_as_text(StoryWorld(1), "validation", 50))) < 15


def test_rows_are_the_published_ones_of_this_version() -> None:
    """A change of any row, by an edit or by another Python or machine, must raise STORY_WORLD_VERSION."""
    text = "\n".join(rows_as_text(StoryWorld(0), "train", 200) + rows_as_text(StoryWorld(0), "validation", 200))
    assert (STORY_WORLD_VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, "808aaf6172c13261")


def test_a_row_does_not_depend_on_how_many_are_asked_for() -> None:
    world = StoryWorld(5)
    assert world.stories("train", 100)[:7] == world.stories("train", 7)
    assert world.interactions("train", 100)[:7] == world.interactions("train", 7)
    assert world.conversations("train", 100, 6)[:7] == world.conversations("train", 7, 6)


def test_values_are_divided_between_the_splits_and_each_is_equally_common_in_both() -> None:
    assert len(ATTRIBUTE_OF_VALUE) == 72
    assert len(set(CHARACTERS)) == 32
    for name, attribute in ATTRIBUTES.items():
        counts: Counter[str] = Counter()
        for character in CHARACTERS:
            train = facts_of_split(character, name, "train")
            validation = facts_of_split(character, name, "validation")
            assert sorted(train + validation) == sorted(attribute.values)
            assert len(train) == 9
            assert len(validation) == 3
            counts.update(validation)
        assert set(counts.values()) == {8}
        assert len(counts) == 12


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_fact_in_any_row_belongs_to_the_rows_split(split: Split) -> None:
    found = {fact for text in texts(split, 700) for fact in facts_in(text)}
    assert len(found) > 450  # of 576 in validation: the scan sees the facts
    for fact in found:
        assert fact.value in facts_of_split(fact.character, fact.attribute, split), fact


@pytest.mark.parametrize("turns", [MIN_TURNS, 4, 7, MAX_TURNS])
def test_answer_key_names_the_turn_that_told_the_fact(turns: int) -> None:
    for conversation in StoryWorld(0).conversations("train", 300, turns):
        rows = conversation.interactions
        told: dict[Fact, int] = {}
        asked: set[Fact] = set()
        about: list[set[str]] = []
        assert len(rows) == turns
        assert any(row.recall for row in rows)
        for turn, row in enumerate(rows):
            facts = facts_in(f"{row.query} {row.answer}")
            about.append({fact.character for fact in facts})
            if row.recall is None:
                assert not any((f.character, f.attribute) == (t.character, t.attribute) for f in facts for t in told)
                told |= dict.fromkeys(facts, turn)
                continue
            (fact,) = facts
            assert row.recall.span == fact.value
            assert fact.value in words(row.answer)
            assert fact.value not in row.query
            assert fact not in asked
            asked.add(fact)
            since = told[fact]
            assert row.recall.distance == turn - since
            between = about[since + 1 : turn]
            assert row.recall.long_range == (bool(between) and all(fact.character not in names for names in between))
        assert 0 in told.values()


def test_distances_are_balanced_in_conversations_of_four_turns() -> None:
    conversations = StoryWorld(0).conversations("train", 2000)
    recalls = [turn.recall for row in conversations for turn in row.interactions if turn.recall]
    counts = Counter(recall.distance for recall in recalls)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) >= 0.2 * len(recalls)
    assert len(recalls) >= 0.5 * 3 * len(conversations)
    assert sum(recall.long_range for recall in recalls) >= 0.15 * len(recalls)


def test_two_characters_share_an_attribute_often_enough_that_binding_matters() -> None:
    pairs = shared = 0
    for conversation in StoryWorld(0).conversations("train", 1500):
        facts = {fact for turn in conversation.interactions for fact in facts_in(f"{turn.query} {turn.answer}")}
        if len({fact.character for fact in facts}) == 2:
            pairs += 1
            shared += len({fact.attribute for fact in facts}) < len(facts)
            assert len({fact.value for fact in facts}) == len(facts)
    assert pairs > 500
    assert 0.2 < shared / pairs < 0.32


def test_vocabulary_is_small() -> None:
    world = StoryWorld(0)
    turns = [turn for row in world.conversations("train", 1000) for turn in row.interactions]
    text = world.stories("train", 2000) + [f"{turn.query} {turn.answer}" for turn in turns]
    assert len({word for line in text for word in words(line)}) <= 400


def test_stories_and_turns_are_short() -> None:
    world = StoryWorld(0)
    for story in world.stories("train", 1000):
        assert 25 <= len(story.split()) <= 60
        assert 4 <= len(sentences(story)) <= 7
        assert 2 <= len(facts_in(story)) <= 3
    for conversation in world.conversations("train", 1000, 8):
        assert all(len(f"{turn.query} {turn.answer}".split()) <= 24 for turn in conversation.interactions)


def test_single_interactions_are_mixed_as_stated_and_answer_from_their_own_query() -> None:
    kinds: Counter[str] = Counter()
    for row in StoryWorld(0).interactions("train", 3000):
        assert row.recall is None
        facts = facts_in(row.query)
        if row.query.startswith("Tell me a story"):
            kinds["story"] += 1
            assert facts_in(row.answer) == facts
            assert len(facts) == 1
        elif not facts:
            kinds["talk"] += 1
            assert (row.query, row.answer) in GREETINGS + SMALL_TALK
        elif row.query.endswith("?"):
            kinds["question"] += 1
            (answer,) = facts_in(row.answer)
            assert answer in facts
            assert answer.character in sentences(row.query)[-1]
        else:
            kinds["tell"] += 1
            assert not facts_in(row.answer)
    for kind, share in {"question": 0.5, "story": 0.2, "tell": 0.2, "talk": 0.1}.items():
        assert abs(kinds[kind] / 3000 - share) < 0.03, kinds


def test_impossible_requests_say_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"turns must be 2\.\.16, got 17"):
        StoryWorld(0).conversations("train", 1, turns=17)
    with pytest.raises(ValueError, match="unknown split 'test'; use one of train, validation"):
        StoryWorld(0).stories("test", 1)  # type: ignore[arg-type]


def test_rows_survive_json() -> None:
    world = StoryWorld(0)
    for conversation in world.conversations("train", 200, 5):
        row = json.loads(json.dumps(conversation_to_row(conversation)))
        assert set(row) == {"query", "answer", "interactions"}
        assert len(row["interactions"]) == 4
        assert conversation_from_row({**row, "subset": "short"}) == conversation
        listed = [interaction_to_row(turn) for turn in conversation.interactions]
        assert conversation_from_row({"interactions": listed}) == conversation
    single = world.interactions("train", 1)[0]
    assert conversation_from_row(interaction_to_row(single)) == Conversation((single,))
    question = Interaction("Where?", "Near the hill.", Recall("hill", 2, True))
    assert interaction_from_row(interaction_to_row(question)) == question


def test_null_answer_key_columns_as_parquet_writes_them_mean_no_answer_key() -> None:
    row = {"query": "Hello.", "answer": "Hello.", "answer_span": None, "distance": None, "long_range": None}
    assert interaction_from_row(row).recall is None


TURN = {"query": "Hello.", "answer": "Hello."}
KEY = {"answer_span": "Hello", "distance": 1, "long_range": False}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TURN, "interactions": [TURN, TURN, {"query": "Hi."}]}, "column 'interactions[2].answer': missing"),
        ({**TURN, "interactions": [{**TURN, "query": 3}]}, "column 'interactions[0].query': expected text, got int"),
        ({**TURN, "answer": " \n"}, "column 'answer': empty"),
        ({**TURN, "answer": None}, "column 'answer': null"),
        ({"answer": "Hello."}, "column 'query': missing"),
        ({}, "column 'query': missing"),
        ([TURN], "row: expected an object, got list"),
        ({"interactions": []}, "column 'interactions': empty"),
        ({**TURN, "interactions": None}, "column 'interactions': null"),
        ({**TURN, "interactions": "Hello."}, "column 'interactions': expected a list, got str"),
        ({**TURN, "interactions": [None]}, "column 'interactions[0]': null"),
        ({**TURN, "interactions": ["Hello."]}, "column 'interactions[0]': expected an object, got str"),
        ({**TURN, "interactions": [{**TURN, "distance": 1}]}, "column 'interactions[0].answer_span': missing (answer_"),
        (
            {"interactions": [TURN, {**TURN, **KEY, "answer_span": "hat"}]},
            "column 'interactions[1].answer_span': 'hat' does not occur in the answer 'Hello.'",
        ),
        (
            {"interactions": [TURN, {**TURN, **KEY, "distance": "1"}]},
            "column 'interactions[1].distance': expected a whole number, got str",
        ),
        (
            {"interactions": [TURN, {**TURN, **KEY, "distance": 0}]},
            "column 'interactions[1].distance': expected at least 1, got 0",
        ),
        (
            {"interactions": [TURN, {**TURN, **KEY, "distance": 2}]},
            "column 'interactions[1].distance': 2 turns back is before the conversation starts",
        ),
        (
            {"interactions": [TURN, {**TURN, **KEY, "long_range": 1}]},
            "column 'interactions[1].long_range': expected true or false, got int",
        ),
        (
            {"interactions": [TURN, {**TURN, **KEY, "long_range": True}]},
            "column 'interactions[1].long_range': true, but distance 1 leaves no turn between",
        ),
    ],
)
def test_a_bad_row_names_its_column(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        conversation_from_row(row)

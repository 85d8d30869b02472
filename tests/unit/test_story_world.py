"""Promises of the story world (the embedded data source) and of the row layouts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
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
from rxt_platform.data.story_tasks import MAX_TURNS, MIN_TURNS
from rxt_platform.data.story_words import (
    ALL_KNOWN,
    ATTRIBUTES,
    CHARACTERS,
    GREETINGS,
    SMALL_TALK,
    Dice,
    Fact,
    answers_joined,
    facts_of_split,
    questions_joined,
)
from rxt_platform.data.story_world import STORY_WORLD_VERSION, TASKS, Split, StoryWorld, Task

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
    turns += [turn for row in world.conversations(split, count, 9, TASKS) for turn in row.interactions]
    turns += world.interactions(split, count)
    return world.stories(split, count) + [f"{turn.query} {turn.answer}" for turn in turns]


def turn_as_text(turn: Interaction) -> str:
    """A form that stays the same when the row classes get new fields."""
    key = turn.recall
    shown = key and f"Recall(span={key.spans[0]!r}, distance={key.distance}, long_range={key.long_range})"
    return f"Interaction(query={turn.query!r}, answer={turn.answer!r}, recall={shown})"


def rows_as_text(world: StoryWorld, split: Split, count: int) -> list[str]:
    rows = [repr(story) for story in world.stories(split, count)]
    rows += [turn_as_text(turn) for turn in world.interactions(split, count)]
    for row in world.conversations(split, count):
        rows.append(f"Conversation(interactions=({', '.join(map(turn_as_text, row.interactions))}))")
    return rows


def questions(conversations: list[Conversation]) -> list[Recall]:
    return [turn.recall for row in conversations for turn in row.interactions if turn.recall]


def test_same_seed_gives_the_same_rows_and_another_seed_or_split_others() -> None:
    assert rows_as_text(StoryWorld(1), "train", 50) == rows_as_text(StoryWorld(1), "train", 50)
    first = set(rows_as_text(StoryWorld(1), "train", 50))
    assert len(first & set(rows_as_text(StoryWorld(2), "train", 50))) < 15  # small talk repeats
    assert len(first & set(rows_as_text(StoryWorld(1), "validation", 50))) < 15


def test_rows_are_the_published_ones_of_this_version() -> None:
    """A change of any row, by an edit or by another Python or machine, must raise STORY_WORLD_VERSION."""
    text = "\n".join(rows_as_text(StoryWorld(0), "train", 200) + rows_as_text(StoryWorld(0), "validation", 200))
    assert (STORY_WORLD_VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, "808aaf6172c13261")
    long = [turn for row in StoryWorld(0).conversations("train", 50, 16) for turn in row.interactions]
    assert hashlib.sha256("\n".join(map(turn_as_text, long)).encode()).hexdigest()[:16] == "1cc40cb86ea1b9a0"
    mixed = [row for turns in (4, 18) for row in StoryWorld(0).conversations("train", 100, turns, TASKS)]
    text = "\n".join(json.dumps(conversation_to_row(row)) for row in mixed)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1bff5c59c5ddbcc9"


def test_a_row_does_not_depend_on_how_many_are_asked_for() -> None:
    world = StoryWorld(5)
    assert world.stories("train", 100)[:7] == world.stories("train", 7)
    assert world.interactions("train", 100)[:7] == world.interactions("train", 7)
    assert world.conversations("train", 100, 6)[:7] == world.conversations("train", 7, 6)
    assert world.conversations("train", 100, 6, TASKS)[:7] == world.conversations("train", 7, 6, TASKS)


def test_order_of_the_tasks_does_not_matter_and_recall_alone_is_the_default() -> None:
    world = StoryWorld(5)
    assert world.conversations("train", 20, 6, ("update", "recall")) == world.conversations(
        "train", 20, 6, ["recall", "update", "recall"]
    )
    assert world.conversations("train", 20, 6, ("recall",)) == world.conversations("train", 20, 6)


def test_thousands_of_stories_are_distinct() -> None:
    stories = StoryWorld(0).stories("train", 10_000)
    assert len(set(stories)) >= 9_900


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
            assert row.recall.spans == (fact.value,)
            assert row.recall.task == "recall"
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
    recalls = questions(conversations)
    counts = Counter(recall.distance for recall in recalls)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) >= 0.2 * len(recalls)
    assert len(recalls) >= 0.5 * 3 * len(conversations)
    assert sum(recall.long_range for recall in recalls) >= 0.15 * len(recalls)


@pytest.mark.parametrize("tasks", [("recall",), TASKS])
def test_every_distance_up_to_16_occurs_in_conversations_of_18_turns(tasks: tuple[Task, ...]) -> None:
    counts = Counter(recall.distance for recall in questions(StoryWorld(0).conversations("train", 2000, 18, tasks)))
    assert all(counts[distance] >= 20 for distance in range(1, 17)), counts


@dataclass
class Ledger:
    """What a reader of a conversation's text knows after some turns; keeps no account of how it was made."""

    facts: dict[tuple[str, str], list[tuple[str, int]]] = field(default_factory=dict)  # (value, turn), newest last
    friends: dict[str, tuple[str, int]] = field(default_factory=dict)
    about: list[set[str]] = field(default_factory=list)

    def read(self, turn: int, text: str) -> None:
        for sentence in sentences(text):
            friends = re.fullmatch(r"(?:The best friend of (\w+)|(\w+)'s best friend) is (\w+)\.", sentence)
            if friends:
                name = friends[1] or friends[2]
                assert name not in self.friends
                self.friends[name] = (friends[3], turn)
            for fact in facts_in(sentence):
                values = self.facts.setdefault((fact.character, fact.attribute), [])
                assert bool(values) == ("now" in words(sentence.lower())), sentence
                values.append((fact.value, turn))

    def answer(self, query: str) -> tuple[Task, tuple[str, ...], list[int], set[str]]:
        """The task of a question, its spans, the turns that tell what it needs and the characters it needs."""
        (name,) = (word for word in words(query) if word in CHARACTERS)
        if query in [template.format(n=name) for template in ALL_KNOWN]:
            known = [values[-1] for (character, _), values in self.facts.items() if character == name]
            assert len({turn for _, turn in known}) > 1
            return "cumulative", tuple(value for value, _ in known), [turn for _, turn in known], {name}
        if "best friend" in query:
            friend, told = self.friends[name]
            (attribute,) = asked_attributes(query.replace(f"{name}'s best friend", name), name)
            value, since = self.facts[friend, attribute][-1]
            rivals = [whose for whose, other in self.facts if other == attribute and whose != friend]
            assert rivals, "the friend need not be known"
            return "two_facts", (friend, value), [told, since], {name, friend}
        asked = [self.facts[name, attribute] for attribute in asked_attributes(query, name)]
        task: Task = "several" if len(asked) > 1 else "update" if len(asked[0]) > 1 else "recall"
        return task, tuple(values[-1][0] for values in asked), [values[-1][1] for values in asked], {name}


def asked_attributes(query: str, name: str) -> list[str]:
    def unnamed(text: str, who: str) -> str:
        return re.sub(rf"\b({who}|he|she)\b('s)?|\b(his|her)\b", "X", text).lower().rstrip("?")

    wanted = {unnamed(q.format(n="N"), "N"): key for key, value in ATTRIBUTES.items() for q in value.questions}
    return [wanted[unnamed(part, name)] for part in re.split(r", | and ", query)]


@pytest.mark.parametrize("turns", [MIN_TURNS, 3, 4, 8, MAX_TURNS])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_answer_key_of_every_task_follows_from_what_was_told(split: Split, turns: int) -> None:
    for conversation in StoryWorld(0).conversations(split, 300, turns, TASKS):
        ledger = Ledger()
        said: list[set[str]] = []  # value words, by turn
        assert len(conversation.interactions) == turns
        assert conversation.interactions[-1].recall
        for turn, row in enumerate(conversation.interactions):
            text = f"{row.query} {row.answer}"
            if row.recall is None:
                ledger.read(turn, text)
            else:
                task, spans, told, names = ledger.answer(row.query)
                since = min(told)
                between = ledger.about[since + 1 :]
                long_range = bool(between) and not any(names & others for others in between)
                assert row.recall == Recall(spans, turn - since, long_range, task)
                listed = [word for word in words(row.answer) if word in spans or word in ATTRIBUTE_OF_VALUE]
                assert listed == list(spans)
                assert not set(words(row.query)) & set(ATTRIBUTE_OF_VALUE)
                values = set(spans) & set(ATTRIBUTE_OF_VALUE)
                assert sum(len(values & turn_said) for turn_said in said) == len(values)  # told once, said by no other
            ledger.about.append({word for word in words(text) if word in CHARACTERS})
            said.append(set(words(text)) & set(ATTRIBUTE_OF_VALUE))


@pytest.mark.parametrize("turns", [4, 8, MAX_TURNS])
@pytest.mark.parametrize("tasks", [*((task,) for task in TASKS), ("several", "update"), ("recall", "two_facts"), TASKS])
def test_every_task_asked_for_is_well_represented(tasks: tuple[Task, ...], turns: int) -> None:
    conversations = StoryWorld(0).conversations("train", 400, turns, tasks)
    counts = Counter(recall.task for recall in questions(conversations))
    assert set(counts) == set(tasks)
    assert min(counts.values()) >= 0.6 * sum(counts.values()) / len(tasks)
    assert sum(counts.values()) >= 0.2 * turns * len(conversations)
    if turns == MAX_TURNS:
        mixed = [{recall.task for recall in questions([row])} for row in conversations]
        assert sum(map(len, mixed)) >= 0.8 * len(tasks) * len(conversations)  # one conversation mixes them


def test_several_facts_are_asked_and_answered_in_one_readable_sentence() -> None:
    facts = [Fact("Lily", "place", "river"), Fact("Lily", "colour", "red"), Fact("Lily", "food", "cake")]
    asked = "Where does Lily live, what colour is her hat and what does she like to eat?"
    assert questions_joined(Dice("any"), facts) == asked
    assert answers_joined(facts) == "Lily lives near the river, her hat is red and she likes to eat cake."
    facts = [Fact("Tom", "place", "river"), Fact("Tom", "colour", "red")]
    assert questions_joined(Dice("any"), facts) == "Where does Tom live and what colour is his hat?"
    assert answers_joined(facts) == "Tom lives near the river and his hat is red."


def test_guessing_from_the_question_does_not_pay() -> None:
    """A guesser gives the most common answer that the question had in 4,000 training conversations."""
    seen: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    world = StoryWorld(0)
    rows = world.conversations("train", 5000, 8, TASKS)
    for conversation in rows[:4000]:
        for turn in conversation.interactions:
            if turn.recall:
                seen[turn.query][turn.recall.spans] += 1
    guess = {query: answers.most_common(1)[0][0] for query, answers in seen.items()}
    right, asked = Counter[str](), Counter[str]()
    for conversation in rows[4000:]:
        for turn in conversation.interactions:
            if turn.recall:
                asked[turn.recall.task] += 1
                right[turn.recall.task] += guess.get(turn.query) == turn.recall.spans
    for task, share in {"recall": 1 / 9, "update": 1 / 9, "several": 0, "two_facts": 0, "cumulative": 0}.items():
        assert asked[task] > 250
        assert right[task] / asked[task] < share + 0.03, task
    for conversation in world.conversations("validation", 500, 8, TASKS):
        assert not any(turn.recall and guess.get(turn.query) == turn.recall.spans for turn in conversation.interactions)


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
    turns += [turn for row in world.conversations("train", 1000, 8, TASKS) for turn in row.interactions]
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
    for conversation in world.conversations("train", 1000, 8, TASKS):
        assert all(len(f"{turn.query} {turn.answer}".split()) <= 36 for turn in conversation.interactions)
        assert all(turn.query[0].isupper() and turn.answer[0].isupper() for turn in conversation.interactions)


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
    with pytest.raises(ValueError, match=r"turns must be 2\.\.20, got 21"):
        StoryWorld(0).conversations("train", 1, turns=21)
    with pytest.raises(ValueError, match="unknown task 'sum'; use some of recall, several, update, two_facts, cum"):
        StoryWorld(0).conversations("train", 1, tasks=("recall", "sum"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tasks update, cumulative take 3 turns at least, got 2; use some of recall"):
        StoryWorld(0).conversations("train", 1, turns=2, tasks=("update", "cumulative"))
    with pytest.raises(ValueError, match="no task was given; use some of recall"):
        StoryWorld(0).conversations("train", 1, tasks=())
    with pytest.raises(ValueError, match="unknown split 'test'; use one of train, validation"):
        StoryWorld(0).stories("test", 1)  # type: ignore[arg-type]


def test_rows_survive_json() -> None:
    world = StoryWorld(0)
    for conversation in world.conversations("train", 200, 5) + world.conversations("train", 200, 5, TASKS):
        row = json.loads(json.dumps(conversation_to_row(conversation)))
        assert set(row) == {"query", "answer", "interactions"}
        assert len(row["interactions"]) == 4
        assert conversation_from_row({**row, "subset": "short"}) == conversation
        listed = [interaction_to_row(turn) for turn in conversation.interactions]
        assert conversation_from_row({"interactions": listed}) == conversation
    single = world.interactions("train", 1)[0]
    assert conversation_from_row(interaction_to_row(single)) == Conversation((single,))
    question = Interaction("Where?", "Near the hill.", Recall(("hill",), 2, True))
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
            "column 'interactions[1].answer_span': 'hat' does not occur in the answer 'Hello.', as whole words",
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

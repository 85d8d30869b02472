"""The story world: the embedded data source. A seed gives short stories, single interactions and conversations in
which some turns tell facts about characters and later turns ask for them.

It exists so that a model of ~1M parameters learns, in minutes on a CPU, whether its memory works: the vocabulary is
small, the sentences are short, and the only way to answer a question is to have kept what an earlier turn told.
A fact is (character, attribute, value). The splits share no such combination, so a model that merely learned "Lily's
hat is red" from its weights gets nothing right on validation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar, get_args

from rxt_platform.data.rows import Conversation, Interaction, Recall

STORY_WORLD_VERSION = 1
"""Raised by every change that alters a row of some (seed, split, index)."""

Split = Literal["train", "validation"]
T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words("Lily Mia Anna Sue Lucy Emma Ella Zoe Amy Kate Jane Molly Sara Nora Eva Lola")
BOYS = _words("Tom Ben Sam Tim Max Jack Leo Bob Dan Joe Luke Adam Finn Noah Owen Jake")
CHARACTERS = GIRLS + BOYS
VALIDATION_VALUES = 3  # of the 12 that a character's attribute may take
MIN_TURNS, MAX_TURNS = 2, 16


@dataclass(frozen=True)
class Attribute:
    """What can be told of a character, and every way to word it. `{n}` is the name, `{v}` the value."""

    values: tuple[str, ...]
    tells: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str  # only one, so that a right answer can be told from a wrong one word by word
    past: str  # what follows the name in a story
    asked: str  # in a story's dialogue, with `said` as the reply
    said: str
    topic: str  # in a request for a story


# fmt: off
ATTRIBUTES: dict[str, Attribute] = {
    "toy": Attribute(
        _words("kite drum ball doll robot puzzle truck train teddy boat balloon puppet"),
        ("{n} has a {v}.", "{n} plays with a {v}.", "{n}'s toy is a {v}."),
        ("What toy does {n} have?", "What does {n} play with?"), "{n} has a {v}.",
        "had a {v}", "What toy do you have?", "I have a {v}", "{n} and a {v}",
    ),
    "colour": Attribute(
        _words("red blue green yellow pink purple black white brown gray gold silver"),
        ("{n}'s hat is {v}.", "{n} has a {v} hat."),
        ("What colour is {n}'s hat?",), "{n}'s hat is {v}.",
        "wore a {v} hat", "What colour is your hat?", "My hat is {v}", "{n} and a {v} hat",
    ),
    "place": Attribute(
        _words("river forest beach park lake farm school market hill castle bridge tower"),
        ("{n} lives near the {v}.", "{n}'s home is near the {v}."),
        ("Where does {n} live?",), "{n} lives near the {v}.",
        "lived near the {v}", "Where do you live?", "I live near the {v}", "{n} near the {v}",
    ),
    "food": Attribute(
        _words("cake soup bread rice cheese honey pasta pizza corn jam pie candy"),
        ("{n} likes to eat {v}.", "{n} loves {v}."),
        ("What does {n} like to eat?",), "{n} likes to eat {v}.",
        "liked to eat {v}", "What do you like to eat?", "I like to eat {v}", "{n} and some {v}",
    ),
    "feeling": Attribute(
        _words("happy sad angry scared tired proud shy bored calm brave lonely curious"),
        ("{n} feels {v}.", "{n} is {v}."),
        ("How does {n} feel?",), "{n} feels {v}.",
        "felt {v}", "How do you feel?", "I feel {v}", "{n}, who feels {v}",
    ),
    "pet": Attribute(
        _words("dog cat rabbit hamster turtle fish bird mouse pony duck frog goat"),
        ("{n} has a pet {v}.", "{n}'s pet is a {v}."),
        ("What pet does {n} have?", "What is {n}'s pet?"), "{n} has a pet {v}.",
        "had a pet {v}", "What pet do you have?", "I have a pet {v}", "{n} and a pet {v}",
    ),
}
# fmt: on

# No sentence below may hold a value word: every value in a row is then a fact of the character named beside it.
# `{child}` is girl or boy, `{who}` is She, He or They.
OPENINGS = (
    "Once upon a time there was a {child} named {n}.",
    "One day a {child} named {n} went out to play.",
    "There once was a little {child} named {n}.",
)
SHORT_OPENINGS = ("There was a {child} named {n}.", "{n} was a little {child}.")
MEETINGS = ("{n} met a {child} named {friend}.", "{n} had a friend named {friend}.")
EVENTS = (
    ("It was a sunny day.", "{who} played in the sun."),
    ("Then it started to rain.", "{who} ran under a big tree."),
    ("{who} found a little box.", "There was a shiny shell inside."),
    ("{who} saw a star in the sky.", "{who} made a wish."),
    ("{who} heard a loud sound.", "It was only the wind."),
    ("{who} made a house of snow.", "It was very big."),
)
SHORT_ENDINGS = ("It was a good day.", "{who} smiled all day.")
ENDINGS = (*SHORT_ENDINGS, "{who} had a lot of fun.", "Then it was time to go home.")
PARENTS = ("Mom", "Dad")

ACKNOWLEDGEMENTS = ("That is nice.", "I will remember that.", "Thank you for telling me.", "Good to know.")
GREETINGS = (("Hello.", "Hello. How are you?"), ("Good morning.", "Good morning."), ("Goodbye.", "See you soon."))
SMALL_TALK = (
    ("How are you?", "I am well, thank you."),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am your helper."),
    ("What can you do?", "I can tell you a story."),
    ("Can you help me?", "Yes, I can help you."),
    ("It is a sunny day.", "Yes, it is a good day to play."),
    ("Do you like games?", "Yes, games are fun."),
    ("Is it time to sleep?", "Yes, sleep well."),
    ("Can you sing?", "No, but I can talk."),
)


@dataclass(frozen=True)
class Fact:
    """One told or asked combination; belongs to exactly one split."""

    character: str
    attribute: str
    value: str

    def word(self, template: str) -> str:
        """Fill `{n}` and `{v}` of one of the attribute's templates."""
        return template.format(n=self.character, v=self.value)


class Dice:
    """Draws for one row, from `Random.random()` alone: the only draw whose sequence Python promises to keep."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        rest = list(items)
        return [rest.pop(int(self._random.random() * len(rest))) for _ in range(len(rest))]

    def weighted(self, items: Sequence[T], weights: Sequence[int]) -> T:
        mark = self._random.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            mark -= weight
            if mark < 0:
                return item
        return items[-1]


def _stable_order(items: Sequence[str], salt: str) -> list[str]:
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}:{item}".encode()).digest())


@cache
def _validation_values(attribute: str) -> dict[str, frozenset[str]]:
    """The validation values of every character. Each round hands the 12 values, newly mixed, to 4 characters, 3 to
    each: 8 rounds serve the 32 characters, and each value is a validation value of exactly 8 of them. Guessing by how
    common a value is therefore gains nothing on either split.
    """
    values = ATTRIBUTES[attribute].values
    per_round = len(values) // VALIDATION_VALUES
    held: dict[str, frozenset[str]] = {}
    for index, character in enumerate(_stable_order(CHARACTERS, attribute)):
        mixed = _stable_order(values, f"{attribute}:{index // per_round}")
        start = index % per_round * VALIDATION_VALUES
        held[character] = frozenset(mixed[start : start + VALIDATION_VALUES])
    return held


@cache
def facts_of_split(character: str, attribute: str, split: Split) -> tuple[str, ...]:
    """The values that this character's attribute may take in `split`: 9 in train, the other 3 in validation.

    The same for every seed, so data sets of different seeds do not leak into each other's validation either.
    """
    _check_split(split)
    held = _validation_values(attribute)[character]
    return tuple(value for value in ATTRIBUTES[attribute].values if (value in held) == (split == "validation"))


def _check_split(split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(get_args(Split))}")


def _draw(dice: Dice, split: Split, character: str, attribute: str, others: Sequence[Fact] = ()) -> Fact:
    """A fact whose value is none of `others`': where two characters share an attribute, whose it is must matter."""
    told = {fact.value for fact in others}
    allowed = [value for value in facts_of_split(character, attribute, split) if value not in told]
    return Fact(character, attribute, dice.pick(allowed))


def _child(character: str) -> str:
    return "girl" if character in GIRLS else "boy"


def _tell(dice: Dice, facts: Sequence[Fact]) -> str:
    return " ".join(fact.word(dice.pick(ATTRIBUTES[fact.attribute].tells)) for fact in facts)


def _ask(dice: Dice, fact: Fact, recall: Recall | None) -> Interaction:
    attribute = ATTRIBUTES[fact.attribute]
    return Interaction(fact.word(dice.pick(attribute.questions)), fact.word(attribute.answer), recall)


def _in_story(facts: Sequence[Fact]) -> str:
    """One past-tense sentence with one or two facts of one character."""
    told = " and ".join(fact.word(ATTRIBUTES[fact.attribute].past) for fact in facts)
    return f"{facts[0].character} {told}."


def _story(dice: Dice, split: Split) -> str:
    """4 to 7 sentences: who, two or three facts, something that happens, often a dialogue that repeats a fact."""
    hero, friend = dice.shuffled(CHARACTERS)[:2]
    attributes = dice.shuffled(tuple(ATTRIBUTES))
    facts = [_draw(dice, split, hero, attribute) for attribute in attributes[:2]]
    together = dice.chance(0.5)
    who = "They" if together else "She" if hero in GIRLS else "He"
    joined = dice.chance(0.5)
    sentences = [dice.pick(OPENINGS).format(child=_child(hero), n=hero)]
    sentences += [_in_story(facts)] if joined else [_in_story([fact]) for fact in facts]
    if together:
        sentences.append(dice.pick(MEETINGS).format(n=hero, child=_child(friend), friend=friend))
        if joined:
            facts.append(_draw(dice, split, friend, attributes[2]))
            sentences.append(_in_story(facts[2:]))
    talk = _dialogue(dice, dice.pick(facts), hero, friend if together else None) if dice.chance(0.75) else []
    if len(sentences) + len(talk) <= 4:  # leaves room for an event of two sentences and the ending
        sentences += [line.format(who=who) for line in dice.pick(EVENTS)]
    return " ".join([*sentences, *talk, dice.pick(ENDINGS).format(who=who)])


def _dialogue(dice: Dice, fact: Fact, hero: str, friend: str | None) -> list[str]:
    """Someone asks for a fact of the story and its owner says it again: what teaches copying from the context."""
    attribute = ATTRIBUTES[fact.attribute]
    asker = dice.pick(PARENTS) if friend is None else friend if fact.character == hero else hero
    return [f'"{attribute.asked}" asked {asker}.', f'"{fact.word(attribute.said)}," said {fact.character}.']


def _interaction(dice: Dice, split: Split) -> Interaction:
    """One supervised row: half question with its facts in the query, then story request, telling, small talk."""
    kind = dice.weighted(("question", "story", "tell", "talk"), (50, 20, 20, 10))
    if kind == "talk":
        return Interaction(*dice.pick(GREETINGS + SMALL_TALK))
    first, second = dice.shuffled(CHARACTERS)[:2]
    attributes = dice.shuffled(tuple(ATTRIBUTES))
    facts = [_draw(dice, split, first, attributes[0])]
    if kind == "story":
        return _requested_story(dice, facts[0])
    if dice.chance(0.67):
        other = second if kind == "question" and dice.chance(0.5) else first
        shared = other == second and dice.chance(0.5)
        facts.append(_draw(dice, split, other, attributes[0 if shared else 1], facts))
    if kind == "tell":
        return Interaction(_tell(dice, facts), dice.pick(ACKNOWLEDGEMENTS))
    asked = _ask(dice, dice.pick(facts), None)
    return Interaction(f"{_tell(dice, facts)} {asked.query}", asked.answer)


def _requested_story(dice: Dice, fact: Fact) -> Interaction:
    child, who = _child(fact.character), "She" if fact.character in GIRLS else "He"
    query = f"Tell me a story about {fact.word(ATTRIBUTES[fact.attribute].topic)}."
    sentences = [dice.pick(SHORT_OPENINGS).format(child=child, n=fact.character), _in_story([fact])]
    if dice.chance(0.5):
        sentences.append(dice.pick(SHORT_ENDINGS).format(who=who))
    return Interaction(query, " ".join(sentences))


@dataclass
class _Telling:
    """A turn that tells, while its conversation is planned."""

    turn: int
    room: int
    """How many of its facts may be asked for."""
    asked: int = 0
    character: str = ""


def _plan(dice: Dice, turns: int) -> tuple[list[_Telling], dict[int, _Telling]]:
    """Choose what each turn does: the telling turns, and for each asking turn the one it asks about.

    The first turn tells and the last asks. A far telling turn is preferred, because near ones are on offer more often:
    with four turns the distances 1, 2 and 3 are all common. A turn in neither result is small talk.
    """
    tellings = [_Telling(0, room=3)]  # three, so that one telling can serve three questions
    asks: dict[int, _Telling] = {}
    for turn in range(1, turns):
        last = turn == turns - 1
        unasked = sum(telling.room - telling.asked for telling in tellings)
        kind = "ask" if last else dice.weighted(("ask", "tell", "talk"), (48, 28, 24))
        if kind == "ask" and unasked < 2 and not last:
            kind = "tell"  # one fact stays for the last turn
        if kind == "tell" and len(tellings) < 5:  # 3 + 4 x 2 facts: what two characters have to tell
            tellings.append(_Telling(turn, room=2))
        elif kind == "ask":
            open_tellings = [telling for telling in tellings if telling.asked < telling.room]
            asks[turn] = dice.weighted(open_tellings, [turn - telling.turn for telling in open_tellings])
            asks[turn].asked += 1
    return tellings, asks


def _cast(dice: Dice, tellings: list[_Telling]) -> dict[str, list[str]]:
    """Give every telling turn its character, and each character the order in which its attributes are told.

    The second character goes through the attributes from the other end, so that the two share none while there are
    enough; in a quarter of the conversations both start with the same one, and the answer depends on who is asked for.
    """
    first, second = dice.shuffled(CHARACTERS)[:2]
    attributes = dice.shuffled(tuple(ATTRIBUTES))
    left = {first: len(ATTRIBUTES), second: len(ATTRIBUTES)}
    alone = len(tellings) < 3 and dice.chance(0.2)
    for index, telling in enumerate(tellings):
        with_room = [name for name in (first, second) if left[name] >= telling.room]
        telling.character = first if index == 0 or alone else second if index == 1 else dice.pick(with_room)
        left[telling.character] -= telling.room
    backwards = attributes[::-1]
    return {first: attributes, second: attributes[:1] + backwards[:-1] if dice.chance(0.25) else backwards}


def _conversation(dice: Dice, split: Split, turns: int) -> Conversation:
    tellings, asks = _plan(dice, turns)
    attributes = _cast(dice, tellings)
    facts: dict[int, list[Fact]] = {}  # by telling turn; those that will be asked for come first
    told: list[Fact] = []
    for telling in tellings:
        facts[telling.turn] = []
        for _ in range(max(telling.asked, dice.pick((1, 2)))):
            fact = _draw(dice, split, telling.character, attributes[telling.character].pop(0), told)
            facts[telling.turn].append(fact)
            told.append(fact)
    to_ask = {telling.turn: facts[telling.turn][: telling.asked] for telling in tellings}
    about = {telling.turn: telling.character for telling in tellings}
    about |= {turn: telling.character for turn, telling in asks.items()}
    small_talk = dice.shuffled(SMALL_TALK)
    interactions: list[Interaction] = []
    for turn in range(turns):
        if turn in facts:
            known = about[turn] in [about.get(earlier) for earlier in range(turn)]
            interactions.append(_telling_turn(dice, dice.shuffled(facts[turn]), known))
        elif turn in asks:
            since = asks[turn].turn
            fact = to_ask[since].pop(0)
            between = [about.get(middle) for middle in range(since + 1, turn)]
            recall = Recall(fact.value, turn - since, bool(between) and fact.character not in between)
            interactions.append(_ask(dice, fact, recall))
        else:
            interactions.append(Interaction(*small_talk[turn % len(small_talk)]))
    return Conversation(tuple(interactions))


def _telling_turn(dice: Dice, facts: Sequence[Fact], known: bool) -> Interaction:
    """The user tells; in a quarter of the turns the model does, so that memory must keep answers as well."""
    if dice.chance(0.25):
        return Interaction(f"Tell me {'more ' if known else ''}about {facts[0].character}.", _tell(dice, facts))
    return Interaction(_tell(dice, facts), dice.pick(ACKNOWLEDGEMENTS))


class StoryWorld:
    """The rows of one seed. A row depends on its seed, split, kind and index only, never on how many are asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stories(self, split: Split, count: int) -> list[str]:
        """Short stories (25 to 60 words), for language-model pre-training."""
        return [_story(dice, split) for dice in self._dice(split, "story", count)]

    def interactions(self, split: Split, count: int) -> list[Interaction]:
        """Single turns, for supervised training. A question's facts are in its own query, so `recall` is None."""
        return [_interaction(dice, split) for dice in self._dice(split, "interaction", count)]

    def conversations(self, split: Split, count: int, turns: int = 4) -> list[Conversation]:
        """Conversations of exactly `turns` turns, for memory training. Raises `ValueError` outside 2..16 turns."""
        if not MIN_TURNS <= turns <= MAX_TURNS:
            raise ValueError(f"turns must be {MIN_TURNS}..{MAX_TURNS}, got {turns}")
        return [_conversation(dice, split, turns) for dice in self._dice(split, f"conversation{turns}", count)]

    def _dice(self, split: Split, kind: str, count: int) -> list[Dice]:
        _check_split(split)
        return [Dice(f"{self.seed}:{split}:{kind}:{index}") for index in range(count)]

"""The small language of the story world: names, values, sentence templates, facts and the dice that choose them.

A fact is (character, attribute, value). The splits share none: of an attribute's 12 values, each character has 9 in
training and the other 3 in validation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar, get_args

from rxt_platform.data.rows import Interaction, Recall

Split = Literal["train", "validation"]
T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words("Lily Mia Anna Sue Lucy Emma Ella Zoe Amy Kate Jane Molly Sara Nora Eva Lola")
BOYS = _words("Tom Ben Sam Tim Max Jack Leo Bob Dan Joe Luke Adam Finn Noah Owen Jake")
CHARACTERS = GIRLS + BOYS
VALIDATION_VALUES = 3  # of the 12 that a character's attribute may take


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
    updates: tuple[str, ...]  # a new value in place of the one told before


# fmt: off
ATTRIBUTES: dict[str, Attribute] = {
    "toy": Attribute(
        _words("kite drum ball doll robot puzzle truck train teddy boat balloon puppet"),
        ("{n} has a {v}.", "{n} plays with a {v}.", "{n}'s toy is a {v}."),
        ("What toy does {n} have?", "What does {n} play with?"), "{n} has a {v}.",
        "had a {v}", "What toy do you have?", "I have a {v}", "{n} and a {v}",
        ("Now {n} plays with a {v}.", "{n}'s toy is a {v} now."),
    ),
    "colour": Attribute(
        _words("red blue green yellow pink purple black white brown gray gold silver"),
        ("{n}'s hat is {v}.", "{n} has a {v} hat."),
        ("What colour is {n}'s hat?",), "{n}'s hat is {v}.",
        "wore a {v} hat", "What colour is your hat?", "My hat is {v}", "{n} and a {v} hat",
        ("Now {n}'s hat is {v}.", "{n}'s hat is {v} now."),
    ),
    "place": Attribute(
        _words("river forest beach park lake farm school market hill castle bridge tower"),
        ("{n} lives near the {v}.", "{n}'s home is near the {v}."),
        ("Where does {n} live?",), "{n} lives near the {v}.",
        "lived near the {v}", "Where do you live?", "I live near the {v}", "{n} near the {v}",
        ("Now {n} lives near the {v}.", "{n} lives near the {v} now."),
    ),
    "food": Attribute(
        _words("cake soup bread rice cheese honey pasta pizza corn jam pie candy"),
        ("{n} likes to eat {v}.", "{n} loves {v}."),
        ("What does {n} like to eat?",), "{n} likes to eat {v}.",
        "liked to eat {v}", "What do you like to eat?", "I like to eat {v}", "{n} and some {v}",
        ("Now {n} likes to eat {v}.", "{n} loves {v} now."),
    ),
    "feeling": Attribute(
        _words("happy sad angry scared tired proud shy bored calm brave lonely curious"),
        ("{n} feels {v}.", "{n} is {v}."),
        ("How does {n} feel?",), "{n} feels {v}.",
        "felt {v}", "How do you feel?", "I feel {v}", "{n}, who feels {v}",
        ("Now {n} feels {v}.", "{n} is {v} now."),
    ),
    "pet": Attribute(
        _words("dog cat rabbit hamster turtle fish bird mouse pony duck frog goat"),
        ("{n} has a pet {v}.", "{n}'s pet is a {v}."),
        ("What pet does {n} have?", "What is {n}'s pet?"), "{n} has a pet {v}.",
        "had a pet {v}", "What pet do you have?", "I have a pet {v}", "{n} and a pet {v}",
        ("Now {n} has a pet {v}.", "{n}'s pet is a {v} now."),
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

# Only in conversations, where the friend's own facts are told too.
BEST_FRIENDS = ("{n}'s best friend is {friend}.", "The best friend of {n} is {friend}.")
ALL_KNOWN = ("What do you know about {n}?", "Tell me all you know about {n}.")

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
    check_split(split)
    held = _validation_values(attribute)[character]
    return tuple(value for value in ATTRIBUTES[attribute].values if (value in held) == (split == "validation"))


def check_split(split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(get_args(Split))}")


def draw_fact(dice: Dice, split: Split, character: str, attribute: str, others: Sequence[Fact] = ()) -> Fact:
    """A fact whose value is none of `others`': where two characters share an attribute, whose it is must matter."""
    told = {fact.value for fact in others}
    allowed = [value for value in facts_of_split(character, attribute, split) if value not in told]
    return Fact(character, attribute, dice.pick(allowed))


def tell(dice: Dice, facts: Sequence[Fact]) -> str:
    """A present-tense sentence for each fact."""
    return " ".join(fact.word(dice.pick(ATTRIBUTES[fact.attribute].tells)) for fact in facts)


def ask(dice: Dice, fact: Fact, recall: Recall | None) -> Interaction:
    """The question for one fact and its answer."""
    attribute = ATTRIBUTES[fact.attribute]
    return Interaction(fact.word(dice.pick(attribute.questions)), fact.word(attribute.answer), recall)


def questions_joined(dice: Dice, facts: Sequence[Fact]) -> str:
    """One question for several facts of one character: what toy does Tom have and where does he live?"""
    asked = _said_in_turn(facts, [dice.pick(ATTRIBUTES[fact.attribute].questions) for fact in facts])
    return _joined([asked[0][:-1], *(part[0].lower() + part[1:-1] for part in asked[1:])]) + "?"


def answers_joined(facts: Sequence[Fact]) -> str:
    """One sentence for several facts of one character: Tom has a kite and he lives near the river."""
    said = _said_in_turn(facts, [ATTRIBUTES[fact.attribute].answer for fact in facts])
    return _joined([part[:-1] for part in said]) + "."


def _said_in_turn(facts: Sequence[Fact], templates: Sequence[str]) -> list[str]:
    """The character is named in the first part and he or she in the others, so that each sentence has one name."""
    he, his = ("she", "her") if facts[0].character in GIRLS else ("he", "his")
    later = [template.replace("{n}'s", his).replace("{n}", he) for template in templates[1:]]
    return [fact.word(template) for fact, template in zip(facts, [templates[0], *later], strict=True)]


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]

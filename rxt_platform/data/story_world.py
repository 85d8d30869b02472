"""The story world: the embedded data source. A seed gives short stories, single interactions and conversations in
which some turns tell facts about characters and later turns ask for them.

It exists so that a model of ~1M parameters learns, in minutes on a CPU, whether its memory works: the vocabulary is
small, the sentences are short, and the only way to answer a question is to have kept what an earlier turn told.
A fact is (character, attribute, value). The splits share no such combination, so a model that merely learned "Lily's
hat is red" from its weights gets nothing right on validation.
"""

from __future__ import annotations

from collections.abc import Sequence

from rxt_platform.config.data import Task
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.story_tasks import (
    MAX_TURNS,
    MIN_TURNS,
    TASKS,
    conversation_of_tasks,
    recall_conversation,
    tasks_within,
)
from rxt_platform.data.story_words import (
    ACKNOWLEDGEMENTS,
    ATTRIBUTES,
    CHARACTERS,
    ENDINGS,
    EVENTS,
    GIRLS,
    GREETINGS,
    MEETINGS,
    OPENINGS,
    PARENTS,
    SHORT_ENDINGS,
    SHORT_OPENINGS,
    SMALL_TALK,
    Dice,
    Fact,
    Split,
    ask,
    check_split,
    draw_fact,
    tell,
)

__all__ = ["STORY_WORLD_VERSION", "TASKS", "Split", "StoryWorld", "Task"]

STORY_WORLD_VERSION = 1
"""Raised by every change that alters a row of some (seed, split, index)."""


def _child(character: str) -> str:
    return "girl" if character in GIRLS else "boy"


def _in_story(facts: Sequence[Fact]) -> str:
    """One past-tense sentence with one or two facts of one character."""
    told = " and ".join(fact.word(ATTRIBUTES[fact.attribute].past) for fact in facts)
    return f"{facts[0].character} {told}."


def _story(dice: Dice, split: Split) -> str:
    """4 to 7 sentences: who, two or three facts, something that happens, often a dialogue that repeats a fact."""
    hero, friend = dice.shuffled(CHARACTERS)[:2]
    attributes = dice.shuffled(tuple(ATTRIBUTES))
    facts = [draw_fact(dice, split, hero, attribute) for attribute in attributes[:2]]
    together = dice.chance(0.5)
    who = "They" if together else "She" if hero in GIRLS else "He"
    joined = dice.chance(0.5)
    sentences = [dice.pick(OPENINGS).format(child=_child(hero), n=hero)]
    sentences += [_in_story(facts)] if joined else [_in_story([fact]) for fact in facts]
    if together:
        sentences.append(dice.pick(MEETINGS).format(n=hero, child=_child(friend), friend=friend))
        if joined:
            facts.append(draw_fact(dice, split, friend, attributes[2]))
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
    facts = [draw_fact(dice, split, first, attributes[0])]
    if kind == "story":
        return _requested_story(dice, facts[0])
    if dice.chance(0.67):
        other = second if kind == "question" and dice.chance(0.5) else first
        shared = other == second and dice.chance(0.5)
        facts.append(draw_fact(dice, split, other, attributes[0 if shared else 1], facts))
    if kind == "tell":
        return Interaction(tell(dice, facts), dice.pick(ACKNOWLEDGEMENTS))
    asked = ask(dice, dice.pick(facts), None)
    return Interaction(f"{tell(dice, facts)} {asked.query}", asked.answer)


def _requested_story(dice: Dice, fact: Fact) -> Interaction:
    child, who = _child(fact.character), "She" if fact.character in GIRLS else "He"
    query = f"Tell me a story about {fact.word(ATTRIBUTES[fact.attribute].topic)}."
    sentences = [dice.pick(SHORT_OPENINGS).format(child=child, n=fact.character), _in_story([fact])]
    if dice.chance(0.5):
        sentences.append(dice.pick(SHORT_ENDINGS).format(who=who))
    return Interaction(query, " ".join(sentences))


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

    def conversations(
        self, split: Split, count: int, turns: int = 4, tasks: Sequence[Task] = ("recall",)
    ) -> list[Conversation]:
        """Conversations of exactly `turns` turns, for memory training; their questions mix `tasks`, in any order.

        Conversations of two turns have no room for `update` and `cumulative` and leave them out. Raises `ValueError`
        outside 2..20 turns, for an unknown task and where no task is left.
        """
        if not MIN_TURNS <= turns <= MAX_TURNS:
            raise ValueError(f"turns must be {MIN_TURNS}..{MAX_TURNS}, got {turns}")
        chosen = tasks_within(tasks, turns)
        if chosen == ("recall",):
            return [
                recall_conversation(dice, split, turns) for dice in self._dice(split, f"conversation{turns}", count)
            ]
        kind = f"conversation{turns}:{'+'.join(chosen)}"
        return [conversation_of_tasks(dice, split, turns, chosen) for dice in self._dice(split, kind, count)]

    def _dice(self, split: Split, kind: str, count: int) -> list[Dice]:
        check_split(split)
        return [Dice(f"{self.seed}:{split}:{kind}:{index}") for index in range(count)]

"""The story world's conversations: which turns tell, which ask and what for, with the answer key of every question.

    recall      one fact of one character
    several     two or three facts of one character, asked at once
    update      a fact that was told anew with another value; the newest counts
    two_facts   a fact of somebody's best friend: who that is was told too, and so was another character's such fact
    cumulative  all that was told of a character, over two or three turns

Nothing that a question needs is said again between its telling and the question, so that the distance is the memory's.
The distance counts from the earliest telling that the question needs, an update's from the newest value. The question
is long-range if turns lie in between and none of them is about a character it needs; so it never is where what it needs
was told in different turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rxt_platform.config.data import Task
from rxt_platform.data.rows import Conversation, Interaction, Recall
from rxt_platform.data.story_words import (
    ACKNOWLEDGEMENTS,
    ALL_KNOWN,
    ATTRIBUTES,
    BEST_FRIENDS,
    CHARACTERS,
    SMALL_TALK,
    Dice,
    Fact,
    Split,
    answers_joined,
    ask,
    draw_fact,
    questions_joined,
)

TASKS: tuple[Task, ...] = get_args(Task)
MIN_TURNS, MAX_TURNS = 2, 20
_TOLD_OVER_TURNS: frozenset[Task] = frozenset({"update", "cumulative"})
"""Tasks whose facts are told in two turns at least."""
_SENTENCES = 3  # that a turn of a conversation of tasks tells at most
_SHARED_BY = 3  # facts of one attribute in a conversation of tasks: as many values as each character has in validation


def tasks_within(tasks: Sequence[Task], turns: int) -> tuple[Task, ...]:
    """Those of `tasks` that `turns` turns have room for, in the order of `TASKS`. Raises ValueError where none is."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; use some of {', '.join(TASKS)}")
    chosen = tuple(task for task in TASKS if task in tasks and (turns > 2 or task not in _TOLD_OVER_TURNS))
    if not chosen:
        reason = f"tasks {', '.join(tasks)} take 3 turns at least, got {turns}" if tasks else "no task was given"
        raise ValueError(f"{reason}; use some of {', '.join(TASKS)}")
    return chosen


@dataclass(frozen=True)
class _Telling:
    """A sentence that tells something, in its possible wordings."""

    names: tuple[str, ...]  # the first is whom it is about
    wordings: tuple[str, ...]
    fact: Fact | None = None


def _told(fact: Fact, anew: bool = False) -> _Telling:
    attribute = ATTRIBUTES[fact.attribute]
    wordings = attribute.updates if anew else attribute.tells
    return _Telling((fact.character,), tuple(fact.word(wording) for wording in wordings), fact)


def _telling_turn(dice: Dice, tellings: Sequence[_Telling], known: bool) -> Interaction:
    """The user tells. Where all is about one character, in a quarter of the turns the model does, so that memory must
    keep answers as well; `known` if the character was spoken of before.
    """
    about = {telling.names[0] for telling in tellings}
    by_model = len(about) == 1 and dice.chance(0.25)
    told = " ".join(dice.pick(telling.wordings) for telling in tellings)
    if by_model:
        return Interaction(f"Tell me {'more ' if known else ''}about {tellings[0].names[0]}.", told)
    return Interaction(told, dice.pick(ACKNOWLEDGEMENTS))


@dataclass
class _TellingTurn:
    """A turn that tells, while its conversation is planned."""

    turn: int
    room: int
    """How many of its facts may be asked for."""
    asked: int = 0
    character: str = ""


def _recall_plan(dice: Dice, turns: int) -> tuple[list[_TellingTurn], dict[int, _TellingTurn]]:
    """Choose what each turn does: the telling turns, and for each asking turn the one it asks about.

    The first turn tells and the last asks. A far telling turn is preferred, because near ones are on offer more often:
    with four turns the distances 1, 2 and 3 are all common. A turn in neither result is small talk.
    """
    tellings = [_TellingTurn(0, room=3)]  # three, so that one telling can serve three questions
    asks: dict[int, _TellingTurn] = {}
    for turn in range(1, turns):
        last = turn == turns - 1
        unasked = sum(telling.room - telling.asked for telling in tellings)
        kind = "ask" if last else dice.weighted(("ask", "tell", "talk"), (48, 28, 24))
        if kind == "ask" and unasked < 2 and not last:
            kind = "tell"  # one fact stays for the last turn
        if kind == "tell" and len(tellings) < 5:  # 3 + 4 x 2 facts: what two characters have to tell
            tellings.append(_TellingTurn(turn, room=2))
        elif kind == "ask":
            open_tellings = [telling for telling in tellings if telling.asked < telling.room]
            asks[turn] = dice.weighted(open_tellings, [turn - telling.turn for telling in open_tellings])
            asks[turn].asked += 1
    return tellings, asks


def _recall_cast(dice: Dice, tellings: list[_TellingTurn]) -> dict[str, list[str]]:
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


def recall_conversation(dice: Dice, split: Split, turns: int) -> Conversation:
    """A conversation whose questions are all of the task `recall`, about one or two characters."""
    tellings, asks = _recall_plan(dice, turns)
    attributes = _recall_cast(dice, tellings)
    facts: dict[int, list[Fact]] = {}  # by telling turn; those that will be asked for come first
    told: list[Fact] = []
    for telling in tellings:
        facts[telling.turn] = []
        for _ in range(max(telling.asked, dice.pick((1, 2)))):
            fact = draw_fact(dice, split, telling.character, attributes[telling.character].pop(0), told)
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
            interactions.append(_telling_turn(dice, [_told(fact) for fact in dice.shuffled(facts[turn])], known))
        elif turn in asks:
            since = asks[turn].turn
            fact = to_ask[since].pop(0)
            between = [about.get(middle) for middle in range(since + 1, turn)]
            recall = Recall((fact.value,), turn - since, bool(between) and fact.character not in between)
            interactions.append(ask(dice, fact, recall))
        else:
            interactions.append(Interaction(*small_talk[turn % len(small_talk)]))
    return Conversation(tuple(interactions))


@dataclass
class _Question:
    """A question of a conversation of tasks, while that is planned."""

    task: Task
    facts: list[Fact]  # what the answer says, in its order
    told: list[int]  # the turns that tell what the question needs
    friend_of: str = ""  # whose best friend it asks about

    @property
    def names(self) -> set[str]:
        """The characters that the question needs."""
        return {fact.character for fact in self.facts} | ({self.friend_of} if self.friend_of else set())


class _TaskPlan:
    """What each turn of a conversation of tasks does: `tellings` and `questions` by turn; the others are small talk.

    Three characters share most of the conversation, so that each has others beside it to be taken for. Whom a
    cumulative question asks about is nobody else's: all that was told of that character is what this question needs.
    """

    def __init__(self, dice: Dice, split: Split, turns: int, tasks: Sequence[Task]) -> None:
        self._dice, self._split = dice, split
        names = dice.shuffled(CHARACTERS)
        self._cast, self._spare = names[:3], names[3:]
        self._facts: list[Fact] = []  # told in any turn
        self._befriended: set[str] = set()  # whose best friend is told
        self.tellings: dict[int, list[_Telling]] = {}
        self.questions: dict[int, _Question] = {}
        asking = self._choose_turns(turns)
        order = dice.shuffled(tasks)
        for turn in reversed(asking):  # the last turn must ask, and finds every telling turn empty
            for task in list(order):
                question = self._place(task, turn)
                if question is not None:
                    self.questions[turn] = question
                    order.remove(task)
                    order.append(task)
                    break
        for turn, tellings in self.tellings.items():
            if tellings:
                self.tellings[turn] = dice.shuffled(tellings)
            elif free := self._free(self._cast):
                self._tell(turn, *dice.pick(free))
        in_order = [telling.fact for tellings in self.tellings.values() for telling in tellings]
        for question in self.questions.values():
            if question.task == "cumulative":
                question.facts.sort(key=in_order.index)

    def _choose_turns(self, turns: int) -> list[int]:
        """Open the telling turns and return the asking ones. Two turns tell, where there are more than two."""
        kinds = ["tell", *(self._dice.weighted(("ask", "tell", "talk"), (42, 42, 16)) for _ in range(turns - 2)), "ask"]
        if turns > 2 and kinds.count("tell") == 1:
            kinds[1 + self._dice.pick(range(turns - 2))] = "tell"
        self.tellings = {turn: [] for turn, kind in enumerate(kinds) if kind == "tell"}
        return [turn for turn, kind in enumerate(kinds) if kind == "ask"]

    def _place(self, task: Task, turn: int) -> _Question | None:
        """Tell in earlier turns what a question of `task` in `turn` needs; None, and nothing told, without room."""
        if task == "recall":
            return self._recall(turn)
        if task == "several":
            return self._several(turn)
        if task == "update":
            return self._update(turn)
        if task == "two_facts":
            return self._two_facts(turn)
        return self._cumulative(turn)

    def _recall(self, turn: int) -> _Question | None:
        turns, free = self._open(turn), self._free(self._cast)
        if not turns or not free:
            return None
        told = self._far(turn, turns)
        fact = self._tell(told, *self._dice.pick(free))
        self._distract(turn, fact, 0.35)
        return _Question("recall", [fact], [told])

    def _several(self, turn: int) -> _Question | None:
        count = 3 if self._dice.chance(0.25) else 2
        places = self._spread(turn, count, self._dice.pick((1, 2)))
        free = self._dice.shuffled(self._free(self._cast))
        for character in self._dice.shuffled(self._cast):
            attributes = [attribute for name, attribute in free if name == character][:count]
            if places and len(attributes) == count:
                facts = [self._tell(place, character, name) for place, name in zip(places, attributes, strict=True)]
                return _Question("several", facts, places)
        return None

    def _update(self, turn: int) -> _Question | None:
        turns, free = self._open(turn), self._free(self._cast, room=2)
        if len(turns) < 2 or not free:
            return None
        character, attribute = self._dice.pick(free)
        newest = self._far(turn, turns[1:])
        self._tell(self._dice.pick([earlier for earlier in turns if earlier < newest]), character, attribute)
        fact = self._tell(newest, character, attribute, anew=True)
        self._distract(turn, fact, 0.35)
        return _Question("update", [fact], [newest])

    def _two_facts(self, turn: int) -> _Question | None:
        """Another character's same attribute is always told before the question, or the friend need not be known."""
        before = [earlier for earlier in self.tellings if earlier < turn]
        told = [telling.fact for earlier in before for telling in self.tellings[earlier] if telling.fact]
        room_for_rival = self._free(self._cast, room=2) if self._room(before) > 2 else []
        places = self._spread(turn, 2, self._dice.pick((1, 2)))
        for friend, attribute in self._dice.shuffled(self._free(self._cast)) if places else ():
            rivalled = any(fact.attribute == attribute and fact.character != friend for fact in told)
            if not rivalled and (friend, attribute) not in room_for_rival:
                continue
            friend_of = self._befriend(places[0], friend)
            fact = self._tell(places[1], friend, attribute)
            self._distract(turn, fact, 0.2 if rivalled else 1)
            if (turns := self._open(turn)) and self._dice.chance(0.5):
                self._befriend(self._far(turn, turns), self._dice.pick([name for name in self._cast if name != friend]))
            return _Question("two_facts", [fact], places, friend_of)
        return None

    def _cumulative(self, turn: int) -> _Question | None:
        free = self._dice.shuffled(self._free(self._spare[:1]))[: self._dice.pick((2, 3, 3, 4))]
        places = self._spread(turn, len(free), min(len(free), self._dice.pick((2, 2, 3))))
        if len(set(places)) < 2:
            return None
        self._spare.pop(0)
        facts = [self._tell(place, *pair) for place, pair in zip(places, free, strict=True)]
        return _Question("cumulative", facts, places)

    def _tell(self, turn: int, character: str, attribute: str, anew: bool = False) -> Fact:
        fact = draw_fact(self._dice, self._split, character, attribute, self._facts)
        self._facts.append(fact)
        self.tellings[turn].append(_told(fact, anew))
        return fact

    def _befriend(self, turn: int, friend: str) -> str:
        """Tell who has `friend` as the best friend; somebody whose best friend is not told yet."""
        alone = [name for name in self._cast if name not in (friend, *self._befriended)]
        name = self._dice.pick(alone) if alone else self._spare.pop(0)
        self._befriended.add(name)
        wordings = tuple(wording.format(n=name, friend=friend) for wording in BEST_FRIENDS)
        self.tellings[turn].append(_Telling((name, friend), wordings))
        return name

    def _distract(self, turn: int, fact: Fact, probability: float) -> None:
        """Perhaps tell the same attribute of another character before the question in `turn`, where there is room."""
        others = [pair for pair in self._free(self._cast) if pair[1] == fact.attribute]
        turns = self._open(turn)
        if others and turns and self._dice.chance(probability):
            self._tell(self._dice.pick(turns), *self._dice.pick(others))

    def _free(self, characters: Sequence[str], room: int = 1) -> list[tuple[str, str]]:
        """(character, attribute) not told so far, of attributes that `room` more facts may share."""
        told = [(fact.character, fact.attribute) for fact in self._facts]
        shared = [attribute for _, attribute in told]
        return [
            (character, attribute)
            for character in characters
            for attribute in ATTRIBUTES
            if (character, attribute) not in told and shared.count(attribute) + room <= _SHARED_BY
        ]

    def _spread(self, turn: int, sentences: int, turns: int) -> list[int]:
        """A telling turn before `turn` for each of some sentences: `turns` different ones, more or fewer if there must
        be. Empty if there is no room.
        """
        chosen: list[int] = []
        opened = self._open(turn)
        while opened and (len(chosen) < turns or self._room(chosen) < sentences):
            chosen.append(self._far(turn, opened))
            opened.remove(chosen[-1])
        if self._room(chosen) < sentences:
            return []
        places = list(chosen)
        while len(places) < sentences:
            places.append(self._dice.pick([t for t in chosen if self._room([t]) > places.count(t)]))
        return self._dice.shuffled(places)

    def _open(self, turn: int) -> list[int]:
        """The telling turns before `turn` with room for a sentence."""
        return [earlier for earlier in self.tellings if earlier < turn and self._room([earlier])]

    def _room(self, turns: Sequence[int]) -> int:
        return sum(_SENTENCES - len(self.tellings[turn]) for turn in turns)

    def _far(self, turn: int, turns: Sequence[int]) -> int:
        """One of `turns`; a far one is preferred, because near ones are on offer more often."""
        return self._dice.weighted(turns, [turn - earlier for earlier in turns])


def conversation_of_tasks(dice: Dice, split: Split, turns: int, tasks: Sequence[Task]) -> Conversation:
    """A conversation whose questions take `tasks` in turn, as far as there is room. Two turns: see `tasks_within`."""
    plan = _TaskPlan(dice, split, turns, tasks)
    small_talk = dice.shuffled(SMALL_TALK)
    interactions: list[Interaction] = []
    spoken_of: list[set[str]] = []  # by turn
    for turn in range(turns):
        names: set[str] = set()
        if tellings := plan.tellings.get(turn):
            names = {name for telling in tellings for name in telling.names}
            known = any(tellings[0].names[0] in earlier for earlier in spoken_of)
            interactions.append(_telling_turn(dice, tellings, known))
        elif question := plan.questions.get(turn):
            names, since = question.names, min(question.told)
            between = spoken_of[since + 1 :]
            long_range = bool(between) and not any(names & others for others in between)
            interactions.append(_asking_turn(dice, question, turn - since, long_range))
        else:
            interactions.append(Interaction(*small_talk[turn % len(small_talk)]))
        spoken_of.append(names)
    return Conversation(tuple(interactions))


def _asking_turn(dice: Dice, question: _Question, distance: int, long_range: bool) -> Interaction:
    facts, character = question.facts, question.facts[0].character
    spans = tuple(fact.value for fact in facts)
    if question.task == "two_facts":
        template = dice.pick(ATTRIBUTES[facts[0].attribute].questions)
        query = template.format(n=f"{question.friend_of}'s best friend")
        # The friend's name is asked too: without it the value alone could be anybody's.
        recall = Recall((character, *spans), distance, long_range, question.task)
        return Interaction(query, answers_joined(facts), recall)
    recall = Recall(spans, distance, long_range, question.task)
    if question.task == "several":
        return Interaction(questions_joined(dice, facts), answers_joined(facts), recall)
    if question.task == "cumulative":
        return Interaction(dice.pick(ALL_KNOWN).format(n=character), answers_joined(facts), recall)
    return ask(dice, facts[0], recall)

"""Put held-out conversations to a model, turn by turn: answer tokens, greedy answers, questions (DESIGN 2, 5).

Each conversation is held twice. Once memory is teacher-forced: after a turn the reference answer is written, so that an
early mistake does not hide what the memory can hold. Once it is free-running: the model's own answer is written, as in
a chat. What is asked for earlier turns is also asked with the state *reset* to that of a conversation's start (its
system prompt is not forgotten).

Recall is exact match: the answer, generated greedily, must contain every answer span of the row as whole words; rows
without spans must be answered with the reference answer. Case and punctuation don't count.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from rxt_platform.data.batches import derive_seed
from rxt_platform.data.examples import Example, RowEncoder
from rxt_platform.data.recall import matches
from rxt_platform.data.rows import Conversation, RowError
from rxt_platform.data.tokenizer import RxtTokenizer, answer_ids
from rxt_platform.errors import DataError
from rxt_platform.evaluation.outcomes import Question, TokenSums, TurnOutcome
from rxt_platform.evaluation.responders import Responder, State, answer_all

SPARE_TOKENS = 8
"""An answer may be this much longer than its reference before it is cut."""

Progress = Callable[[int], None]
"""Is told how many conversations are done."""


@dataclass(frozen=True)
class Talk:
    """A conversation as text and as token ids, and its place among all (from 0), from which its seed comes."""

    number: int
    conversation: Conversation
    example: Example

    def turn(self, turn: int) -> Example:
        """The turn (from 0, a system prompt not counted) alone."""
        at = turn + self.example.opening
        return Example((self.example.turns[at],), (self.example.target_starts[at],))

    def seed(self, seed: int) -> int:
        """Of the conversation's initial memory."""
        return derive_seed(seed, "evaluation", self.number)


def encode_talks(conversations: Sequence[Conversation], encoder: RowEncoder) -> list[Talk]:
    """The conversations that fit the encoder's window, by its policy; those that don't are left out.

    Raises DataError with the policy "fail", and when nothing is left.
    """
    talks: list[Talk] = []
    for number, made in enumerate(encoder.encode(conversations)):
        if not isinstance(made, RowError):
            talks.append(Talk(len(talks), conversations[number], made[0]))
        elif encoder.too_long == "fail":
            raise DataError(f"conversation {number + 1}: {made}: shorten it, or use a model with a longer window")
    if not talks:
        raise DataError("no conversation fits the model's window: shorten them, or use a model with a longer window")
    return talks


@torch.no_grad()
def hold_conversations(
    responder: Responder[State],
    tokenizer: RxtTokenizer,
    talks: Sequence[Talk],
    seed: int,
    free_running: bool = True,
    batch_size: int = 50,
    progress: Progress | None = None,
) -> list[TurnOutcome]:
    """The outcome of every turn, by conversation and turn."""
    asks = _questions(talks)
    outcomes: list[TurnOutcome] = []
    done = 0
    for opening in (0, 1):  # a system prompt is written in a whole batch or in none of it
        same = [talk for talk in talks if talk.example.opening == opening]
        for start in range(0, len(same), batch_size):
            group = same[start : start + batch_size]
            for talk, turn, row in _hold(responder, group, asks, seed, free_running):
                outcomes.append(_outcome(tokenizer, talk, turn, row, asks.get((talk.number, turn))))
            done += len(group)
            if progress is not None:
                progress(done)
    return sorted(outcomes, key=lambda outcome: (outcome.conversation, outcome.turn))


def any_keyed(talks: Sequence[Talk]) -> bool:
    """Whether some question carries an answer key."""
    return any(item.recall is not None for talk in talks for item in talk.conversation.interactions)


Asks = Mapping[tuple[int, int], int]
"""The distance of each question, by conversation and turn (from 0)."""


def _questions(talks: Sequence[Talk]) -> Asks:
    """Where no row carries answer keys, every follow-up asks for the first turn's text."""
    turns = [((talk.number, turn), item) for talk in talks for turn, item in enumerate(talk.conversation.interactions)]
    keyed = {place: item.recall.distance for place, item in turns if item.recall is not None}
    return keyed or {place: place[1] for place, _ in turns if place[1] > 0}


@dataclass(frozen=True)
class _Answered:
    """What a model makes of one turn; answers are token ids. `own_answer` None: not asked for; `reset_answer` None: no
    question."""

    tokens: TokenSums
    tokens_reset: TokenSums
    answer: list[int]
    own_answer: list[int] | None
    reset_answer: list[int] | None


def _hold(
    responder: Responder[State], talks: Sequence[Talk], asks: Asks, seed: int, free_running: bool
) -> Iterator[tuple[Talk, int, _Answered]]:
    """Every turn (from 0) of a batch of conversations, of which all or none have a system prompt."""
    fresh = forced = responder.start([talk.seed(seed) for talk in talks])
    if talks[0].example.opening:  # a reset forgets what was said, not who the model is
        fresh = forced = responder.instruct(fresh, [talk.example.turns[0] for talk in talks])
    own = forced if free_running else None
    for turn in count():
        turns = [talk.turn(turn) for talk in talks]
        asked = [row for row, talk in enumerate(talks) if (talk.number, turn) in asks]
        answered = _answer(responder, turns, asked, fresh, forced, own)
        yield from ((talk, turn, row) for talk, row in zip(talks, answered, strict=True))

        live = [row for row, talk in enumerate(talks) if turn + 1 < len(talk.conversation.interactions)]
        if not live:
            return
        if own is not None:
            written = [[*_prompt(turns[row]), *(answered[row].own_answer or ())] for row in live]
            own = responder.remember(responder.rows(own, live), written)
        forced = responder.remember(responder.rows(forced, live), [turns[row].turns[0] for row in live])
        fresh = responder.rows(fresh, live)
        talks = [talks[row] for row in live]


def _answer(
    responder: Responder[State],
    turns: Sequence[Example],
    asked: Sequence[int],
    fresh: State,
    forced: State,
    own: State | None,
) -> list[_Answered]:
    """A turn of each conversation with nothing told, with the reference answers remembered, with the model's own.

    Of the first, only the rows `asked` are answered. What comes from the same state is not computed twice.
    """
    prompts = [_prompt(turn) for turn in turns]
    limits = [len(turn.turns[0]) - turn.target_starts[0] + SPARE_TOKENS for turn in turns]
    tokens = tokens_reset = responder.turn_loss(turns, forced)
    if forced is not fresh:
        tokens_reset = responder.turn_loss(turns, fresh)
    answers = own_answers = answer_all(responder, prompts, forced, limits)
    if own is not None and own is not forced:
        own_answers = answer_all(responder, prompts, own, limits)
    reset: dict[int, list[int]] = {}
    if asked:
        chosen, allowed = [prompts[row] for row in asked], [limits[row] for row in asked]
        reset = dict(zip(asked, answer_all(responder, chosen, responder.rows(fresh, asked), allowed), strict=True))
    return [
        _Answered(
            tokens[row], tokens_reset[row], answers[row], None if own is None else own_answers[row], reset.get(row)
        )
        for row in range(len(turns))
    ]


def _prompt(turn: Example) -> list[int]:
    """What the model answers to."""
    return list(turn.turns[0][: turn.target_starts[0]])


def _outcome(tokenizer: RxtTokenizer, talk: Talk, turn: int, row: _Answered, distance: int | None) -> TurnOutcome:
    """The record of a turn (from 0); `distance` if it asks for an earlier one."""
    item = talk.conversation.interactions[turn]
    key = item.recall

    def right(answer: str) -> bool:
        return matches(answer, item.reply, None if key is None else key.spans)

    answer = tokenizer.decode(answer_ids(row.answer))
    own_answer = None if row.own_answer is None else tokenizer.decode(answer_ids(row.own_answer))
    question = None
    if distance is not None and row.reset_answer is not None:
        queries = " ".join(one.query for one in talk.conversation.interactions[turn - distance : turn])
        question = Question(
            distance=distance,
            task=None if key is None else key.task,
            long_range=None if key is None else key.long_range,
            told_by_user=None if key is None else matches(queries, item.reply, key.spans),
            right=right(answer),
            reset=right(tokenizer.decode(answer_ids(row.reset_answer))),
            own=None if own_answer is None else right(own_answer),
        )
    return TurnOutcome(
        conversation=talk.number,
        turn=turn + 1,
        query=item.query,
        reference=item.reply,
        tokens=row.tokens,
        tokens_reset=row.tokens_reset,
        answer=answer,
        own_answer=own_answer,
        question=question,
        spans=None if key is None else key.spans,
    )

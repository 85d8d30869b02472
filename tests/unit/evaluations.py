"""Stand-ins for models whose answers, and so whose figures, are known beforehand; and conversations for them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rxt_platform.data.examples import Example, Ids, RowEncoder
from rxt_platform.data.rows import Conversation, Interaction, Recall
from rxt_platform.data.tokenizer import BOS, EOS
from rxt_platform.evaluation.conversations import Talk, encode_talks
from rxt_platform.evaluation.outcomes import TokenSums
from rxt_platform.evaluation.responders import Turns
from tests.unit.helpers import word_tokenizer

WINDOW = 96
KITE = Conversation(
    (
        Interaction("Tom has a kite.", "Good."),
        Interaction("Lily likes cake.", "Nice."),
        Interaction("What has Tom?", "Tom has a kite.", Recall(("kite",), 2, True)),
        Interaction("What likes Lily?", "Lily likes cake.", Recall(("cake",), 2, False, "update")),
    )
)
HAT = Conversation(
    (Interaction("Tell me of Tom.", "Tom has a hat."), Interaction("Which hat?", "A hat.", Recall(("hat",), 1, False)))
)
ALONE = Conversation((Interaction("Lily plays.", "Good."),))

Reply = Callable[[Sequence[int], tuple[tuple[int, ...], ...]], str]
"""Text of the answer to a prompt's ids, given the ids of all interactions that were remembered."""


def talks_of(*conversations: Conversation) -> list[Talk]:
    """Conversations as the evaluation holds them."""
    return encode_talks(conversations, RowEncoder(word_tokenizer(), WINDOW))


def asked(prompt: Sequence[int]) -> str:
    """The query in a prompt."""
    return word_tokenizer().decode(prompt)


class Listener:
    """Remembers every interaction as it is, and answers what `reply` says; a token costs 1 nat if anything is
    remembered, 2 and a mistake if nothing is."""

    model: Any = None

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.answered: list[int] = []  # rows of each call

    def start(self, seeds: Sequence[int]) -> Turns:
        return [() for _ in seeds]

    def rows(self, state: Turns, rows: Sequence[int]) -> Turns:
        return [state[row] for row in rows]

    def turn_loss(self, turns: Sequence[Example], state: Turns) -> list[TokenSums]:
        counts = [len(one.turns[0]) - one.target_starts[0] for one in turns]
        return [TokenSums(n if told else 2.0 * n, n if told else 0, n) for n, told in zip(counts, state, strict=True)]

    def stream(
        self, prompts: Sequence[Ids], state: Turns, limits: Sequence[int], options: Any = None
    ) -> Iterator[list[int | None]]:
        self.answered.append(len(prompts))
        replies = [
            [*word_tokenizer().encode(self.reply(list(prompt), told)), EOS][:limit]
            for prompt, told, limit in zip(prompts, state, limits, strict=True)
        ]
        for index in range(max(map(len, replies))):
            yield [reply[index] if index < len(reply) else None for reply in replies]

    def instruct(self, state: Turns, prompts: Sequence[Ids]) -> Turns:
        return self.remember(state, prompts)

    def remember(self, state: Turns, interactions: Sequence[Ids]) -> Turns:
        assert all(interaction[0] == BOS for interaction in interactions)
        return [(*told, tuple(ids)) for told, ids in zip(state, interactions, strict=True)]


def knows(*conversations: Conversation) -> Reply:
    """Gives the reference answer of any of these conversations' queries, if anything was told before; else "No."."""
    known = {turn.query: turn.reply for talk in conversations for turn in talk.interactions}
    return lambda prompt, told: known[asked(prompt)] if told else "No."


def needs_references(*conversations: Conversation) -> Reply:
    """Gives the reference answer only if all that it remembers is a conversation's reference interactions."""
    tokenizer = word_tokenizer()
    written = {
        tokenizer.encode_interaction(turn.query, turn.reply, WINDOW).ids
        for talk in conversations
        for turn in talk.interactions
    }
    whole = knows(*conversations)
    return lambda prompt, told: whole(prompt, told) if set(told) <= written else "No."

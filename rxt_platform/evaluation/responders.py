"""One interface to models with a memory and without, so that both are measured by the very same code.

A state is all that a batch of conversations goes on from: the memory [L, B, S, D] of a Reactive Transformer, the tokens
of the earlier turns of a stateless one. The state that `start` gives is also what a *reset* puts in its place.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.examples import Example, Ids
from rxt_platform.evaluation.outcomes import TokenSums
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.generation import generate
from rxt_platform.model.loss import target_loss
from rxt_platform.model.sampling import GREEDY, SamplingOptions
from rxt_platform.model.stepper import LanguageModel
from rxt_platform.model.transformer import ReactiveTransformer

History = Literal["full", "none"]
Turns = list[tuple[tuple[int, ...], ...]]
"""Of each conversation, the token ids of its earlier turns."""

State = TypeVar("State")


class Responder(Protocol[State]):
    """A model in a batch of conversations. A turn is an `Example` of one turn: its ids and where its answer starts."""

    @property
    def model(self) -> LanguageModel:
        """The model that answers."""
        ...

    def start(self, seeds: Sequence[int]) -> State:
        """Conversations of which nothing has been told yet, one seed each."""
        ...

    def rows(self, state: State, rows: Sequence[int]) -> State:
        """Some of the conversations, in this order."""
        ...

    def turn_loss(self, turns: Sequence[Example], state: State) -> list[TokenSums]:
        """Of each conversation, the answer tokens of its next turn (`[EOS]` included, no padding, no query)."""
        ...

    def stream(
        self, prompts: Sequence[Ids], state: State, limits: Sequence[int], options: SamplingOptions = GREEDY
    ) -> Iterator[list[int | None]]:
        """Answer the next query of each conversation with at most so many tokens; one token each at a time, None after
        the end, as `generate` gives them."""
        ...

    def instruct(self, state: State, prompts: Sequence[Ids]) -> State:
        """The state after a system prompt of each conversation, which a reset does not take away."""
        ...

    def remember(self, state: State, interactions: Sequence[Ids]) -> State:
        """The state after a whole interaction (query and answer) of each conversation."""
        ...


def answer_all(
    responder: Responder[State], prompts: Sequence[Ids], state: State, limits: Sequence[int]
) -> list[list[int]]:
    """The whole greedy answers of a batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in responder.stream(prompts, state, limits):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


class ReactiveResponder:
    """A Reactive Transformer: a turn is answered over the memory, and written into it."""

    def __init__(self, model: ReactiveTransformer) -> None:
        self.model = model

    def start(self, seeds: Sequence[int]) -> Tensor:
        """See `Responder`."""
        return self.model.initial_memory(torch.tensor(seeds, dtype=torch.int64))

    def rows(self, state: Tensor, rows: Sequence[int]) -> Tensor:
        """See `Responder`."""
        return state[:, torch.tensor(rows, dtype=torch.int64, device=state.device)]

    def turn_loss(self, turns: Sequence[Example], state: Tensor) -> list[TokenSums]:
        """See `Responder`."""
        batch = padded(turns).to(state.device)
        states = self.model.decode_states(batch.ids[:, 0], batch.mask[:, 0], state).states
        return row_sums(self.model, states, batch)

    def stream(
        self, prompts: Sequence[Ids], state: Tensor, limits: Sequence[int], options: SamplingOptions = GREEDY
    ) -> Iterator[list[int | None]]:
        """See `Responder`."""
        return generate(self.model, [list(prompt) for prompt in prompts], state, options, limits=limits)

    def instruct(self, state: Tensor, prompts: Sequence[Ids]) -> Tensor:
        """See `Responder`."""
        return self.remember(state, prompts)

    def remember(self, state: Tensor, interactions: Sequence[Ids]) -> Tensor:
        """See `Responder`."""
        batch = padded([Example((ids,), (len(ids),)) for ids in interactions]).to(state.device)
        return self.model.write(state, batch.ids[:, 0], batch.mask[:, 0])


class StatelessResponder:
    """A model without memory that reads its history anew at every turn: all earlier turns one after the other, or none.

    Of a history that does not fit the model's window beside the next turn, the oldest whole turns are left out.
    """

    def __init__(self, model: StatelessTransformer, history: History = "full") -> None:
        self.model = model
        self.history = history

    def start(self, seeds: Sequence[int]) -> Turns:
        """See `Responder`."""
        return [() for _ in seeds]

    def rows(self, state: Turns, rows: Sequence[int]) -> Turns:
        """See `Responder`."""
        return [state[row] for row in rows]

    def turn_loss(self, turns: Sequence[Example], state: Turns) -> list[TokenSums]:
        """See `Responder`."""
        whole = []
        for example, told in zip(turns, state, strict=True):
            (turn,), (answer,) = example.turns, example.target_starts
            before = self._fitting(told, len(turn))
            whole.append(Example(((*before, *turn),), (len(before) + answer,)))
        batch = padded(whole).to(self.model.embedding.weight.device)
        return row_sums(self.model, self.model.decode_states(batch.ids[:, 0], batch.mask[:, 0]).states, batch)

    def stream(
        self, prompts: Sequence[Ids], state: Turns, limits: Sequence[int], options: SamplingOptions = GREEDY
    ) -> Iterator[list[int | None]]:
        """See `Responder`."""
        whole = [
            [*self._fitting(told, len(prompt) + limit), *prompt]
            for prompt, told, limit in zip(prompts, state, limits, strict=True)
        ]
        return generate(self.model, whole, None, options, limits=limits)

    def instruct(self, state: Turns, prompts: Sequence[Ids]) -> Turns:
        """See `Responder`."""
        return [(*told, tuple(ids)) for told, ids in zip(state, prompts, strict=True)]

    def remember(self, state: Turns, interactions: Sequence[Ids]) -> Turns:
        """See `Responder`."""
        return state if self.history == "none" else self.instruct(state, interactions)

    def _fitting(self, told: Sequence[tuple[int, ...]], needed: int) -> list[int]:
        """The newest turns that leave room for `needed` tokens, one after the other."""
        room = self.model.config.max_length - needed
        kept = len(told)
        while kept and len(told[kept - 1]) <= room:
            kept -= 1
            room -= len(told[kept])
        return [token for turn in told[kept:] for token in turn]


def padded(turns: Sequence[Example]) -> Batch:
    """Single turns as one batch [B, 1, T]."""
    return collate(turns, [0] * len(turns), range(len(turns)))


def row_sums(model: LanguageModel, states: Tensor, batch: Batch) -> list[TokenSums]:
    """The target tokens of each row of single turns, from the decoder's `states` [B, T, D]."""
    losses, hits = [], []
    for row, ids, targets in zip(states, batch.ids[:, 0], batch.targets[:, 0], strict=True):
        loss, correct = target_loss(model, row, ids, targets)
        losses.append(loss)
        hits.append(correct)
    counts = batch.targets.sum(dim=(1, 2)).tolist()
    totals = zip(torch.stack(losses).tolist(), torch.stack(hits).tolist(), counts, strict=True)
    return [TokenSums(loss, correct, count) for loss, correct, count in totals]

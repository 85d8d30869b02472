"""Three ways to hold a conversation, one turn at a time, each saying what the turn took (for latency_by_turn.py)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from timing import Machine
from torch import Tensor

from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.generation import generate
from rxt_platform.model.sampling import SamplingOptions, choose
from rxt_platform.model.stepper import LanguageModel, Stepper
from rxt_platform.model.transformer import ReactiveTransformer

Rows = list[list[int]]


@dataclass
class Turn:
    """What one turn of all conversations took.

    answers          the tokens, the same number for each conversation
    prompt_seconds   from the prompt to the first token
    rest_seconds     for all further tokens
    processed        tokens that went through the decoder and, in a memory update, through the encoder
    update_seconds   for the memory update after the answer
    kept_bytes       what goes to the next turn
    answering_bytes  that, and the keys and values held while answering
    """

    answers: Rows
    prompt_seconds: float
    rest_seconds: float
    processed: int
    update_seconds: float = 0.0
    kept_bytes: int = 0
    answering_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of the whole turn."""
        return self.prompt_seconds + self.rest_seconds + self.update_seconds


class Arm(Protocol):
    """One way to hold a conversation."""

    def turn(self, queries: Rows) -> Turn:
        """Answer the next query of every conversation."""
        ...


class Reactive:
    """The Reactive Transformer: only the memory goes from turn to turn."""

    def __init__(self, machine: Machine, model: ReactiveTransformer, stepper: Stepper, batch: int, new: int) -> None:
        self.machine, self.model, self.stepper, self.new = machine, model, stepper, new
        self.memory = model.initial_memory(torch.arange(batch))

    @torch.no_grad()
    def turn(self, queries: Rows) -> Turn:
        """See `Arm`."""
        turn = _answered(self.machine, self.model, self.stepper, queries, self.memory, self.new)
        started = self.machine.now()
        interactions = [query + answer for query, answer in zip(queries, turn.answers, strict=True)]
        self.memory = self.model.write(self.memory, torch.tensor(interactions, device=self.machine.device))
        turn.update_seconds = self.machine.now() - started
        turn.processed += sum(map(len, interactions))
        turn.kept_bytes = self.memory.numel() * self.memory.element_size()
        cross = self.model.config.decoder.cross_attention
        projected = 2 * self.memory.shape[:3].numel() * cross.key_value_heads * self.model.config.head_size
        turn.answering_bytes += turn.kept_bytes + projected * self.memory.element_size()
        return turn


class Rereading:
    """The stateless baseline: its prompt is the whole history, of which it keeps the token ids (int64)."""

    def __init__(self, machine: Machine, model: StatelessTransformer, stepper: Stepper, batch: int, new: int) -> None:
        self.machine, self.model, self.stepper, self.new = machine, model, stepper, new
        self.history: Rows = [[] for _ in range(batch)]

    def turn(self, queries: Rows) -> Turn:
        """See `Arm`."""
        prompts = [past + query for past, query in zip(self.history, queries, strict=True)]
        turn = _answered(self.machine, self.model, self.stepper, prompts, None, self.new)
        self.history = [prompt + answer for prompt, answer in zip(prompts, turn.answers, strict=True)]
        turn.kept_bytes = 8 * sum(map(len, self.history))
        turn.answering_bytes += turn.kept_bytes
        return turn


class Keeping:
    """The baseline that keeps its KV cache between turns: only the new query goes through the decoder."""

    def __init__(self, machine: Machine, model: StatelessTransformer, batch: int, new: int) -> None:
        self.machine, self.model, self.new = machine, model, new
        self.cache = model.decoder.start_cache(None, batch, model.config.max_length)
        self.used = 0
        self.unread: Rows = [[] for _ in range(batch)]  # each answer's last token is read with the next query

    @torch.no_grad()
    def turn(self, queries: Rows) -> Turn:
        """See `Arm`."""
        started = self.machine.now()
        new = [last + query for last, query in zip(self.unread, queries, strict=True)]
        token = self._next(torch.tensor(new, device=self.machine.device))
        steps = [token.tolist()]  # on the host, as `generate` yields them
        between = self.machine.now()
        for _ in range(self.new - 1):
            token = self._next(token[:, None])
            steps.append(token.tolist())
        rest = self.machine.now() - between
        answers = [list(answer) for answer in zip(*steps, strict=True)]
        self.unread = [answer[-1:] for answer in answers]
        held = _cache_bytes(self.model, len(new) * self.used)
        processed = len(new) * (len(new[0]) + self.new - 1)
        return Turn(answers, between - started, rest, processed, kept_bytes=held, answering_bytes=held)

    def _next(self, ids: Tensor) -> Tensor:
        """The token [B] that follows new `ids` [B, T]."""
        decoder, length = self.model.decoder, self.used + ids.shape[1]
        positions = torch.arange(self.used, length, device=ids.device).expand(ids.shape)
        states = decoder.step(self.model.embedding(ids), positions, self.cache, length)
        self.used = length
        return choose(decoder.head(states[:, -1]), SamplingOptions(), torch.zeros(len(ids), device=ids.device))


def _answered(
    machine: Machine, model: LanguageModel, stepper: Stepper, prompts: Rows, memory: Tensor | None, new: int
) -> Turn:
    """Answers by `generate`, as users run it."""
    started = machine.now()
    stream = generate(model, prompts, memory, SamplingOptions(max_new_tokens=new), stepper=stepper)
    steps = [next(stream)]
    between = machine.now()
    steps += stream
    rest = machine.now() - between
    answers = [[token for token in answer if token is not None] for answer in zip(*steps, strict=True)]
    processed = sum(len(prompt) + new - 1 for prompt in prompts)
    length = max(map(len, prompts)) + new if stepper.execution == "eager" else model.config.max_length
    held = _cache_bytes(model, len(prompts) * length)
    return Turn(answers, between - started, rest, processed, answering_bytes=held)


def _cache_bytes(model: LanguageModel, tokens: int) -> int:
    """Keys and values of self-attention of so many tokens."""
    heads = model.config.decoder.self_attention.key_value_heads
    numbers = 2 * len(model.decoder.layers) * heads * model.config.head_size * tokens
    return numbers * model.embedding.weight.element_size()

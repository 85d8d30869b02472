"""Answering one message at a time: cached generation, then the memory write, as a stream of typed events."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_platform.data.tokenizer import EOS, PAD
from rxt_platform.errors import DataError
from rxt_platform.model.transformer import ReactiveTransformer


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None  # the model's window, if not given


@dataclass(frozen=True)
class Token:
    """One generated token id."""

    id: int


@dataclass(frozen=True)
class MemoryUpdateStarted:
    """The answer is complete; the memory is being written."""


@dataclass(frozen=True)
class MemoryUpdated:
    """The memory after the write, and its relative change (norm of the difference / norm before)."""

    memory: Tensor
    change: float


Event = Token | MemoryUpdateStarted | MemoryUpdated


@torch.no_grad()
def generate(
    model: ReactiveTransformer,
    prompts: Sequence[Sequence[int]],
    memory: Tensor,
    options: SamplingOptions = SamplingOptions(),
) -> Iterator[list[int | None]]:
    """Answer a batch of prompts (`[BOS][Q]query[A]` ids of any lengths) over `memory` [L, B, S, D].

    Yields, for every step, each row's next token, None where the row has ended. A row ends after `[EOS]`, when the
    model's window is full, or after `max_new_tokens`. Raises DataError when a prompt leaves no room to answer.
    """
    window = model.config.max_length
    for row, prompt in enumerate(prompts):
        if len(prompt) >= window:
            raise DataError(f"prompt {row} has {len(prompt)} tokens: no room to answer in a window of {window}")
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids, mask = _right_padded(prompts, lengths)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    cache = model.decoder.start_cache(memory, window)
    states = model.decoder.step(model.embedding(ids), mask, positions, cache)
    last = states[torch.arange(len(prompts), device=device), lengths - 1]
    generators = [torch.Generator().manual_seed(options.seed + row) for row in range(len(prompts))]
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    limit = window if options.max_new_tokens is None else options.max_new_tokens
    for _ in range(limit):
        if not bool(alive.any()):
            return
        chosen = choose(model.head(last), options, generators)
        yield [token if live else None for token, live in zip(chosen.tolist(), alive.tolist(), strict=True)]
        alive = alive & (chosen != EOS) & (lengths + 1 < window)
        positions = lengths.clamp(max=window - 1)[:, None]
        lengths = lengths + 1
        embedded = model.embedding(chosen.masked_fill(~alive, PAD)[:, None])
        keep = torch.ones_like(positions, dtype=torch.bool)
        last = model.decoder.step(embedded, keep, positions, cache)[:, 0]


def choose(logits: Tensor, options: SamplingOptions, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row [B] from logits [B, V]: greedy, or from the smallest set of mass `top_p`."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / options.temperature).softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    ordered = ordered * (ordered.cumsum(dim=-1) - ordered < options.top_p)
    picks = [torch.multinomial(row.cpu(), 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
    return order.gather(1, torch.stack(picks).to(order.device))[:, 0]


def answer_batch(
    model: ReactiveTransformer, prompts: Sequence[Sequence[int]], memory: Tensor, options: SamplingOptions
) -> list[list[int]]:
    """The whole answers (with `[EOS]` where the model gave one) of a batch of prompts."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, memory, options):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


@torch.no_grad()
def interact(
    model: ReactiveTransformer, prompt: Sequence[int], memory: Tensor, options: SamplingOptions = SamplingOptions()
) -> Iterator[Event]:
    """One turn of a conversation: the answer's tokens, then the memory [L, 1, S, D] written with query and answer."""
    answer: list[int] = []
    for (token,) in generate(model, [prompt], memory, options):
        assert token is not None  # a single row's generation stops when it ends
        answer.append(token)
        yield Token(token)
    yield MemoryUpdateStarted()
    ids = torch.tensor([[*prompt, *answer]], device=memory.device)
    written = model.write(memory, ids, torch.ones_like(ids, dtype=torch.bool))
    yield MemoryUpdated(written, float((written - memory).norm() / memory.norm()))


def _right_padded(prompts: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]."""
    longest = int(lengths.max())
    rows = [[*prompt, *[PAD] * (longest - len(prompt))] for prompt in prompts]
    ids = torch.tensor(rows, device=lengths.device)
    return ids, torch.arange(longest, device=lengths.device) < lengths[:, None]

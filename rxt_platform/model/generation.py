"""Answering one message at a time: cached generation, then the memory write, as a stream of typed events.

Every conversation of a batch has its own prompt, memory, seed and end, and is answered as it would be alone. The prompt
goes through the decoder once, the memory's keys and values are projected once, and each token then costs one step.
How a reply begins, with its answer or with thoughts, is the marker that `open_reply` puts at the prompt's end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import ANSWER, PAD, THINK
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.decoder import Cache
from rxt_platform.model.sampling import GREEDY, NOT_FINITE, SamplingOptions, choose, uniform_draws
from rxt_platform.model.stepper import LanguageModel, Stepper
from rxt_platform.model.transformer import ReactiveTransformer

ThinkingMode = Literal["fast", "extended", "auto"]


@dataclass(frozen=True)
class Token:
    """One generated token id."""

    id: int


@dataclass(frozen=True)
class Tokens:
    """The next token id of each conversation of a batch; None where the answer has ended."""

    ids: list[int | None]


@dataclass(frozen=True)
class MemoryUpdateStarted:
    """The answer is complete; the memory is being written."""


@dataclass(frozen=True)
class MemoryUpdated:
    """The memory [L, B, S, D] after the write, and its relative change (norm of the difference / norm before)."""

    memory: Tensor
    change: float


Event = Token | MemoryUpdateStarted | MemoryUpdated
BatchEvent = Tokens | MemoryUpdateStarted | MemoryUpdated


@torch.no_grad()
def open_reply(
    model: LanguageModel, prompts: Sequence[Sequence[int]], memory: Tensor | None, mode: ThinkingMode
) -> list[list[int]]:
    """The prompts (`[BOS][Q]query` ids of any lengths) with the marker at their end that their replies open with.

    "fast" is `[A]`: the answer at once. "extended" is `[T]`: thoughts first, whose end the model marks itself. "auto"
    costs a pass over the prompts and memory [L, B, S, D]: each row gets the marker that is the likelier one after it
    (`[A]` if both are equally likely), once for its whole reply. Raises what `generate` does, and DataError for another
    mode.
    """
    if mode not in get_args(ThinkingMode):
        raise DataError(f"thinking mode {mode!r}: one of {', '.join(get_args(ThinkingMode))}")
    _check_prompts(model.config, prompts, markers=1)
    if mode != "auto":
        return [[*prompt, ANSWER if mode == "fast" else THINK] for prompt in prompts]
    _check_memory(model, memory, len(prompts))
    at = torch.tensor([len(prompt) for prompt in prompts], device=model.embedding.weight.device)
    ids, mask = right_padded(prompts, at)
    states, *_ = model.decoder(model.embedding(ids), mask, memory)
    logits = model.decoder.head(states[torch.arange(len(prompts), device=at.device), at - 1])
    finite = logits.isfinite().all(dim=-1).tolist()
    if not all(finite):
        raise _not_finite(finite.index(False), "the marker")
    thinks = (logits[:, THINK] > logits[:, ANSWER]).tolist()
    return [[*prompt, THINK if first else ANSWER] for prompt, first in zip(prompts, thinks, strict=True)]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    memory: Tensor | None,
    options: SamplingOptions = GREEDY,
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    stepper: Stepper | None = None,
    copies: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Answer a batch of prompts (`[BOS][Q]query[A]` ids of any lengths) over `memory` [L, B, S, D] (None without one).

    A reply that begins with thoughts is asked for by another marker, see `open_reply`. Yields, for every step, each
    row's next token, None where the row has ended. A row ends after a stop token, when the model's window is full, or
    after `max_new_tokens`, its own of `limits` if given. With `copies` each prompt is answered so many times, one after
    the other in the rows, but read once; `seeds` are then the answers', `limits` the prompts'. Raises DataError for a
    prompt that is empty, leaves no room to answer or holds ids that the model does not have, ModelError for a memory
    that is not this model's and for logits that are not finite.
    """
    asked, window = len(prompts), model.config.max_length
    copies = [1] * asked if copies is None else copies
    rows = sum(copies)
    for name, given, what, wanted in (
        ("seeds", seeds, "answers", rows),
        ("limits", limits, "prompts", asked),
        ("copies", copies, "prompts", asked),
    ):
        if given is not None and len(given) != wanted:
            raise DataError(f"{len(given)} {name} for {wanted} {what}: give each its own")
    if asked and min(copies) < 1:
        raise DataError(f"{min(copies)} copies: each prompt is answered once or more")
    ends = _last_lengths(model.config, prompts, options, limits)
    _check_memory(model, memory, asked)
    stepper = stepper or Stepper(model)
    device = model.embedding.weight.device
    draws = uniform_draws([options.seed + row for row in range(rows)] if seeds is None else seeds, options, window).to(
        device
    )

    source = [prompt for prompt, count in enumerate(copies) for _ in range(count)]
    logits, cache = _read(stepper, prompts, memory, max(ends), source)
    lengths, ends = [len(prompts[prompt]) for prompt in source], [ends[prompt] for prompt in source]
    chosen = choose(logits, options, draws[:, 0])
    alive, present = [True] * rows, list(range(rows))  # `present` are the rows that are computed
    for turn in range(1, window + 1):
        said: list[int | None] = [None] * rows
        for row, token in zip(present, chosen.tolist(), strict=True):
            if alive[row]:
                if token == NOT_FINITE:
                    raise _not_finite(row, f"token {turn}")
                said[row] = token
                lengths[row] += 1
                alive[row] = token not in options.stop and lengths[row] < ends[row]
        yield said
        live = [row for row in present if alive[row]]
        if not live:
            return
        if stepper.execution == "eager" and len(live) <= len(present) // 2:  # of other ways, shapes repeat
            kept = torch.tensor([at for at, row in enumerate(present) if alive[row]], device=device)
            present, cache, chosen, draws = live, cache.rows(kept), chosen[kept], draws[kept]
        # Rows that have ended go on with [PAD] at the last place of the cache: what they compute is not looked at.
        going = [alive[row] for row in present]
        places = [lengths[row] - 1 if alive[row] else max(ends) - 1 for row in present]
        chosen = chosen.where(torch.tensor(going, device=device), PAD)
        used = max(lengths[row] for row in live)
        chosen = stepper.next(
            chosen,
            torch.tensor(places, device=device),
            draws[:, min(turn, draws.shape[1] - 1)],
            cache,
            options,
            used,
        )


def _read(
    stepper: Stepper, prompts: Sequence[Sequence[int]], memory: Tensor | None, length: int, source: Sequence[int]
) -> tuple[Tensor, Cache]:
    """What follows the prompts: logits [B, V] and a cache of `length` tokens of B answers, to the prompts `source`."""
    model = stepper.model
    at = torch.tensor([len(prompt) for prompt in prompts], device=model.embedding.weight.device)
    ids, mask = right_padded(prompts, at)
    cache = stepper.start(memory, len(prompts), length)
    states = model.decoder.prefill(model.embedding(ids), mask, cache)
    logits = model.decoder.head(states[torch.arange(len(prompts), device=at.device), at - 1])
    if len(source) == len(prompts):
        return logits, cache
    rows = torch.tensor(source, device=at.device)
    return logits[rows], cache.rows(rows)


def _last_lengths(
    config: ModelConfig, prompts: Sequence[Sequence[int]], options: SamplingOptions, limits: Sequence[int] | None
) -> list[int]:
    """Of each row, how long prompt and answer may get together. Raises DataError for prompts that can't be answered."""
    _check_prompts(config, prompts)
    ends = []
    for row, prompt in enumerate(prompts):
        limit = options.max_new_tokens if limits is None else limits[row]
        if limit is not None and limit < 1:
            raise DataError(f"limit {limit} of prompt {row}: must be 1 token or more")
        ends.append(config.max_length if limit is None else min(config.max_length, len(prompt) + limit))
    return ends


def _check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], markers: int = 0) -> None:
    """Raises DataError for prompts that can't be answered, with so many `markers` still to come to each."""
    if not prompts:
        raise DataError("no prompts to answer")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {row} is empty")
        if (length := len(prompt) + markers) >= config.max_length:
            raise DataError(f"prompt {row} has {length} tokens: no room to answer in a window of {config.max_length}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise DataError(
                f"prompt {row} holds token id {max(prompt) if min(prompt) >= 0 else min(prompt)}: the model knows "
                f"0 to {config.vocab_size - 1}; it was made with another tokenizer"
            )


def _check_memory(model: LanguageModel, memory: Tensor | None, rows: int) -> None:
    """Raises ModelError unless the memory [L, B, S, D] is one that the model can answer `rows` prompts over."""
    if isinstance(model, ReactiveTransformer):
        if memory is None:
            raise ModelError("a Reactive Transformer answers over a memory: pass model.initial_memory(seeds)")
        model.check_memory(memory, rows)


def _not_finite(row: int, what: str) -> ModelError:
    return ModelError(f"row {row}: the logits of {what} are not finite: the weights or the memory hold NaN or infinity")


def answer_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    memory: Tensor | None,
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    stepper: Stepper | None = None,
    copies: Sequence[int] | None = None,
) -> list[list[int]]:
    """The whole answers (with the stop token where the model gave one) of a batch of prompts, see `generate`."""
    answers: list[list[int]] = [[] for _ in range(len(prompts) if copies is None else sum(copies))]
    for step in generate(model, prompts, memory, options, seeds, limits, stepper, copies):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


@torch.no_grad()
def interact_batch(
    model: ReactiveTransformer,
    prompts: Sequence[Sequence[int]],
    memory: Tensor,
    options: SamplingOptions = GREEDY,
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    stepper: Stepper | None = None,
) -> Iterator[BatchEvent]:
    """One turn of a batch of conversations: their answers' tokens, then the memory written with query and answer."""
    interactions = [list(prompt) for prompt in prompts]
    for step in generate(model, prompts, memory, options, seeds, limits, stepper):
        for interaction, token in zip(interactions, step, strict=True):
            if token is not None:
                interaction.append(token)
        yield Tokens(step)
    yield MemoryUpdateStarted()
    device = memory.device
    ids, mask = right_padded(interactions, torch.tensor([len(row) for row in interactions], device=device))
    written = model.write(memory, ids, mask if len(interactions) > 1 else None)
    check_written(written)
    yield MemoryUpdated(written, float((written - memory).norm() / memory.norm()))


def check_written(memory: Tensor) -> None:
    """Raises ModelError for a memory that holds NaN or infinity: the one before is still good."""
    if not memory.isfinite().all():
        raise ModelError("what was written into the memory is not finite: the weights hold NaN or infinity; not kept")


def interact(
    model: ReactiveTransformer,
    prompt: Sequence[int],
    memory: Tensor,
    options: SamplingOptions = GREEDY,
    stepper: Stepper | None = None,
) -> Iterator[Event]:
    """One turn of one conversation, see `interact_batch`."""
    for event in interact_batch(model, [prompt], memory, options, stepper=stepper):
        if isinstance(event, Tokens):
            (token,) = event.ids
            assert token is not None  # a single row's generation stops when it ends
            yield Token(token)
        else:
            yield event


def right_padded(rows: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of rows that are so long (`lengths` [B], on the device that they go to)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], device=lengths.device)
    return ids, torch.arange(longest, device=lengths.device) < lengths[:, None]

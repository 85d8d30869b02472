"""Answering one message at a time: cached generation, then the memory write, as a stream of typed events.

Every conversation of a batch has its own prompt, memory, seed and end, and is answered as it would be alone. The prompt
goes through the decoder once, the memory's keys and values are projected once, and each token then costs one step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import EOS, PAD
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.decoder import Cache, Decoder
from rxt_platform.model.transformer import ReactiveTransformer

Execution = Literal["eager", "compile", "cuda_graph"]
_FIRST = 512  # tokens that are sorted first when drawing from a nucleus
_NOT_FINITE = -1  # in place of a token, where the logits held NaN or infinity


class LanguageModel(Protocol):
    """What generation needs of a model, with or without memory."""

    config: ModelConfig
    embedding: nn.Embedding
    decoder: Decoder


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and when an answer ends.

    temperature 0 takes the most likely token. Otherwise tokens are drawn from the `top_k` likeliest (all if not given),
    of those from the smallest set whose probability reaches `top_p`. Row i of a batch draws with seed + i, unless rows
    are given their own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None  # until the model's window is full, if not given
    top_k: int | None = None
    stop: tuple[int, ...] = (EOS,)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise DataError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p {self.top_p}: must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k {self.top_k}: must be 1 or more")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens {self.max_new_tokens}: must be 1 or more")


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


class Stepper:
    """Runs the decoding steps of a model: eagerly, compiled, or as a replayed CUDA graph.

    Compiled code and graphs are kept between calls of `generate`, for each batch size and cache length. A CUDA graph
    has one cache in fixed memory, so one generation at a time.
    """

    def __init__(self, model: LanguageModel, execution: Execution = "eager") -> None:
        if execution == "cuda_graph" and model.embedding.weight.device.type != "cuda":
            raise ModelError(
                f"cuda_graph needs a model on a CUDA device, this one is on {model.embedding.weight.device}"
            )
        self.model, self.execution = model, execution
        self._step = torch.compile(_next_tokens, dynamic=False) if execution == "compile" else _next_tokens
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def start(self, memory: Tensor | None, batch: int, length: int) -> Cache:
        """A cache for one generation. Other than eager ones have the whole window's length, so that shapes repeat."""
        length = length if self.execution == "eager" else self.model.config.max_length
        return self.model.decoder.start_cache(memory, batch, length)

    def next(
        self, tokens: Tensor, positions: Tensor, draws: Tensor, cache: Cache, options: SamplingOptions, length: int
    ) -> Tensor:
        """The token that follows `tokens` [B] at `positions` [B]; `length` says how much of the cache is in use."""
        if self.execution == "cuda_graph":
            key = (len(tokens), cache.length, options.temperature, options.top_k, options.top_p)
            if key not in self._graphs:
                self._graphs[key] = _Graph(self.model, cache, options, len(tokens))
            return self._graphs[key].replay(tokens, positions, draws, cache)
        used = length if self.execution == "eager" else cache.length
        return self._step(self.model, tokens, positions, draws, cache, options, used)


class _Graph:
    """A captured decoding step with its own input, output and cache tensors."""

    def __init__(self, model: LanguageModel, cache: Cache, options: SamplingOptions, batch: int) -> None:
        device = model.embedding.weight.device
        self.tokens, self.positions = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.draws = torch.zeros(batch, device=device)
        self.cache = Cache(
            [keys.clone() for keys in cache.keys],
            [values.clone() for values in cache.values],
            [None if pair is None else (pair[0].clone(), pair[1].clone()) for pair in cache.memory],
        )
        self._filled_from: Cache | None = None

        def step() -> Tensor:
            return _next_tokens(model, self.tokens, self.positions, self.draws, self.cache, options, cache.length)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels choose their algorithms and allocate before the capture
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step()

    def replay(self, tokens: Tensor, positions: Tensor, draws: Tensor, cache: Cache) -> Tensor:
        """The step's result; the first replay of a generation takes over its prefilled cache."""
        if self._filled_from is not cache:
            for mine, theirs in zip(_tensors(self.cache), _tensors(cache), strict=True):
                mine.copy_(theirs)
            self._filled_from = cache
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.draws.copy_(draws)
        self.graph.replay()
        return self.output.clone()


def _tensors(cache: Cache) -> list[Tensor]:
    memory = [tensor for pair in cache.memory if pair is not None for tensor in pair]
    return [*cache.keys, *cache.values, *memory]


def _next_tokens(
    model: LanguageModel,
    tokens: Tensor,
    positions: Tensor,
    draws: Tensor,
    cache: Cache,
    options: SamplingOptions,
    length: int,
) -> Tensor:
    """One decoding step, without a look at any value: [B] -> [B]."""
    states = model.decoder.step(model.embedding(tokens)[:, None], positions[:, None], cache, length)
    return choose(model.decoder.head(states[:, 0]), options, draws)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    memory: Tensor | None,
    options: SamplingOptions = SamplingOptions(),
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    stepper: Stepper | None = None,
) -> Iterator[list[int | None]]:
    """Answer a batch of prompts (`[BOS][Q]query[A]` ids of any lengths) over `memory` [L, B, S, D] (None without one).

    Yields, for every step, each row's next token, None where the row has ended. A row ends after a stop token, when the
    model's window is full, or after `max_new_tokens`, its own of `limits` if given. Raises DataError for a prompt that
    is empty, leaves no room to answer or holds ids that the model does not have, ModelError for a memory that is not
    this model's and for logits that are not finite.
    """
    rows, window = len(prompts), model.config.max_length
    for name, given in (("seeds", seeds), ("limits", limits)):
        if given is not None and len(given) != rows:
            raise DataError(f"{len(given)} {name} for {rows} prompts: give each its own")
    ends = _last_lengths(model.config, prompts, options, limits)
    if isinstance(model, ReactiveTransformer):
        if memory is None:
            raise ModelError("a Reactive Transformer answers over a memory: pass model.initial_memory(seeds)")
        model.check_memory(memory, rows)
    stepper = stepper or Stepper(model)
    device = model.embedding.weight.device
    draws = _draws([options.seed + row for row in range(rows)] if seeds is None else seeds, options, window).to(device)

    lengths = [len(prompt) for prompt in prompts]
    at = torch.tensor(lengths, device=device)
    ids, mask = _right_padded(prompts, at)
    cache = stepper.start(memory, rows, max(ends))
    states = model.decoder.prefill(model.embedding(ids), mask, cache)
    last = states[torch.arange(rows, device=device), at - 1]
    chosen = choose(model.decoder.head(last), options, draws[:, 0])
    alive = [True] * rows
    for turn in range(1, window + 1):
        tokens = chosen.tolist()
        broken = [row for row, token in enumerate(tokens) if alive[row] and token == _NOT_FINITE]
        if broken:
            raise ModelError(
                f"row {broken[0]}: the logits of token {turn} are not finite: the weights or the "
                "memory hold NaN or infinity"
            )
        yield [token if live else None for token, live in zip(tokens, alive, strict=True)]
        lengths = [length + 1 for length in lengths]
        alive = [
            live and token not in options.stop and length < end
            for live, token, length, end in zip(alive, tokens, lengths, ends, strict=True)
        ]
        if not any(alive):
            return
        # Rows that have ended go on with [PAD] at the last place of the cache: what they compute is not looked at.
        places = [length - 1 if live else max(ends) - 1 for length, live in zip(lengths, alive, strict=True)]
        chosen = chosen.where(torch.tensor(alive, device=device), PAD)
        used = max(place for place, live in zip(places, alive, strict=True) if live) + 1
        chosen = stepper.next(
            chosen,
            torch.tensor(places, device=device),
            draws[:, min(turn, draws.shape[1] - 1)],
            cache,
            options,
            max(used, 1),
        )


def _last_lengths(
    config: ModelConfig, prompts: Sequence[Sequence[int]], options: SamplingOptions, limits: Sequence[int] | None
) -> list[int]:
    """Of each row, how long prompt and answer may get together. Raises DataError for prompts that can't be answered."""
    if not prompts:
        raise DataError("no prompts to answer")
    ends = []
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {row} is empty")
        if len(prompt) >= config.max_length:
            raise DataError(
                f"prompt {row} has {len(prompt)} tokens: no room to answer in a window of {config.max_length}"
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise DataError(
                f"prompt {row} holds token id {max(prompt) if min(prompt) >= 0 else min(prompt)}: the model knows "
                f"0 to {config.vocab_size - 1}; it was made with another tokenizer"
            )
        limit = options.max_new_tokens if limits is None else limits[row]
        if limit is not None and limit < 1:
            raise DataError(f"limit {limit} of prompt {row}: must be 1 token or more")
        ends.append(config.max_length if limit is None else min(config.max_length, len(prompt) + limit))
    return ends


def _draws(seeds: Sequence[int], options: SamplingOptions, window: int) -> Tensor:
    """Uniform numbers [B, window] in [0, 1), one for each token, each row's from its own seed; [B, 1] when greedy."""
    if options.temperature == 0:
        return torch.zeros(len(seeds), 1)
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise DataError(f"seeds {list(seeds)}: each must be in [0, 2**63)")
    return torch.stack([torch.rand(window, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def choose(logits: Tensor, options: SamplingOptions, draws: Tensor) -> Tensor:
    """The next token of each row [B] from logits [B, V] and uniform `draws` [B]; -1 where a logit is not finite.

    Drawn by inverting the cumulative distribution of the tokens that may be drawn.
    """
    broken = ~logits.sum(dim=-1, dtype=torch.float32).isfinite()  # one pass; NaN and infinity survive a sum
    if options.temperature == 0:
        return logits.argmax(dim=-1).masked_fill(broken, _NOT_FINITE)
    logits = logits.float()
    ordered = ((logits - logits.amax(dim=-1, keepdim=True)) / options.temperature).softmax(dim=-1)
    order = None
    if options.top_k is not None or options.top_p < 1:
        ordered, order = _likeliest(ordered, options)
        mass = 1.0 if options.top_k is None else ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered * (before < options.top_p * mass)
    ends = ordered.cumsum(dim=-1)
    place = (ends <= draws[:, None] * ends[:, -1:]).sum(dim=-1, keepdim=True)
    # Rounding may take a draw next to 1 past the end; the last token with any probability is where the sum is reached.
    place = place.minimum((ends < ends[:, -1:]).sum(dim=-1, keepdim=True))
    picked = place if order is None else order.gather(1, place)
    return picked[:, 0].masked_fill(broken, _NOT_FINITE)


def _likeliest(probabilities: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first, with their probabilities: all that `top_k` and `top_p` keep.

    Sorting a whole vocabulary costs more than a small model's step, so where values can be looked at, it is done only
    if the first tokens don't reach `top_p`.
    """
    vocabulary = probabilities.shape[-1]
    fixed = torch.compiler.is_compiling() or (probabilities.is_cuda and torch.cuda.is_current_stream_capturing())
    if options.top_k is None and vocabulary > _FIRST and not fixed:
        first = probabilities.topk(_FIRST, dim=-1)
        if bool((first.values.sum(dim=-1) >= options.top_p).all()):
            return first.values, first.indices
    kept = probabilities.topk(min(options.top_k or vocabulary, vocabulary), dim=-1)
    return kept.values, kept.indices


def answer_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    memory: Tensor | None,
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    stepper: Stepper | None = None,
) -> list[list[int]]:
    """The whole answers (with the stop token where the model gave one) of a batch of prompts, see `generate`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, memory, options, seeds, limits, stepper):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


@torch.no_grad()
def interact_batch(
    model: ReactiveTransformer,
    prompts: Sequence[Sequence[int]],
    memory: Tensor,
    options: SamplingOptions = SamplingOptions(),
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
    ids, mask = _right_padded(interactions, torch.tensor([len(row) for row in interactions], device=device))
    written = model.write(memory, ids, mask if len(interactions) > 1 else None)
    yield MemoryUpdated(written, float((written - memory).norm() / memory.norm()))


def interact(
    model: ReactiveTransformer,
    prompt: Sequence[int],
    memory: Tensor,
    options: SamplingOptions = SamplingOptions(),
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


def _right_padded(rows: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], device=lengths.device)
    return ids, torch.arange(longest, device=lengths.device) < lengths[:, None]

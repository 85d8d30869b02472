"""Runs decoding steps: eagerly, compiled by torch, or as replayed CUDA graphs."""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.errors import ModelError
from rxt_platform.model.decoder import Cache, Decoder
from rxt_platform.model.sampling import SamplingOptions, choose

Execution = Literal["eager", "compile", "cuda_graph"]


class LanguageModel(Protocol):
    """What generation needs of a model, with or without memory."""

    config: ModelConfig
    embedding: nn.Embedding
    decoder: Decoder


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

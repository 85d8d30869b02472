"""Runs decoding steps: eagerly, compiled by torch, or as replayed CUDA graphs."""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.errors import ModelError
from rxt_platform.model.decoder import Cache, Decoder
from rxt_platform.model.feedforward import MixtureOfExperts
from rxt_platform.model.sampling import SamplingOptions, choose

Execution = Literal["eager", "compile", "cuda_graph"]
_GRAPHS_KEPT = 4


class LanguageModel(Protocol):
    """What generation needs of a model, with or without memory."""

    config: ModelConfig
    embedding: nn.Embedding
    decoder: Decoder


class Stepper:
    """Runs the decoding steps of a model: eagerly, compiled, or as a replayed CUDA graph.

    Compiled code and graphs are kept between calls of `generate`: one for each batch size, temperature, top_k and top_p
    (compiled code for eight of them at most, then torch goes on eagerly; graphs for the last four).
    """

    def __init__(self, model: LanguageModel, execution: Execution = "eager") -> None:
        if execution not in get_args(Execution):
            raise ModelError(f"execution {execution!r}: one of {', '.join(get_args(Execution))}")
        self.model, self.execution = model, execution
        if execution == "cuda_graph":
            _check_capturable(model)
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
            return self._graph(cache, options, len(tokens)).replay(tokens, positions, draws, cache)
        used = length if self.execution == "eager" else cache.length
        return self._step(self.model, tokens, positions, draws, cache, options, used, self.execution == "eager")

    def _graph(self, cache: Cache, options: SamplingOptions, batch: int) -> "_Graph":
        weight = self.model.embedding.weight  # a model that was moved or cast has other weights than the graph
        key = (batch, options.temperature, options.top_k, options.top_p, weight.data_ptr(), weight.dtype)
        if key not in self._graphs:
            if len(self._graphs) >= _GRAPHS_KEPT:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = _Graph(self.model, cache, options, batch)
        return self._graphs[key]


def _check_capturable(model: LanguageModel) -> None:
    """Raises ModelError where the steps can't be captured: grouped products look at their groups' sizes on the host."""
    weight = model.embedding.weight
    if weight.device.type != "cuda":
        raise ModelError(f"cuda_graph needs a model on a CUDA device, this one is on {weight.device}")
    routed = any(isinstance(part, MixtureOfExperts) for part in model.decoder.modules())
    if routed and (weight.dtype != torch.bfloat16 or torch.cuda.get_device_capability(weight.device) < (9, 0)):
        raise ModelError(
            f"cuda_graph of a mixture of experts needs bf16 weights (these are {weight.dtype}) and a device of compute "
            "capability 9.0"
        )


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
            return _next_tokens(
                model, self.tokens, self.positions, self.draws, self.cache, options, cache.length, False
            )

        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # kernels choose their algorithms and allocate before the capture
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.output = step()

    def replay(self, tokens: Tensor, positions: Tensor, draws: Tensor, cache: Cache) -> Tensor:
        """The step's result. A generation's cache is taken over at its first replay, and given back to it when another
        generation comes between."""
        if self._filled_from is not cache:
            if self._filled_from is not None:
                for mine, theirs in zip(_tensors(self.cache), _tensors(self._filled_from), strict=True):
                    theirs.copy_(mine)
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
    look: bool,
) -> Tensor:
    """One decoding step: [B] -> [B]; unless it may `look`, without reading any value on the host."""
    states = model.decoder.step(model.embedding(tokens)[:, None], positions[:, None], cache, length)
    return choose(model.decoder.head(states[:, 0]), options, draws, look)

"""A conversation with a model: the one place where memory lives on between turns, in this session object."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from rxt_platform.data.batches import derive_seed
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.model.generation import MemoryUpdated, SamplingOptions, Token, interact
from rxt_platform.model.parameters import measure_size
from rxt_platform.model.transformer import ReactiveTransformer


class ChatSession:
    """Answers messages one by one and keeps the memory between them."""

    def __init__(
        self,
        model: ReactiveTransformer,
        tokenizer: RxtTokenizer,
        options: SamplingOptions,
        truncate: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._truncate = truncate
        self.reset()

    @property
    def description(self) -> str:
        """One line on the model and its memory."""
        config = self._model.config
        count = measure_size(config).total.parameters
        return f"{count:,} parameters, memory of {config.layers} layers x {config.memory.slots} slots"

    def reset(self) -> None:
        """Start from the initial memory again."""
        self.memory = self._model.initial_memory(torch.tensor([self._options.seed]))
        self._turn = 0

    def say(self, query: str) -> Iterator[str | MemoryUpdated]:
        """Pieces of the answer's text as they are generated, then the memory's update.

        Raises DataError, and changes nothing, when the query is empty or too long (with `truncate` it loses its end).
        """
        prompt = self._tokenizer.encode_query(query, self._model.config.max_length, self._truncate)
        options = replace(self._options, seed=derive_seed(self._options.seed, self._turn))
        text = self._tokenizer.stream()
        for event in interact(self._model, prompt, self.memory, options):
            if isinstance(event, Token):
                yield text.push(event.id)
            elif isinstance(event, MemoryUpdated):
                yield text.end()
                self.memory = event.memory
                self._turn += 1
                yield event

"""A conversation with a model: the one place where memory lives on between turns, in this session object."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from rxt_platform.data.batches import derive_seed
from rxt_platform.data.tokenizer import EOS, RxtTokenizer
from rxt_platform.model.generation import MemoryUpdated, SamplingOptions, Token, interact
from rxt_platform.model.transformer import ReactiveTransformer


class ChatSession:
    """Answers messages one by one and keeps the memory between them."""

    def __init__(self, model: ReactiveTransformer, tokenizer: RxtTokenizer, options: SamplingOptions) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self.reset()

    @property
    def description(self) -> str:
        """One line on the model and its memory."""
        config = self._model.config
        count = sum(parameter.numel() for parameter in self._model.parameters())
        return f"{count:,} parameters, memory of {config.layers} layers x {config.memory.slots} slots"

    def reset(self) -> None:
        """Start from the initial memory again."""
        self.memory = self._model.initial_memory(torch.tensor([self._options.seed]))
        self._turn = 0

    def say(self, query: str) -> Iterator[str | MemoryUpdated]:
        """Pieces of the answer's text as they are generated, then the memory's update."""
        options = replace(self._options, seed=derive_seed(self._options.seed, self._turn))
        answer: list[int] = []
        shown = ""
        for event in interact(self._model, self._tokenizer.encode_query(query), self.memory, options):
            if isinstance(event, Token) and event.id != EOS:
                answer.append(event.id)
                text = self._tokenizer.decode(answer)
                if not text.endswith("\ufffd"):  # a character's bytes may come in several tokens
                    yield text[len(shown) :]
                    shown = text
            elif isinstance(event, MemoryUpdated):
                yield self._tokenizer.decode(answer)[len(shown) :]
                self.memory = event.memory
                self._turn += 1
                yield event

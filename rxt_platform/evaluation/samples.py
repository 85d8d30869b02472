"""Free-running conversations: the model's own answers are what its memory gets, as in chat."""

from collections.abc import Sequence

import torch

from rxt_platform.data.rows import Conversation
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.model.generation import MemoryUpdated, Token, interact
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.transformer import ReactiveTransformer


def sample_conversations(
    model: ReactiveTransformer, tokenizer: RxtTokenizer, talks: Sequence[Conversation], options: SamplingOptions
) -> list[list[dict[str, str]]]:
    """Put each conversation's queries to the model; every turn is `{query, reference, answer}`."""
    sampled = []
    for talk in talks:
        memory = model.initial_memory(torch.tensor([options.seed]))
        turns = []
        for item in talk.interactions:
            answer: list[int] = []
            prompt = tokenizer.encode_query(item.query, model.config.max_length, truncate=True)
            for event in interact(model, prompt, memory, options):
                if isinstance(event, Token):
                    answer.append(event.id)
                elif isinstance(event, MemoryUpdated):
                    memory = event.memory
            turns.append({"query": item.query, "reference": item.answer, "answer": tokenizer.decode(answer)})
        sampled.append(turns)
    return sampled

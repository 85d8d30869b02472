"""Free-running conversations: the model's own answers are what its memory gets, as in chat."""

from collections.abc import Sequence

import torch

from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.rows import Conversation, RowError
from rxt_platform.data.tokenizer import RxtTokenizer, answer_ids
from rxt_platform.model.generation import MemoryUpdated, Token, interact
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.transformer import ReactiveTransformer


def sample_conversations(
    model: ReactiveTransformer, tokenizer: RxtTokenizer, talks: Sequence[Conversation], options: SamplingOptions
) -> list[list[dict[str, str]]]:
    """Put each conversation's queries to the model; every turn is `{query, reference, answer}`."""
    sampled = []
    encoder = RowEncoder(tokenizer, model.config.max_length)
    for talk in talks:
        memory = model.initial_memory(torch.tensor([options.seed]))
        turns = []
        for item in talk.interactions:
            answer: list[int] = []
            (made,) = encoder.encode([Conversation((item,))])
            assert not isinstance(made, RowError)  # what is too long is cut
            prompt = list(made[0].turns[0][: made[0].target_starts[0]])
            for event in interact(model, prompt, memory, options):
                if isinstance(event, Token):
                    answer.append(event.id)
                elif isinstance(event, MemoryUpdated):
                    memory = event.memory
            turns.append(
                {
                    "query": item.query,
                    "reference": item.reply,
                    "answer": tokenizer.decode(answer_ids(answer)),
                }
            )
        sampled.append(turns)
    return sampled

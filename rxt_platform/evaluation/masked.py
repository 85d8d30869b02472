"""How well encoder and MLM head together guess hidden tokens of whole interactions.

The head is as the last joint stage left it. Memory-aware training moves the encoder and not the head, so that after it
a low figure says that the two no longer fit, not that the encoder reads badly.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rxt_platform.data.batches import collate, derive_seed
from rxt_platform.data.tokenizer import MASK
from rxt_platform.evaluation.conversations import Talk
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.outcomes import TokenSums
from rxt_platform.evaluation.summary import token_entry
from rxt_platform.model.transformer import ReactiveTransformer

_HIDDEN_SHARE = 0.15  # of the tokens that are no special ones, as in BERT (arXiv:1810.04805, 3.1)


@torch.no_grad()
def masked_tokens(
    model: ReactiveTransformer, talks: Sequence[Talk], seed: int, bootstrap: Bootstrap, batch_size: int = 64
) -> dict[str, Any]:
    """{loss, accuracy, count, intervals: {loss, accuracy}} of the hidden tokens, each shown as `[MASK]`.

    Which tokens are hidden depends on the seed, the conversation and the turn alone.
    """
    device = model.embedding.weight.device
    turns = [
        (talk.number, talk.turn(turn), derive_seed(seed, "masked", talk.number, turn))
        for talk in talks
        for turn in range(len(talk.conversation.interactions))
    ]
    sums: list[tuple[int, TokenSums]] = []
    for start in range(0, len(turns), batch_size):
        numbers, examples, seeds = zip(*turns[start : start + batch_size], strict=True)
        batch = collate(examples, seeds, numbers, _HIDDEN_SHARE).to(device)
        ids, hidden = batch.ids[:, 0], batch.hidden[:, 0]
        states = model.encode(ids.masked_fill(hidden, MASK), batch.mask[:, 0])[-1]
        for row, number in enumerate(numbers):
            if hidden[row].any():
                loss, correct = model.mlm_head(states[row, hidden[row]], ids[row, hidden[row]])
                sums.append((number, TokenSums(float(loss), int(correct), int(hidden[row].sum()))))
    entry = token_entry(sums, bootstrap)
    for values in (entry, entry["intervals"]):
        del values["perplexity"]  # of a text with some tokens hidden, it is none
    return entry

"""Small real components for unit tests: a Reactive Transformer, a tokenizer and batches that fit in milliseconds."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.examples import Example
from rxt_platform.data.sampler import BatchSampler, Sampling
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD, QUERY, SPECIAL_TOKENS, RxtTokenizer
from rxt_platform.model.transformer import ReactiveTransformer

VOCAB = 64
FIRST_WORD = len(SPECIAL_TOKENS)  # the first id that is no special token


def tiny_config(memory: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Two layers of 32 channels, 8 slots, 3 experts; grouped queries in the cross-attention."""
    sparse = {"query_heads": 2, "key_value_heads": 2}
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "max_length": 24,
        "encoder": {"attention": sparse, "feed_forward_size": 48},
        "decoder": {
            "self_attention": sparse,
            "cross_attention": {"query_heads": 2, "key_value_heads": 1},
            "experts": {"number": 3, "per_token": 2, "size": 32},
        },
        "memory": {"slots": 8, "attention": sparse, **(memory or {})},
    }
    return ModelConfig.model_validate({**base, **changes})


def tiny_model(config: ModelConfig | None = None, seed: int = 0) -> ReactiveTransformer:
    """A freshly initialised model, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ReactiveTransformer(config or tiny_config()).eval()


def rows_of(*lengths: int, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Random ids of ordinary tokens, one row for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(FIRST_WORD, vocab, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and their mask."""
    width = width or max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return ids, mask


def interaction(query: int, answer: int, seed: int) -> tuple[tuple[int, ...], int]:
    """`[BOS][Q]query[A]answer[EOS]` of random tokens, and where the answer starts."""
    asked, told = rows_of(query, answer, seed=seed)
    return (BOS, QUERY, *asked, ANSWER, *told, EOS), query + 3


def conversation(*turns: tuple[int, int], seed: int = 0) -> Example:
    """Turns given by the lengths of their query and answer."""
    made = [interaction(query, answer, 1000 * seed + turn) for turn, (query, answer) in enumerate(turns)]
    return Example(tuple(ids for ids, _ in made), tuple(start for _, start in made))


def batch_of(examples: Sequence[Example], mask_probability: float = 0.0, seed: int = 7) -> Batch:
    """A global batch of these rows."""
    return collate(examples, [seed + 100 * i for i in range(len(examples))], range(len(examples)), mask_probability)


def sampler_of(examples: Sequence[Example], size: int, seed: int = 3, **settings: Any) -> BatchSampler:
    """A sampler with batches of `size` rows."""
    return BatchSampler(examples, Sampling(size, seed, **settings))


def gradients(model: nn.Module) -> dict[str, float]:
    """Largest absolute gradient of every parameter that has one."""
    return {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}


@cache
def word_tokenizer() -> RxtTokenizer:
    """Byte-level BPE of a few sentences, 300 tokens."""
    return RxtTokenizer.train(["Tom has a red hat. What has Tom? Lily likes cake and plays near the lake."] * 4, 300)

"""How well a tokenizer fits a language: tokens for each word and byte, unknown tokens, texts that don't come back."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from rxt_platform.data.corpus import part_path, read_rows, row_texts
from rxt_platform.data.sources import SECTIONS
from rxt_platform.data.tokenizer import UNK, RxtTokenizer

_ROWS = 2000


def measure_fertility(tokenizer: RxtTokenizer, corpus: Path) -> dict[str, dict[str, Any]]:
    """For each section, over its first 2,000 held-out rows: see `fertility_of`."""
    return {
        section: fertility_of(
            tokenizer,
            (text for one in islice(read_rows(corpus, section, "validation"), _ROWS) for text in row_texts(one.row)),
        )
        for section in SECTIONS
        if part_path(corpus, section, "validation").exists()
    }


def fertility_of(tokenizer: RxtTokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Counts over some texts: words (between blanks), bytes (UTF-8), tokens, unknown ones, and texts changed by a round
    trip; with tokens per word (fertility) and bytes per token.
    """
    given = list(texts)
    encoded = tokenizer.encode_all(given)
    words = sum(len(text.split()) for text in given)
    size = sum(len(text.encode()) for text in given)
    tokens = sum(map(len, encoded))
    return {
        "texts": len(given),
        "words": words,
        "bytes": size,
        "tokens": tokens,
        "tokens_per_word": tokens / max(words, 1),
        "bytes_per_token": size / max(tokens, 1),
        "unknown": sum(ids.count(UNK) for ids in encoded),
        "changed_by_round_trip": sum(tokenizer.decode(ids) != text for ids, text in zip(encoded, given, strict=True)),
    }

"""Conversations to be rewarded, and embeddings in which rewards can be worked out by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.model.files import save_model
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.rewards import Reward, ScoredTurn, TextEmbedding, score_conversations
from tests.unit.helpers import tiny_config, tiny_model, word_tokenizer

DEFAULT = RewardConfig()
OPENING = ScoredTurn("Tom has a hat.", "Good.", "Fine.", None)


class WordCounts:
    """An embedding in which cosines can be worked out by hand: one direction a word; `-word` is its opposite."""

    directions = ("a", "b", "c", "x", "y", "z", "red", "hat", "other", "things")

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return np.array([[self._count(text.split(), word) for word in self.directions] for text in texts])

    def _count(self, words: list[str], word: str) -> int:
        return words.count(word) - words.count(f"-{word}")


class Constant:
    """An embedding for which all texts are the same."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.ones((len(texts), 3))


def follow_up(generated: str, reference: str, saved: str) -> ScoredTurn:
    return ScoredTurn("And then?", reference, generated, saved)


def rewards_of(
    *turns: tuple[str, str, str], config: RewardConfig = DEFAULT, embedding: TextEmbedding | None = None
) -> list[Reward]:
    """Rewards of one conversation's follow-ups, each (generated, reference, saved)."""
    talk = [OPENING, *(follow_up(*turn) for turn in turns)]
    return score_conversations([talk], config, embedding or WordCounts())[0]


def config_with(**changes: Any) -> RewardConfig:
    return RewardConfig.model_validate(changes)


def word_model() -> ReactiveTransformer:
    """A model for `word_tokenizer`."""
    return tiny_model(tiny_config(vocab_size=word_tokenizer().vocab_size))


def write_word_model(directory: Path) -> Path:
    """The directory, with that model in it."""
    model = word_model()
    save_model(directory, model.config, model.state_dict(), word_tokenizer())
    return directory

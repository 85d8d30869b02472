"""The composite MRL reward of answers in conversations (REF 4), as text in, numbers out: models with different
tokenizers compare. BLEU counts words, and meaning is measured by a frozen embedding that no trainee moves.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.model.files import load_model
from rxt_platform.rl.bleu import sentence_bleu

_HASH_BUCKETS = 2**12


class TextEmbedding(Protocol):
    """Where a text lies in meaning. Frozen: the same text has the same place in every call."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [N, D] of N texts; zeros for a text without content."""


class HashedEmbedding:
    """Counts of hashed character 3- to 5-grams, L2-normed: the same for every model, nothing to train or load."""

    def __init__(self) -> None:
        self._vectorizer = HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), n_features=_HASH_BUCKETS, norm="l2", dtype=np.float32
        )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [N, 4096], float32."""
        return np.asarray(self._vectorizer.transform(texts).toarray())


class TokenEmbedding:
    """e(x) of REF 4: the mean of a text's token embeddings, those of a given model directory as they are on disk."""

    def __init__(self, model_directory: Path) -> None:
        """Raises ArtifactError for a directory that holds no Reactive Transformer."""
        model, self._tokenizer = load_model(model_directory, torch.float32)
        self._weight = model.embedding.weight.detach()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [N, hidden size], float32."""
        encoded = self._tokenizer.encode_all(texts)
        ids = [found if text.strip() else [] for text, found in zip(texts, encoded, strict=True)]
        offsets = np.cumsum([0, *map(len, ids)])[:-1]
        flat = torch.tensor([token for text in ids for token in text], dtype=torch.int64)
        means = torch.nn.functional.embedding_bag(flat, self._weight, torch.from_numpy(offsets), mode="mean")
        return np.asarray(means.numpy())


@dataclass(frozen=True)
class ScoredTurn:
    """A turn of a conversation: what was asked, the reference answer, and the answer that a model generated.

    `saved` is the text of the interaction that the memory holds from the turn before, its query and answer with a
    space between; None on the first turn.
    """

    query: str
    reference: str
    generated: str
    saved: str | None


@dataclass(frozen=True)
class Reward:
    """What an answer is worth, 0 to the scale, and its parts, each 0 to 1."""

    total: float
    bleu: float
    cosine: float
    length: float


def score_conversations(
    conversations: Sequence[Sequence[ScoredTurn]], config: RewardConfig, embedding: TextEmbedding
) -> list[list[Reward]]:
    """The reward of every follow-up (all turns but the first) of each conversation, in order (REF 4, standard mode).

    An answer without a word is worth 0. Raises ValueError for a follow-up without `saved`.
    """
    follow_ups = [turns[1:] for turns in conversations]
    numbers = np.array([number for turns in follow_ups for number in range(len(turns))])
    turns = [turn for turns in follow_ups for turn in turns]
    if not turns:
        return [[] for _ in conversations]
    texts = [text for turn in turns for text in (turn.generated, turn.reference, _saved(turn))]
    words = _word_ids(texts)
    generated, reference, saved = words[0::3], words[1::3], words[2::3]

    said, wanted = (np.array([len(row) for row in part]) for part in (generated, reference))
    length = np.minimum(1.0, said / np.maximum(wanted, 1))
    bleu = _bleu(generated, reference, saved, config)
    cosine = np.where(said > 0, _cosine(embedding.embed(texts).reshape(len(turns), 3, -1), numbers, config), 0.0)
    weights = config.weights
    total = config.scale * (weights.bleu * bleu + weights.cosine * cosine + weights.length * length)

    rewards = (Reward(*row) for row in np.stack([total, bleu, cosine, length], axis=1).tolist())
    return [[next(rewards) for _ in turns] for turns in follow_ups]


def _saved(turn: ScoredTurn) -> str:
    if turn.saved is None:
        raise ValueError(f"the follow-up {turn.query!r} has no saved interaction: give the text of the turn before")
    return turn.saved


def _word_ids(texts: Sequence[str]) -> list[list[int]]:
    """Each text's words as ids; case and punctuation don't count."""
    vocabulary: dict[str, int] = {}
    return [
        [vocabulary.setdefault(word, len(vocabulary)) for word in re.findall(r"\w+", text.casefold())] for text in texts
    ]


def _bleu(
    generated: list[list[int]], reference: list[list[int]], saved: list[list[int]], config: RewardConfig
) -> np.ndarray:
    """B [turns]: BLEU to the reference and to the saved interaction."""
    to_both = sentence_bleu(generated * 2, reference + saved, config.bleu_weights)
    to_reference, to_saved = np.split(to_both, 2)
    return config.bleu.reference * to_reference + config.bleu.saved * to_saved


def _cosine(vectors: np.ndarray, numbers: np.ndarray, config: RewardConfig) -> np.ndarray:
    """C [turns] from the vectors [turns, 3, D] of generated, reference, saved; `numbers` of the follow-ups, from 0.

    The running mean of a follow-up takes in all interactions saved until then, the last one with the most weight.
    """
    generated, reference, saved = vectors.astype(np.float32, copy=False).transpose(1, 0, 2)
    decay = config.running_mean_decay
    means = saved.copy()
    for turn in np.flatnonzero(numbers):
        means[turn] = (1 - decay) * saved[turn] + decay * means[turn - 1]
    first, later = config.first_cosine, config.later_cosine
    factors = np.where(
        numbers[:, None] == 0,
        [first.saved, first.reference, 0.0],
        [later.saved, later.reference, later.running_mean],
    )
    closeness = np.stack([_closeness(generated, other) for other in (saved, reference, means)], axis=1)
    return np.asarray((factors * closeness).sum(axis=1))


def _closeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows [N, D], 0 if it is negative or one of them is zero."""
    products = np.einsum("nd,nd->n", one, other)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.clip(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0), 0.0, 1.0)

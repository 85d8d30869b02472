"""The composite MRL reward of answers in conversations (REF 4), as text in, numbers out: models with different
tokenizers compare. BLEU counts words, and meaning is measured by a frozen embedding that no trainee moves.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Literal, Protocol, Self, TypeAlias

import numpy as np
import torch
from scipy.sparse import csr_array

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.data.recall import matches
from rxt_platform.data.tokenizer import BOS, EOS, PAD, RxtTokenizer
from rxt_platform.model.files import load_model
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.bleu import sentence_bleu

_HASH_BUCKETS = 2**12
_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 256, 2**14  # the encoder hands out the states of all its layers

Vectors: TypeAlias = np.ndarray | csr_array
"""Vectors [N, D] of N texts, dense or sparse."""


class TextEmbedding(Protocol):
    """Where a text lies in meaning. Frozen: the same text has the same place in every call."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors [N, D] of N texts; zeros for a text without content."""


class HashedEmbedding:
    """Counts of hashed character 3- to 5-grams, L2-normed: the same for every model, nothing to train or load."""

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer  # 2.5 s that other stages' starts do without

        self._vectorizer = HashingVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), n_features=_HASH_BUCKETS, norm=None
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Sparse vectors [N, 4096].

        No gram goes beyond its word, so a text's counts are the sum of its words', and each word is hashed once.
        """
        rows = [text.split() for text in texts]
        places = defaultdict[str, int](count().__next__)
        words = np.fromiter(map(places.__getitem__, chain.from_iterable(rows)), np.int32)
        if not places:
            return csr_array((len(texts), _HASH_BUCKETS))
        ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        counts = csr_array((np.ones(len(words)), words, ends), shape=(len(texts), len(places)))
        from sklearn.preprocessing import normalize

        return normalize(counts @ csr_array(self._vectorizer.transform(places)))


class TokenEmbedding:
    """e(x) of REF 4: the mean of a text's token embeddings, those of a given model directory as they are on disk."""

    def __init__(self, model_directory: Path) -> None:
        """Raises ArtifactError for a directory that holds no Reactive Transformer."""
        model, self._tokenizer = load_model(model_directory, torch.float32)
        self._weight = model.embedding.weight.detach()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors [N, hidden size], float32."""
        encoded = self._tokenizer.encode_all(texts)
        ids = [found if text.strip() else [] for text, found in zip(texts, encoded, strict=True)]
        offsets = np.cumsum([0, *map(len, ids)])[:-1]
        flat = torch.tensor([token for text in ids for token in text], dtype=torch.int64)
        means = torch.nn.functional.embedding_bag(flat, self._weight, torch.from_numpy(offsets), mode="mean")
        return np.asarray(means.numpy())


class EncoderEmbedding:
    """A text read by a model's encoder as `[BOS]text[EOS]`: the mean of the last layer's states over these tokens.

    In the model's precision and on its device. What exceeds its window is cut off.
    """

    def __init__(self, model: ReactiveTransformer, tokenizer: RxtTokenizer) -> None:
        """Keeps a copy of the model's encoder and token embedding, which stays as it is when the model is trained."""
        self._tokenizer, self._window = tokenizer, model.config.max_length
        self._embedding, self._encoder = copy.deepcopy(model.embedding), copy.deepcopy(model.encoder).eval()

    @classmethod
    def load(cls, model_directory: Path) -> Self:
        """That of a model directory, as it is on disk, in float32.

        Raises ArtifactError for a directory that holds no Reactive Transformer.
        """
        return cls(*load_model(model_directory, torch.float32))

    def to(self, device: torch.device) -> Self:
        """Read on that device from now on."""
        self._embedding, self._encoder = self._embedding.to(device), self._encoder.to(device)
        return self

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors [N, hidden size], float32."""
        rows = [[BOS, *ids, EOS][: self._window] for ids in self._tokenizer.encode_all(texts)]
        order = sorted((n for n, text in enumerate(texts) if text.strip()), key=lambda n: len(rows[n]), reverse=True)
        vectors = np.zeros((len(texts), self._embedding.embedding_dim), dtype=np.float32)
        start = 0
        while start < len(order):
            longest = len(rows[order[start]])
            some = order[start : start + max(1, min(_ROWS_AT_ONCE, _TOKENS_AT_ONCE // longest))]
            vectors[some] = self._means([rows[n] for n in some], longest)
            start += len(some)
        return vectors

    def _means(self, rows: Sequence[Sequence[int]], longest: int) -> np.ndarray:
        """Mean states [rows, hidden size] of token ids."""
        device = self._embedding.weight.device
        ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], device=device)
        mask = ids != PAD
        states = self._encoder(self._embedding(ids), mask)[-1].float()
        sums = (states * mask[:, :, None]).sum(dim=1)
        return np.asarray((sums / mask.sum(dim=1, keepdim=True)).cpu().numpy())


Mode = Literal["standard", "long_range", "topic_change"]


@dataclass(frozen=True)
class ScoredTurn:
    """A turn of a conversation: what was asked, the reference answer, and the answer that a model generated.

    saved  text of the interaction that the memory holds from the turn before, its query and answer with a space
           between; None on the first turn. Of a long-range turn, the conversation's first interaction instead
    spans  the answer key: what the answer must hold; None if the question has none
    mode   REF 4: `long_range` comes back to the first interaction, away from all that was said since;
           `topic_change` (there NEGATIVE) turns away from the one before
    """

    query: str
    reference: str
    generated: str
    saved: str | None
    spans: tuple[str, ...] | None = None
    mode: Mode = "standard"


@dataclass(frozen=True)
class Reward:
    """What an answer is worth, 0 to the scale, and its parts, each 0 to 1.

    `recall` is None where the question has no answer key. `total` is None where nothing that has a weight could be
    measured: then there is no reward, and nothing to learn from the answer.
    """

    total: float | None
    bleu: float
    cosine: float
    length: float
    recall: float | None = None


def score_conversations(
    conversations: Sequence[Sequence[ScoredTurn]], config: RewardConfig, embedding: TextEmbedding
) -> list[list[Reward]]:
    """The reward of every follow-up (all turns but the first) of each conversation, in order (REF 4).

    An answer without a word is worth 0. Raises ValueError for a follow-up without `saved`.
    """
    asked = _FollowUps(conversations)
    if not asked.turns:
        return [[] for _ in conversations]
    words = _word_ids(asked.texts)
    said, wanted = (np.array([len(words[text]) for text in part]) for part in (asked.generated, asked.reference))
    bleu = np.where(said > 0, _bleu(asked, words, config), 0.0)
    cosine = np.where(said > 0, _cosine(asked, embedding.embed(asked.texts), config), 0.0)
    length = _length(said, wanted, config)
    recall = [_recall(turn) for turn in asked.turns]

    weights = config.weights
    parts = weights.bleu * bleu + weights.cosine * cosine + weights.length * length
    unkeyed = weights.bleu + weights.cosine + weights.length  # the weights without that of recall
    rewards = []
    measured = np.stack([parts, bleu, cosine, length], axis=1).tolist()
    for (part, in_words, in_meaning, in_length), found in zip(measured, recall, strict=True):
        total = config.scale * part / unkeyed if unkeyed else None
        if found is not None:
            total = config.scale * (part + weights.recall * found)
        rewards.append(Reward(total, in_words, in_meaning, in_length, found))
    ready = iter(rewards)
    return [[next(ready) for _ in turns[1:]] for turns in conversations]


class _FollowUps:
    """The follow-ups of some conversations. Their texts are kept once each and meant by number.

    turns      all follow-ups
    numbers    of each in its conversation, from 0
    texts      the distinct texts of all
    generated, reference, saved: of each follow-up; before: the interaction of the turn before it
    """

    def __init__(self, conversations: Sequence[Sequence[ScoredTurn]]) -> None:
        pairs = [pair for turns in conversations for pair in pairwise(turns)]
        self.turns = [turn for _, turn in pairs]
        self.numbers = np.array([number for turns in conversations for number in range(len(turns) - 1)])
        places = defaultdict[str, int](count().__next__)

        def numbered(texts: list[str]) -> np.ndarray:
            return np.fromiter(map(places.__getitem__, texts), np.int64)

        self.generated = numbered([turn.generated for turn in self.turns])
        self.reference = numbered([turn.reference for turn in self.turns])
        self.saved = numbered([_saved(turn) for turn in self.turns])
        self.before = numbered(
            [_interaction(last) if turn.mode == "long_range" else _saved(turn) for last, turn in pairs]
        )
        self.texts = list(places)

    def of_mode(self, mode: Mode) -> np.ndarray:
        """Which follow-ups are."""
        return np.array([turn.mode == mode for turn in self.turns])


def _saved(turn: ScoredTurn) -> str:
    if turn.saved is None:
        raise ValueError(f"the follow-up {turn.query!r} has no saved interaction: give the text of the turn before")
    return turn.saved


def _interaction(turn: ScoredTurn) -> str:
    return f"{turn.query} {turn.reference}"


def _word_ids(texts: Sequence[str]) -> list[list[int]]:
    """Each text's words as ids; case and punctuation don't count. What stands between spaces is looked at once."""
    words, pieces = defaultdict[str, int](count().__next__), dict[str, list[int]]()
    found = []
    for text in texts:
        ids: list[int] = []
        for piece in text.split():
            if piece not in pieces:
                pieces[piece] = [words[word] for word in re.findall(r"\w+", piece.casefold())]
            ids += pieces[piece]
        found.append(ids)
    return found


def _recall(turn: ScoredTurn) -> float | None:
    """Whether the answer holds all that the answer key asks for, 1 or 0, as evaluation counts it."""
    if not turn.spans:
        return None
    return float(bool(turn.generated.strip()) and matches(turn.generated, turn.reference, turn.spans))


def _length(said: np.ndarray, wanted: np.ndarray, config: RewardConfig) -> np.ndarray:
    """L [turns] of answers of `said` words to references of `wanted`."""
    target = np.maximum(1, wanted if config.length.target is None else config.length.target)
    longer = target / np.maximum(said, 1) if config.length.penalise_longer else 1.0
    return np.asarray(np.minimum(said / target, longer))


def _bleu(asked: _FollowUps, words: list[list[int]], config: RewardConfig) -> np.ndarray:
    """B [turns]: BLEU to the reference and to the saved interaction, or on a change of topic 1 less the latter."""
    pairs = [np.concatenate(part) for part in ((asked.generated,) * 2, (asked.reference, asked.saved))]
    generated, others = ([words[text] for text in part] for part in pairs)
    reference, saved = np.split(sentence_bleu(generated, others, config.bleu_weights), 2)
    changed = config.topic_change_bleu.reference * reference + config.topic_change_bleu.unlike_saved * (1 - saved)
    standard = config.bleu.reference * reference + config.bleu.saved * saved
    return np.where(asked.of_mode("topic_change"), changed, standard)


def _cosine(asked: _FollowUps, vectors: Vectors, config: RewardConfig) -> np.ndarray:
    """C [turns]: closeness to the saved interaction, the reference and, of later follow-ups, the running mean.

    A long-range answer is to be far from the running mean, one on a change of topic far from what was saved.
    """
    vectors = vectors.astype(np.float64)
    generated, means = vectors[asked.generated], _running_means(asked, config.running_mean_decay) @ vectors
    saved, reference, mean = (
        _closeness(generated, others) for others in (vectors[asked.saved], vectors[asked.reference], means)
    )
    mean = np.where(asked.of_mode("long_range"), 1 - mean, mean)
    first = config.first_cosine.saved * saved + config.first_cosine.reference * reference
    factors = config.later_cosine
    later = factors.saved * saved + factors.reference * reference + factors.running_mean * mean
    changed = config.topic_change_cosine.reference * reference + config.topic_change_cosine.unlike_saved * (1 - saved)
    return np.where(asked.of_mode("topic_change"), changed, np.where(asked.numbers == 0, first, later))


def _running_means(asked: _FollowUps, decay: float) -> csr_array:
    """Weights [turns, texts] with which the texts are in each follow-up's running mean.

    It takes in every interaction until then, the last one with the most weight. That of the turn before a long-range
    one is its query and reference, since `saved` is another.
    """
    rows, columns, weights = [], [], []
    for back in range(asked.numbers.max() + 1):
        row = np.flatnonzero(asked.numbers >= back)
        rows.append(row)
        columns.append(asked.before[row - back])
        weights.append(decay**back * np.where(asked.numbers[row] == back, 1.0, 1 - decay))
    places = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(weights), places), shape=(len(asked.turns), len(asked.texts)))


def _closeness(one: Vectors, other: Vectors) -> np.ndarray:
    """Cosine of each pair of rows [N, D], 0 if it is negative or one of them is zero."""
    products = (one * other).sum(axis=1)
    norms = np.sqrt((one * one).sum(axis=1) * (other * other).sum(axis=1))
    return np.clip(np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0), 0.0, 1.0)

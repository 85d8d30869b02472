"""Promises of the reward's embeddings: the same vectors everywhere, whatever else is embedded or trained."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import HashingVectorizer

from rxt_platform.data.tokenizer import BOS, EOS
from rxt_platform.errors import ArtifactError
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl import rewards
from rxt_platform.rl.rewards import EncoderEmbedding, HashedEmbedding, TokenEmbedding
from tests.unit.helpers import word_tokenizer
from tests.unit.rewards import word_model, write_word_model

TEXTS = ["Tom has a red hat.", "", "Lily", "  ", "Lily likes cake and plays near the lake."]


def test_hashed_vectors_are_the_same_everywhere() -> None:
    """Recorded: scores of another machine or library version compare only while these hold."""
    texts = ["Tom has a red hat.", "tom had the red hats", "a", " \n"]
    one, other, letter, blank = HashedEmbedding().embed(texts).toarray()
    assert one.shape == (4096,)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-6)
    assert float(one @ other) == pytest.approx(0.555492, abs=1e-6)
    assert (np.flatnonzero(letter).tolist(), letter[952]) == ([952], -1.0)
    assert not blank.any()


def test_hashed_vectors_are_those_of_whole_texts() -> None:
    """Words are hashed once each; scikit-learn hashes text by text."""
    rng = random.Random(0)
    alphabet = "aAbß  ΣσİıéǅÀ.,!\n\t\u00a0\u3000漢🙂"
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40))) for _ in range(300)]
    whole = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=4096, norm="l2").transform(texts)
    np.testing.assert_allclose(HashedEmbedding().embed(texts).toarray(), whole.toarray(), atol=1e-12)


def test_texts_without_a_word_have_zero_vectors() -> None:
    assert HashedEmbedding().embed(["", " "]).toarray().tolist() == np.zeros((2, 4096)).tolist()
    assert HashedEmbedding().embed([]).shape == (0, 4096)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_model(tmp_path_factory.mktemp("model"))


def test_token_vectors_are_mean_embeddings_of_the_directorys_model(model_directory: Path) -> None:
    weight = word_model().embedding.weight.detach()
    vectors = TokenEmbedding(model_directory).embed(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = word_tokenizer().encode(text) if text.strip() else []
        expected = weight[ids].mean(dim=0) if ids else torch.zeros(weight.shape[1])
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("made", [TokenEmbedding, EncoderEmbedding.load])
def test_vectors_of_a_model_need_a_model(made: type[TokenEmbedding], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a model directory"):
        made(tmp_path)


def by_hand(model: ReactiveTransformer, text: str) -> np.ndarray:
    """The mean state of a text alone, without padding."""
    if not text.strip():
        return np.zeros(model.config.hidden_size)
    ids = [BOS, *word_tokenizer().encode(text), EOS][: model.config.max_length]
    with torch.no_grad():
        return np.asarray(model.encode(torch.tensor([ids]))[-1, 0].float().mean(dim=0).numpy())


def test_encoder_vectors_are_mean_states_of_the_last_layer(model_directory: Path) -> None:
    model = word_model()
    long = "Tom has a red hat. " * 20
    assert len(word_tokenizer().encode(long)) > model.config.max_length
    expected = np.stack([by_hand(model, text) for text in [*TEXTS, long]])
    for embedding in (EncoderEmbedding(model, word_tokenizer()), EncoderEmbedding.load(model_directory)):
        vectors = embedding.embed([*TEXTS, long])
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[4]).max() > 0.01
    assert embedding.embed([]).shape == (0, model.config.hidden_size)


def test_encoder_vectors_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = EncoderEmbedding(word_model(), word_tokenizer())
    texts = [" ".join(["Tom has a red hat."] * (n % 4)) for n in range(300)]
    alone = [embedding.embed([text])[0] for text in texts[:4]]
    many = embedding.embed(texts)
    monkeypatch.setattr(rewards, "_TOKENS_AT_ONCE", 30)
    for vectors in (many, embedding.embed(texts)):
        np.testing.assert_allclose(vectors, np.stack(alone * 75), atol=1e-5)


def test_encoder_vectors_stay_while_their_model_is_trained() -> None:
    model = word_model()
    embedding = EncoderEmbedding(model, word_tokenizer())
    before = embedding.embed(TEXTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert embedding.embed(TEXTS).tolist() == before.tolist()


def test_encoder_vectors_of_half_precision_are_float32() -> None:
    whole, half = word_model(), word_model().to(torch.bfloat16)
    vectors = EncoderEmbedding(half, word_tokenizer()).embed(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, EncoderEmbedding(whole, word_tokenizer()).embed(TEXTS), atol=0.1)

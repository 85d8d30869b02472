"""Promises of the encoder on its own: a checkpoint's encoder under a head, blind to padding, saved whole, trainable."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from rxt_platform import RxTEncoder
from rxt_platform.config.model import HeadConfig
from rxt_platform.data.tokenizer import BOS, EOS, PAD, RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from rxt_platform.model.encoder_model import ValueHead
from rxt_platform.model.files import save_model
from tests.unit.helpers import FIRST_WORD, padded, rows_of, tiny_config, tiny_model, word_tokenizer

CONFIG = tiny_config(vocab_size=300, max_length=32)
VALUE: dict[str, Any] = {"kind": "value", "scale": 4.0}
HEADS: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification", "outputs": 3},
    "regression": {"kind": "regression", "outputs": 2},
    "one number": {"kind": "regression"},
    "value": VALUE,
}
ROWS = rows_of(7, 12, 1, vocab=300)


@pytest.fixture
def joint(tmp_path: Path) -> Path:
    """A saved Reactive Transformer."""
    directory = tmp_path / "joint"
    directory.mkdir()
    save_model(directory, CONFIG, tiny_model(CONFIG).state_dict(), word_tokenizer())
    return directory


def encoder_of(head: dict[str, Any] | None = None, seed: int = 0) -> RxTEncoder:
    """A freshly initialised encoder with a head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RxTEncoder(CONFIG, HeadConfig.model_validate(head or VALUE), word_tokenizer()).eval()


# ---- from a checkpoint


@pytest.mark.parametrize("name", HEADS)
def test_a_joint_checkpoint_gives_its_encoder_under_every_head(name: str, joint: Path) -> None:
    model = RxTEncoder.from_pretrained(joint, head=HEADS[name])
    assert not model.training
    whole = tiny_model(CONFIG).state_dict()
    kept = {key for key in model.state_dict() if not key.startswith("head.")}
    assert kept == {key for key in whole if key.startswith(("embedding.", "encoder."))}
    assert all(torch.equal(model.state_dict()[key], whole[key]) for key in kept)
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids, mask = padded(ROWS)
    outputs = model(ids, mask)
    assert outputs.shape == (3, HEADS[name].get("outputs", 1))
    assert outputs.isfinite().all()
    assert torch.equal(outputs, model.head(model.pooled(ids, mask)))


def test_what_is_pooled_is_the_mean_of_the_whole_model_s_last_states(joint: Path) -> None:
    model = RxTEncoder.from_pretrained(joint, head=HeadConfig(kind="value"))
    ids, mask = padded(ROWS)
    states = tiny_model(CONFIG).encode(ids, mask)[-1]
    by_hand = torch.stack([states[row, : len(real)].mean(dim=0) for row, real in enumerate(ROWS)])
    torch.testing.assert_close(model.pooled(ids, mask), by_hand, atol=1e-6, rtol=0)


def test_padding_changes_nothing() -> None:
    model = encoder_of()
    ids, mask = padded(ROWS)
    expected = model.pooled(ids, mask)
    wider, wider_mask = padded(ROWS, width=30)
    torch.testing.assert_close(model.pooled(wider, wider_mask), expected, atol=1e-6, rtol=0)
    other = ids.masked_fill(~mask, FIRST_WORD + 50)
    torch.testing.assert_close(model.pooled(other, mask), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.pooled(ids, mask.long()), expected, atol=0, rtol=0)
    for row, real in enumerate(ROWS):
        alone = model.pooled(torch.tensor([real]))
        torch.testing.assert_close(alone, expected[row : row + 1], atol=1e-6, rtol=0)
    assert (model.pooled(ids, torch.ones_like(mask)) - expected).abs().max() > 1e-3, "padding that is read matters"


def test_texts_are_bos_text_eos_right_padded(joint: Path) -> None:
    model = RxTEncoder.from_pretrained(joint, head=VALUE)
    texts = ["Tom has a red hat.", "Hat?", ""]
    encoded = model.tokenize(texts)
    rows = [[BOS, *word_tokenizer().encode(text), EOS] for text in texts]
    ids, mask = padded(rows)
    assert torch.equal(encoded["input_ids"], ids)
    assert torch.equal(encoded["attention_mask"], mask)
    torch.testing.assert_close(model(**encoded)[1:2], model(torch.tensor(rows[1:2])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_a_saved_encoder_comes_back_with_its_head_and_window(name: str, joint: Path, tmp_path: Path) -> None:
    model = RxTEncoder.from_pretrained(joint, head={**HEADS[name], "max_length": 40})
    model.save_pretrained(tmp_path / "saved")
    loaded = RxTEncoder.from_pretrained(tmp_path / "saved")
    assert loaded.head_config == model.head_config
    assert loaded.window == 40
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    encoded = model.tokenize(["Tom has a red hat.", "Hat?"])
    torch.testing.assert_close(loaded(**encoded), model(**encoded), atol=1e-6, rtol=0)


@pytest.mark.parametrize("place", ["joint checkpoint", "saved encoder"])
def test_an_encoder_is_loaded_in_the_precision_asked_for(place: str, joint: Path, tmp_path: Path) -> None:
    head: dict[str, Any] = {"head": VALUE}
    if place == "saved encoder":
        RxTEncoder.from_pretrained(joint, head=VALUE).save_pretrained(tmp_path / "saved")
        joint, head = tmp_path / "saved", {}
    loaded = RxTEncoder.from_pretrained(joint, dtype=torch.bfloat16, **head)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


# ---- the value head


@pytest.mark.parametrize("scale", [10.0, 0.5])
def test_values_start_between_zero_and_the_scale(scale: float) -> None:
    model = encoder_of({"kind": "value", "scale": scale})
    values = model(*padded(rows_of(*range(1, 31), vocab=300)))
    assert values.shape == (30, 1)
    assert ((values > 0) & (values < scale)).all()
    assert values.std() > 0
    assert HeadConfig(kind="value").scale == 10.0


def test_a_value_is_the_scaled_sigmoid_of_a_normalised_glu() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head, x = ValueHead(6, 4.0), torch.randn(5, 6)
        for parameter in head.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    p = {name: tensor.detach() for name, tensor in head.named_parameters()}
    both = x @ p["input.weight"].T + p["input.bias"]
    linear, gate = both[:, :6], both[:, 6:]
    gated = linear * gate / (1 + (-gate).exp())
    centred = gated - gated.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    raw = normed @ p["output.weight"].T + p["output.bias"]
    torch.testing.assert_close(head(x), p["scale"] / (1 + (-raw).exp()) + p["shift"], atol=1e-5, rtol=0)


# ---- training


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_head_encoder_and_the_embedding_of_real_tokens_only(name: str) -> None:
    model = encoder_of(HEADS[name])
    ids, mask = padded([[20, 21, 22], [23, 24]], width=4)
    ids = ids.masked_fill(~mask, 99)
    model(ids, mask).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    assert model.embedding.weight.grad is not None
    touched = model.embedding.weight.grad.abs().sum(dim=1).nonzero()[:, 0]
    assert touched.tolist() == [20, 21, 22, 23, 24]


def occurrences(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 4 to 10 tokens (ids, mask), half of which hold token 20, at any place, and which do."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        length = int(torch.randint(4, 11, (), generator=generator))
        row = torch.randint(21, 60, (length,), generator=generator)
        if index % 2:
            row[torch.randint(length, (), generator=generator)] = 20
        rows.append(row.tolist())
    ids, mask = padded(rows)
    return ids.masked_fill(~mask, 20), mask, torch.arange(number) % 2


def test_a_checkpoint_s_encoder_learns_a_rule_in_seconds(joint: Path) -> None:
    torch.manual_seed(0)
    model = RxTEncoder.from_pretrained(joint, head={"kind": "classification", "outputs": 2}).train()
    ids, mask, labels = occurrences(256, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        part = torch.arange(64) + 64 * step % 256
        loss = F.cross_entropy(model(ids[part], mask[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, mask, labels = occurrences(400, seed=2)
    with torch.no_grad():
        hits = model.eval()(ids, mask).argmax(dim=1) == labels
    assert float(hits.float().mean()) > 0.95


# ---- bad input


def test_a_head_is_chosen_for_a_checkpoint_without_one_only(joint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a model without an encoder head; choose one, such as head="):
        RxTEncoder.from_pretrained(joint)
    encoder_of().save_pretrained(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="has a head of its own; leave out `head`"):
        RxTEncoder.from_pretrained(tmp_path / "saved", head=VALUE)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "classification", "outputs": 1}, "a classification needs outputs of at least 2 classes, not 1"),
        ({"kind": "classification"}, "a classification needs outputs of at least 2 classes, not 1"),
        ({"kind": "value", "outputs": 2}, "a value head has 1 output, not 2"),
        ({"kind": "critic"}, "'classification', 'regression' or 'value'"),
        ({"kind": "value", "scale": 0.0}, "scale"),
        ({"kind": "value", "colour": "red"}, "colour"),
        ({}, "kind"),
        ("value", "not an encoder head"),
    ],
)
def test_a_head_that_cannot_be_is_refused(head: Any, message: str, joint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        RxTEncoder.from_pretrained(joint, head=head)
    encoder_of().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head": head}))
    with pytest.raises(ArtifactError, match=message):
        RxTEncoder.from_pretrained(tmp_path / "saved")


def test_an_input_longer_than_the_window_is_refused_with_both_lengths() -> None:
    for model, window in ((encoder_of(), 32), (encoder_of({**VALUE, "max_length": 40}), 40)):
        assert model(torch.full((1, window), 20)).isfinite().all()
        with pytest.raises(DataError, match=f"an input of {window + 1} tokens; the encoder's window holds {window}"):
            model(torch.full((1, window + 1), 20))
        with pytest.raises(DataError, match=rf"2 texts, the longest of \d+ tokens; the window holds {window}"):
            model.tokenize(["Hat?", "Tom has a red hat. " * 9])


def test_a_row_without_a_real_token_is_refused() -> None:
    ids, mask = padded([[20, 21], [22]])
    with pytest.raises(DataError, match="a row of the attention mask has no real token"):
        encoder_of()(ids, mask & torch.tensor([[True], [False]]))
    with pytest.raises(DataError, match="0 texts"):
        encoder_of().tokenize([])


def test_texts_need_a_tokenizer() -> None:
    model = RxTEncoder(CONFIG, HeadConfig(kind="value"))
    assert model(torch.tensor([[BOS, 20, EOS]])).shape == (1, 1)
    with pytest.raises(DataError, match="no tokenizer: use set_tokenizer"):
        model.tokenize(["Hi."])
    model.set_tokenizer(word_tokenizer())
    assert model.tokenize(["Hi."])["input_ids"][0, 0] == BOS != PAD


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(joint: Path) -> None:
    larger = RxtTokenizer.train([" ".join(f"word{i}" * 3 for i in range(60))], 310)
    with pytest.raises(DataError, match="310 tokens, the model 300"):
        RxTEncoder.from_pretrained(joint, head=VALUE, tokenizer=larger)


def test_a_checkpoint_s_damage_is_named(joint: Path) -> None:
    path = joint / "model.safetensors"
    tensors = load_file(path)
    missing = {key: tensor for key, tensor in tensors.items() if key != "encoder.layers.0.attention.query.weight"}
    for damaged, message in (
        (missing, r"missing tensors \['encoder\.layers\.0\.attention\.query\.weight'\]"),
        ({**tensors, "encoder.extra": torch.zeros(2)}, r"unknown tensors \['encoder\.extra'\]"),
        ({**tensors, "embedding.weight": torch.zeros(299, 32)}, r"embedding\.weight is \(299, 32\), .* \(300, 32\)"),
        ({**tensors, "embedding.weight": torch.zeros(300, 32).long()}, r"embedding\.weight is torch\.int64"),
    ):
        save_file(damaged, path)
        with pytest.raises(ArtifactError, match=message):
            RxTEncoder.from_pretrained(joint, head=VALUE)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_a_pickle_in_place_of_the_checkpoint_is_refused_and_not_run(joint: Path, tmp_path: Path) -> None:
    (joint / "model.safetensors").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not a safetensors file"):
        RxTEncoder.from_pretrained(joint, head=VALUE)
    assert not (tmp_path / "executed").exists()

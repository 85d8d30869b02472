"""Promises of the critic's versions: whole or not there, never changed, checked when read."""

import json
from pathlib import Path

import pytest
import torch

from rxt_platform import RxTEncoder
from rxt_platform.config.model import HeadConfig
from rxt_platform.errors import ArtifactError
from rxt_platform.rl import versions
from tests.unit.helpers import padded, rows_of, tiny_config, word_tokenizer

CONFIG = tiny_config(vocab_size=300, max_length=32)


def critic(seed: int = 0, kind: str = "value") -> RxTEncoder:
    """An encoder with a head, other weights for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RxTEncoder(CONFIG, HeadConfig.model_validate({"kind": kind}), word_tokenizer()).eval()


def test_a_published_version_gives_the_same_values(tmp_path: Path) -> None:
    ids, mask = padded(rows_of(7, 12, 1, vocab=300))
    for version in (0, 1, 12):
        model = critic(version)
        directory = versions.publish(tmp_path, version, model)
        loaded = versions.load(tmp_path, version)
        assert not loaded.training
        assert torch.equal(loaded(ids, mask), model(ids, mask))
        assert {path.name for path in directory.iterdir()} == {
            *("config.json", "model.safetensors", "tokenizer.json", "manifest.json")
        }
    assert versions.available(tmp_path) == [0, 1, 12]


def test_the_same_weights_may_be_published_again_others_may_not(tmp_path: Path) -> None:
    directory = versions.publish(tmp_path, 3, critic(3))
    before = (directory / "manifest.json").read_bytes()
    assert versions.publish(tmp_path, 3, critic(3)) == directory
    assert (directory / "manifest.json").read_bytes() == before
    with pytest.raises(ArtifactError, match=r"version 3 is there already with another model\.safetensors"):
        versions.publish(tmp_path, 3, critic(4))
    ids, mask = padded(rows_of(5, vocab=300))
    assert torch.equal(versions.load(tmp_path, 3)(ids, mask), critic(3)(ids, mask))
    assert [path.name for path in tmp_path.iterdir()] == ["v000003"], "nothing else is left behind"


def test_a_missing_version_is_named_with_those_there_are(tmp_path: Path) -> None:
    versions.publish(tmp_path, 1, critic())
    with pytest.raises(ArtifactError, match=r"no version 2 of the critic; there are \[1\]"):
        versions.load(tmp_path, 2)
    with pytest.raises(ArtifactError, match="there are none"):
        versions.load(tmp_path / "nowhere", 0)
    assert versions.available(tmp_path / "nowhere") == []


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing", "renamed", "no manifest"])
def test_a_damaged_version_is_never_loaded(damage: str, tmp_path: Path) -> None:
    weights = versions.publish(tmp_path, 1, critic()) / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flipped byte":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncated":
        weights.write_bytes(content[:-10])
    elif damage == "missing":
        weights.unlink()
    elif damage == "renamed":
        weights.parent.rename(tmp_path / "v000002")
    else:
        (weights.parent / "manifest.json").unlink()
        assert versions.available(tmp_path) == []
    found = {"missing": "files missing", "renamed": "holds version 1", "no manifest": "no manifest"}
    with pytest.raises(ArtifactError, match=found.get(damage, "model.safetensors")):
        versions.load(tmp_path, 2 if damage == "renamed" else 1)


def test_what_is_half_written_is_no_version(tmp_path: Path) -> None:
    versions.publish(tmp_path, 1, critic())
    (tmp_path / ".v000002.0a1b2c3d.tmp").mkdir()
    (tmp_path / "v000003").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert versions.available(tmp_path) == [1]


def test_a_publish_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(versions.files, "write_weights", full)
    with pytest.raises(ArtifactError, match="no space left"):
        versions.publish(tmp_path, 1, critic())
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for version in range(5):
        versions.publish(tmp_path, version, critic(version))
    assert versions.prune(tmp_path, 2) == [0, 1, 2]
    assert versions.available(tmp_path) == [3, 4]
    assert versions.prune(tmp_path, 2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000003", "v000004"]
    with pytest.raises(ValueError, match="newest"):
        versions.prune(tmp_path, 0)


def test_only_a_value_head_is_a_critic(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="a regression head gives no values"):
        versions.publish(tmp_path, 0, critic(kind="regression"))
    directory = versions.publish(tmp_path, 0, critic())
    assert json.loads((directory / "manifest.json").read_text())["kind"] == "critic"

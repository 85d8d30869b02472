"""Promises of what is on disk: a model survives saving bit by bit, a directory is committed whole, damage is named."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rxt_platform.errors import ArtifactError
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.files import STATELESS, load_any, load_model, save_model
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.storage.directory import (
    MANIFEST,
    SCHEMA_VERSION,
    Provenance,
    commit_directory,
    content_hash,
    read_manifest,
    verify_directory,
)
from tests.unit.helpers import padded, rows_of, tiny_config, tiny_model, word_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model directory."""
    config = tiny_config(vocab_size=300)
    directory = tmp_path / "model"
    directory.mkdir()
    save_model(directory, config, tiny_model(config).state_dict(), word_tokenizer())
    return directory


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A committed directory of two files."""
    target = tmp_path / "artifact"
    with commit_directory(target, "model", Provenance({"size": 3}, {"corpus": "abc"}, {"loss": 0.5})) as folder:
        (folder / "weights.bin").write_bytes(b"0123456789")
        (folder / "nested").mkdir()
        (folder / "nested" / "notes.txt").write_text("all is well")
    return target


def change_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_manifest(directory: Path, **values: Any) -> None:
    raw = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**raw, **values}))


# ---- a model as files


def test_a_model_comes_back_bit_by_bit(saved: Path) -> None:
    model = tiny_model(tiny_config(vocab_size=300))
    loaded, tokenizer = load_model(saved)
    assert loaded.config == model.config
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    ids, mask = padded(rows_of(9, 4))
    memory = model.initial_memory(torch.tensor([1, 2]))
    assert torch.equal(model.write(memory, ids, mask), loaded.write(memory, ids, mask))
    assert tokenizer.encode("Tom has a red hat.") == word_tokenizer().encode("Tom has a red hat.")


def test_a_stateless_model_comes_back_bit_by_bit_and_is_no_reactive_one(saved: Path, tmp_path: Path) -> None:
    model = StatelessTransformer(matched_baseline(tiny_config(vocab_size=300), 64))
    directory = tmp_path / "stateless"
    directory.mkdir()
    save_model(directory, model.config, model.state_dict(), word_tokenizer(), architecture=STATELESS)
    loaded, tokenizer = load_any(directory)
    assert isinstance(loaded, StatelessTransformer)
    assert loaded.config == model.config
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.encode("Tom.") == word_tokenizer().encode("Tom.")
    with pytest.raises(ArtifactError, match=r"holds \['StatelessTransformer'\], not RxTAlpha"):
        load_model(directory)
    assert isinstance(load_any(saved)[0], ReactiveTransformer)


def test_saving_does_not_depend_on_how_tensors_lie_in_memory(saved: Path, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=300)
    state = dict(tiny_model(config).state_dict())
    name = "decoder.head.weight"
    state[name] = state[name].T.contiguous().T  # the same numbers, not contiguous
    other = tmp_path / "other"
    other.mkdir()
    save_model(other, config, state, word_tokenizer())
    assert (other / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_missing_tensor_is_named(saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.pop("decoder.head.bias"))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing tensors \['decoder\.head\.bias'\]"):
        load_model(saved)


def test_an_unknown_tensor_is_named(saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.update({"decoder.extra": torch.zeros(2)}))
    with pytest.raises(ArtifactError, match=r"unknown tensors \['decoder\.extra'\]"):
        load_model(saved)


def test_a_mis_shaped_tensor_is_named_with_both_shapes(saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.update({"decoder.head.bias": torch.zeros(299)}))
    with pytest.raises(ArtifactError, match=r"decoder\.head\.bias is \(299,\), the model has \(300,\)"):
        load_model(saved)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_not_run(saved: Path, tmp_path: Path, how: str) -> None:
    witness = tmp_path / "executed"
    path = saved / "model.safetensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(witness)))
    else:
        torch.save({"weight": Malicious(witness)}, path)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not a safetensors file"):
        load_model(saved)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, r"model\.safetensors: missing"),
        ("model.safetensors", b"", "not a safetensors file"),
        ("config.json", None, r"no config\.json: not a model directory"),
        ("config.json", b"{not json", "not a model configuration"),
        ("config.json", b'{"vocab_size": 64}', "not a model configuration"),
        ("config.json", b"\xff\xfe", "not a model configuration"),
        ("tokenizer.json", None, r"tokenizer\.json: not a readable tokenizer"),
        ("tokenizer.json", b"{}", "not a readable tokenizer"),
    ],
)
def test_a_damaged_model_file_is_an_artifact_error(saved: Path, name: str, content: bytes | None, message: str) -> None:
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        load_model(saved)


def test_truncated_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load_model(saved)


def test_a_tokenizer_with_other_special_tokens_is_refused(saved: Path) -> None:
    path = saved / "tokenizer.json"
    path.write_text(path.read_text().replace('"[A]"', '"[ANSWER]"'))
    with pytest.raises(ArtifactError, match=r"\[A\] must be a special token with id 6"):
        load_model(saved)


# ---- committed directories


def test_a_committed_directory_holds_its_files_and_where_they_come_from(committed: Path) -> None:
    manifest = verify_directory(committed, "model")
    assert manifest.schema_version == SCHEMA_VERSION
    assert set(manifest.files) == {"weights.bin", "nested/notes.txt"}
    entry = manifest.files["weights.bin"]
    assert (entry.size, entry.sha256) == (10, hashlib.sha256(b"0123456789").hexdigest())
    assert (manifest.config, manifest.parents, manifest.metrics) == ({"size": 3}, {"corpus": "abc"}, {"loss": 0.5})
    assert (committed / "nested" / "notes.txt").read_text() == "all is well"
    assert [path.name for path in committed.parent.iterdir()] == ["artifact"], "no temporary directory stays"


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    target = tmp_path / "artifact"

    def write() -> None:
        with commit_directory(target, "model") as folder:
            (folder / "weights.bin").write_bytes(b"half")
            assert not target.exists(), "nothing is to be seen before all of it is written"
            raise Interrupted

    with pytest.raises(Interrupted):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_earlier_directory_as_it_was(committed: Path) -> None:
    before = verify_directory(committed)

    def write() -> None:
        with commit_directory(committed, "model") as folder:
            (folder / "weights.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert verify_directory(committed) == before
    assert [path.name for path in committed.parent.iterdir()] == ["artifact"]


def test_committing_again_replaces_the_whole_directory(committed: Path) -> None:
    with commit_directory(committed, "model") as folder:
        (folder / "new.bin").write_bytes(b"x")
    assert set(verify_directory(committed).files) == {"new.bin"}
    assert [path.name for path in committed.parent.iterdir()] == ["artifact"]


def test_a_directory_that_cannot_be_written_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")

    def write() -> None:
        with commit_directory(tmp_path / "file" / "artifact", "model"):
            pass

    with pytest.raises(ArtifactError, match="cannot be written"):
        write()


def test_an_altered_file_is_named_with_both_hashes(committed: Path) -> None:
    (committed / "weights.bin").write_bytes(b"0123456780")
    with pytest.raises(ArtifactError) as raised:
        verify_directory(committed)
    message = str(raised.value)
    assert "weights.bin" in message
    assert hashlib.sha256(b"0123456789").hexdigest() in message
    assert hashlib.sha256(b"0123456780").hexdigest() in message


def test_a_truncated_file_is_named_with_both_sizes(committed: Path) -> None:
    (committed / "weights.bin").write_bytes(b"01234")
    with pytest.raises(ArtifactError, match=r"weights\.bin: 5 bytes, the manifest says 10"):
        verify_directory(committed)


def test_a_missing_file_is_named(committed: Path) -> None:
    (committed / "nested" / "notes.txt").unlink()
    with pytest.raises(ArtifactError, match=r"files missing: \['nested/notes\.txt'\]"):
        verify_directory(committed)


def test_an_extra_file_is_named(committed: Path) -> None:
    (committed / "nested" / "extra.py").write_text("pass")
    with pytest.raises(ArtifactError, match=r"not in the manifest: \['nested/extra\.py'\]"):
        verify_directory(committed)


def test_a_link_in_a_directory_is_refused_even_to_the_same_content(committed: Path) -> None:
    elsewhere = committed.parent / "elsewhere.bin"
    (committed / "weights.bin").rename(elsewhere)
    (committed / "weights.bin").symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match=r"weights\.bin: links and special files are not allowed"):
        verify_directory(committed)


def test_a_link_cannot_be_committed(tmp_path: Path) -> None:
    def write() -> None:
        with commit_directory(tmp_path / "artifact", "model") as folder:
            (folder / "passwords").symlink_to("/etc/passwd")

    with pytest.raises(ArtifactError, match="passwords: links and special files are not allowed"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_a_directory_is_refused(committed: Path) -> None:
    os.mkfifo(committed / "pipe")
    with pytest.raises(ArtifactError, match="pipe: links and special files are not allowed"):
        verify_directory(committed)


def test_a_newer_schema_version_is_refused_with_the_fix(committed: Path) -> None:
    change_manifest(committed, schema_version=SCHEMA_VERSION + 1, added_later=True)
    with pytest.raises(ArtifactError, match=r"schema version 2 is newer than 1: upgrade rxt_platform"):
        read_manifest(committed)


def test_another_kind_of_directory_is_refused(committed: Path) -> None:
    with pytest.raises(ArtifactError, match="is a model, not a corpus"):
        verify_directory(committed, "corpus")


def test_a_directory_without_manifest_is_no_artifact(committed: Path) -> None:
    (committed / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json: not a complete artifact"):
        verify_directory(committed)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "model"}', "null"])
def test_a_broken_manifest_is_an_artifact_error(committed: Path, content: str) -> None:
    (committed / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        verify_directory(committed)


def test_a_manifest_cannot_point_outside_its_directory(committed: Path) -> None:
    outside = committed.parent / "outside.bin"
    outside.write_bytes(b"x")
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    files = json.loads((committed / MANIFEST).read_text())["files"]
    change_manifest(committed, files={**files, "../outside.bin": entry})
    with pytest.raises(ArtifactError, match=r"files missing: \['\.\./outside\.bin'\]"):
        verify_directory(committed)


@pytest.mark.parametrize("version", ["2", None])
def test_a_schema_version_that_is_no_number_is_an_artifact_error(committed: Path, version: str | None) -> None:
    change_manifest(committed, schema_version=version)
    with pytest.raises(ArtifactError, match="schema_version"):
        verify_directory(committed)


def test_a_content_hash_that_is_not_that_of_the_files_is_refused(committed: Path) -> None:
    (committed / "weights.bin").write_bytes(b"9876543210")
    files = json.loads((committed / MANIFEST).read_text())["files"]
    files["weights.bin"]["sha256"] = hashlib.sha256(b"9876543210").hexdigest()
    change_manifest(committed, files=files)
    with pytest.raises(ArtifactError, match="content_sha256"):
        verify_directory(committed)


def test_a_replacement_that_is_killed_while_clearing_up_leaves_a_whole_directory(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, ignore_errors: bool = False) -> None:
        raise KeyboardInterrupt

    def write() -> None:
        with commit_directory(committed, "model") as folder:
            (folder / "new.bin").write_bytes(b"x")
            monkeypatch.setattr("shutil.rmtree", killed)

    with pytest.raises(KeyboardInterrupt):
        write()
    verify_directory(committed)


def test_content_hash_names_the_content_only(tmp_path: Path) -> None:
    hashes = []
    for name, config, text in (("a", {"x": 1}, "same"), ("b", {"x": 2}, "same"), ("c", {"x": 1}, "other")):
        with commit_directory(tmp_path / name, "model", Provenance(config, {}, {})) as folder:
            (folder / "file.txt").write_text(text)
        hashes.append(read_manifest(tmp_path / name).content_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_content_hash_of_a_value_does_not_depend_on_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})

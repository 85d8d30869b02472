"""Bad input ends with exit code 2 and one line that names the place and the fix, before Ray starts."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rxt_platform.cli import guarded, rxt
from rxt_platform.config.loading import load_preset
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.model.files import save_model
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.storage.directory import Provenance, commit_directory
from tests.support import ONE_SOURCE, ROOT

QUICKSTART = str(ROOT / "pipelines/configs/quickstart.yaml")
JSONL = "data.conversations={kind: files, path: rows.jsonl, validation_path: held_out.jsonl}"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not start."""

    def connect(*_: object) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.connect", connect)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `rxt run` leaves with exit code 2."""
    code = guarded(lambda: rxt(["run", *arguments], standalone_mode=False))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def storage(tmp_path: Path) -> list[str]:
    """Overrides that keep a run in the test's folder."""
    return [f"storage={tmp_path / 'runs'}", f"data.root={tmp_path}", *ONE_SOURCE]


def write_rows(folder: Path, rows: Sequence[object]) -> None:
    """Training rows, and a held-out conversation."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"query": "Hi", "answer": "Ho", "interactions": [{"query": "Hi", "answer": "Ho"}]}
    (folder / "held_out.jsonl").write_text(json.dumps(held_out) + "\n")


def test_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml: no such config file" in error_of(capsys, "nowhere.yaml")


def test_missing_data_file(capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path) -> None:
    message = error_of(capsys, QUICKSTART, *storage, "data.texts=stories.txt")
    assert f"stories.txt: no such file or folder: looked for {tmp_path / 'stories.txt'}" in message


def test_empty_corpus(capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\n")
    message = error_of(capsys, QUICKSTART, *storage, "data.texts=stories.txt")
    assert f"{tmp_path / 'stories.txt'}: empty" in message


def test_row_without_answer(capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path) -> None:
    rows = [
        {"query": "Hello.", "answer": "Hi."},
        {"query": "Who?", "answer": "Me.", "interactions": [{"query": "Why?"}]},
    ]
    write_rows(tmp_path, rows)
    message = error_of(capsys, QUICKSTART, *storage, JSONL)
    assert f"{tmp_path / 'rows.jsonl'}:2: column 'interactions[0].answer': missing" in message


def test_row_nested_too_deeply(capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path) -> None:
    write_rows(tmp_path, [])
    (tmp_path / "rows.jsonl").write_text('{"query": ' + "[" * 100_000 + "\n")
    assert f"{tmp_path / 'rows.jsonl'}:1: row: JSON nested too deep" in error_of(capsys, QUICKSTART, *storage, JSONL)


def test_config_typo(capsys: pytest.CaptureFixture[str], storage: list[str]) -> None:
    message = error_of(capsys, QUICKSTART, *storage, "stages.sft.optimizer.learning_rat=1e-3")
    assert "unknown key 'stages.sft.optimizer.learning_rat'; nearest valid: learning_rate" in message


def test_query_that_fills_the_window(capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path) -> None:
    rows = [{"query": "q " * 300, "answer": "a", "interactions": [{"query": "q", "answer": "a"}]}] * 64
    write_rows(tmp_path, rows)
    message = error_of(capsys, QUICKSTART, *storage, JSONL, "data.validation.too_long=fail")
    assert "rows.jsonl:1: column 'query': too long: turn 1: query of" in message
    assert "data.validation.too_long=truncate" in message


def test_batch_larger_than_the_rows(capsys: pytest.CaptureFixture[str], storage: list[str]) -> None:
    message = error_of(capsys, QUICKSTART, *storage, "data.texts.train_rows=40")
    assert "stages.pretraining.global_batch_size 64 is more than the 40 training rows of texts" in message


def test_schedule_that_would_never_end(capsys: pytest.CaptureFixture[str], storage: list[str]) -> None:
    settings = ["stages.memory_aware.epochs=1.5", "stages.memory_aware.unfreeze_encoder=50"]
    message = error_of(capsys, QUICKSTART, *storage, *settings)
    assert "unfreeze_memory_attention + unfreeze_encoder takes 50.05 epochs, the stage has 1.5" in message


def test_stage_name_typo(capsys: pytest.CaptureFixture[str], storage: list[str]) -> None:
    assert "stages.stf: missing key 'kind'" in error_of(capsys, QUICKSTART, *storage, "stages.stf.epochs=2")


def test_unknown_preset(capsys: pytest.CaptureFixture[str], storage: list[str]) -> None:
    message = error_of(capsys, QUICKSTART, *storage, "model.preset=tny")
    assert "model.preset: unknown preset 'tny'; did you mean 'tiny'? presets: alpha-micro, " in message


def test_start_from_an_artifact_that_was_altered(
    capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path
) -> None:
    artifact = make_model_artifact(tmp_path / "model")
    weights = artifact / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = error_of(capsys, QUICKSTART, *storage, f"stages.pretraining.start_from.artifact={artifact}")
    assert f"stages.pretraining.start_from: {weights}: sha256 " in message
    assert "the file was altered" in message


def test_start_from_an_artifact_that_is_not_the_one_asked_for(
    capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path
) -> None:
    artifact = make_model_artifact(tmp_path / "model")
    asked = f"stages.pretraining.start_from={{artifact: {artifact}, sha256: {'ab' * 32}}}"
    message = error_of(capsys, QUICKSTART, *storage, asked)
    assert f"has content sha256 {json.loads((artifact / 'manifest.json').read_text())['content_sha256']}" in message
    assert f"the config asks for {'ab' * 32}" in message


def test_start_from_another_model(capsys: pytest.CaptureFixture[str], storage: list[str], tmp_path: Path) -> None:
    artifact = make_model_artifact(tmp_path / "model")
    overrides = [f"stages.pretraining.start_from.artifact={artifact}", "model.memory.slots=16"]
    assert "is another model: memory.slots: 32 → 16" in error_of(capsys, QUICKSTART, *storage, *overrides)


def test_storage_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = error_of(capsys, QUICKSTART, f"storage={tmp_path / 'file'}")
    assert "cannot be made" in message
    assert "set 'storage'" in message


def make_model_artifact(path: Path) -> Path:
    """An untrained tiny model as a committed artifact."""
    config = load_preset("tiny")
    torch.manual_seed(0)
    provenance = Provenance({"spec": {"model": config.model_dump(mode="json")}}, {}, {})
    with commit_directory(path, "model", provenance) as folder:
        save_model(folder, config, ReactiveTransformer(config).state_dict(), RxtTokenizer.train(["a b"], 300))
    return path

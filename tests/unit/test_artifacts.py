"""Promises of `rxt artifacts`: it says what is there and who uses it, and deletes nothing that a run may need."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rxt_platform.cli import guarded, rxt
from rxt_platform.errors import ArtifactError, BusyError
from rxt_platform.orchestration.plan import Step, used_artifacts
from rxt_platform.orchestration.store import delete_unused, find_unused, lineage, read_store, record_plan
from rxt_platform.storage.directory import Provenance, commit_directory
from rxt_platform.storage.locks import deleting, only_holder, using

Capture = pytest.CaptureFixture[str]


def put(storage: Path, label: str, kind: str = "model", **parents: str) -> Path:
    """An artifact of two files; its fingerprint is what follows its name."""
    path = storage / "artifacts" / label
    with commit_directory(path, kind, Provenance({"fingerprint": label.partition("-")[2]}, parents, {})) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(label.encode() * 100)
    return path


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A run of a corpus and a model, an older model that is in no run, and another run's model on top of the first."""
    put(tmp_path, "corpus-c1", "corpus")
    put(tmp_path, "sft-a1", corpus="c1")
    put(tmp_path, "sft-a2", corpus="c1")
    put(tmp_path, "mrl-b1", corpus="c1", model="a2")
    record_plan(tmp_path / "one", [tmp_path / "artifacts" / name for name in ("corpus-c1", "sft-a2", "eval-e1")])
    record_plan(tmp_path / "two", [tmp_path / "artifacts" / "mrl-b1"])
    return tmp_path


def ran(capsys: Capture, *arguments: object, code: int = 0) -> str:
    assert guarded(lambda: rxt(["artifacts", *map(str, arguments)], standalone_mode=False)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def names(found: Any) -> set[str]:
    return {one.path.name for one in found}


def test_each_artifact_has_its_runs_and_inputs_of_used_ones_are_kept(storage: Path) -> None:
    (storage / "two/plan.json").unlink()
    record_plan(storage / "one", [storage / "artifacts/mrl-b1"])
    stored = {one.path.name: one for one in read_store(storage)}
    assert stored["mrl-b1"].runs == ("one",)
    assert [name for name, one in stored.items() if one.kept] == ["mrl-b1", "sft-a2", "corpus-c1"]
    assert stored["sft-a2"].runs == ()
    assert names(find_unused(storage)) == {"sft-a1"}


def test_a_report_keeps_what_it_shows_when_the_plan_is_another(storage: Path) -> None:
    steps = [{"artifact": f"/moved/elsewhere/artifacts/{name}"} for name in ("corpus-c1", "sft-a1")]
    (storage / "one/report.json").write_text(json.dumps({"steps": steps}))
    assert names(find_unused(storage)) == set()


def test_a_model_is_kept_by_its_content_s_hash(storage: Path) -> None:
    """A run that starts from a model names it so."""
    (start,) = (one for one in read_store(storage) if one.path.name == "sft-a1")
    assert start.manifest is not None
    put(storage, "sft-a3", model=start.manifest.content_sha256)
    record_plan(storage / "three", [storage / "artifacts/sft-a3"])
    assert names(find_unused(storage)) == set()


def test_leftovers_and_old_resume_states_are_unused_and_others_are_not(storage: Path) -> None:
    for path in ("artifacts/.sft-a2.0123.tmp", "work/sft-a2", "work/eval-e1", "work/sft-zz"):
        (storage / path).mkdir(parents=True)
        (storage / path / "state").write_bytes(b"0" * 1000)
    found = {one.path.name: one for one in find_unused(storage)}
    assert set(found) == {"sft-a1", ".sft-a2.0123.tmp", "sft-a2", "sft-zz"}
    assert found["sft-a2"].path.parent.name == "work"
    assert found["sft-zz"].size == 1000
    assert names(delete_unused(storage)) == set(found)
    left = {path.relative_to(storage).as_posix() for path in storage.glob("*/*")}
    assert left >= {"work/eval-e1", "artifacts/sft-a2", "artifacts/corpus-c1", "artifacts/mrl-b1"}
    assert not [path for path in left if "a1" in path or "zz" in path or "tmp" in path or "stale" in path]
    assert find_unused(storage) == []


def test_nothing_is_deleted_beside_a_run_and_no_run_starts_meanwhile(storage: Path) -> None:
    with (
        using(storage),
        using(storage),
        pytest.raises(BusyError, match=r"runs are under way, such as that of process \d"),
    ):
        list(delete_unused(storage))
    with deleting(storage), pytest.raises(BusyError, match="unused artifacts are being deleted by process"):
        using(storage).__enter__()
    assert (storage / "artifacts/sft-a1").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"artifacts": 3}', "[]"])
def test_a_plan_that_can_t_be_read_makes_nothing_unused(storage: Path, content: str) -> None:
    (storage / "one/plan.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"one/plan.json: does not say which artifacts the run uses"):
        list(delete_unused(storage))
    assert (storage / "artifacts/sft-a1").exists()


def test_links_are_never_followed_nor_deleted(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "precious").write_text("kept")
    (storage / "artifacts/sft-a9").symlink_to(outside)
    (storage / "work").mkdir(exist_ok=True)
    (storage / "work/sft-a9").symlink_to(outside)
    assert "never read" in next(one.problem for one in read_store(storage) if one.path.name == "sft-a9")
    assert names(delete_unused(storage)) == {"sft-a1"}
    assert (outside / "precious").read_text() == "kept"


def test_a_file_among_artifacts_is_left_alone(storage: Path) -> None:
    (storage / "artifacts/notes.txt").write_text("mine")
    assert names(delete_unused(storage)) == {"sft-a1"}
    assert (storage / "artifacts/notes.txt").read_text() == "mine"


def test_the_model_that_a_run_starts_from_is_used_before_anything_is_made_of_it(tmp_path: Path) -> None:
    start = put(tmp_path, "sft-a1")
    put(tmp_path, "sft-a2")
    first = Step("mrl", "training", {}, {"model": "a1"}, tmp_path, start=start)
    later = Step("mrl_2", "training", {}, {"model": first.fingerprint}, tmp_path, start=first.artifact)
    assert used_artifacts([first, later]) == [start, first.artifact, later.artifact]
    record_plan(tmp_path / "run", used_artifacts([first, later]))
    assert names(find_unused(tmp_path)) == {"sft-a2"}


def test_lineage_goes_back_to_the_corpus_and_ends_at_what_is_not_there(storage: Path) -> None:
    put(storage, "mrl-b2", model="b1", tokens="t0")
    found = [
        (one.depth, one.name, one.stored and one.stored.path.name) for one in lineage(storage / "artifacts/mrl-b2")
    ]
    assert found == [
        (0, "mrl-b2", "mrl-b2"),
        (1, "model", "mrl-b1"),
        (2, "corpus", "corpus-c1"),
        (2, "model", "sft-a2"),
        (3, "corpus", "corpus-c1"),
        (1, "tokens", None),
    ]


def test_a_circle_of_parents_ends(storage: Path) -> None:
    put(storage, "sft-x1", model="x2")
    put(storage, "sft-x2", model="x1")
    assert len(lineage(storage / "artifacts/sft-x1")) == 3
    record_plan(storage / "one", [storage / "artifacts/sft-x1"])
    assert {one.path.name for one in read_store(storage) if one.kept} >= {"sft-x1", "sft-x2"}


def test_the_commands_print_tables_and_json(storage: Path, capsys: Capture) -> None:
    shown = ran(capsys, "list", storage)
    assert [line.split()[:3] for line in shown.splitlines()[2:]] == [
        ["mrl-b1", "model", "two"],
        ["sft-a2", "model", "one"],
        ["sft-a1", "model", "unused"],
        ["corpus-c1", "corpus", "one"],
    ]
    rows = json.loads(ran(capsys, "list", storage, "--json"))
    assert [Path(row["path"]).name for row in rows if not row["kept"]] == ["sft-a1"]
    told = ran(capsys, "show", storage / "artifacts/mrl-b1")
    assert "model: sft-a2" in told
    assert "    corpus: corpus-c1" in told
    assert json.loads(ran(capsys, "show", storage / "artifacts/mrl-b1", "--json"))["lineage"][1]["name"] == "corpus"
    assert "1 unused" in ran(capsys, "gc", storage)
    assert (storage / "artifacts/sft-a1").exists(), "only shown"
    assert json.loads(ran(capsys, "gc", storage, "--json"))["deleted"] is False
    assert "1 deleted" in ran(capsys, "gc", storage, "--delete")
    assert not (storage / "artifacts/sft-a1").exists()
    assert ran(capsys, "gc", storage) == "nothing is unused\n"


def test_damage_is_named_with_both_hashes_and_the_rest_is_checked_too(storage: Path, capsys: Capture) -> None:
    assert ran(capsys, "verify", storage).count("whole") == 4
    (storage / "artifacts/sft-a1/config.json").write_text("[]")
    (storage / "artifacts/corpus-c1/manifest.json").write_text("{")
    assert "2 of 4 artifacts damaged" in ran(capsys, "verify", storage, code=2)
    guarded(lambda: rxt(["artifacts", "verify", str(storage), "--json"], standalone_mode=False))
    damage = {Path(row["path"]).name: row["damage"] for row in json.loads(capsys.readouterr().out)}
    assert damage["mrl-b1"] is None
    assert "sha256 4f53cda1" in damage["sft-a1"]
    assert "the manifest says 44136fa3" in damage["sft-a1"]
    assert "manifest.json: unreadable" in damage["corpus-c1"]
    assert "damaged: " in ran(capsys, "list", storage)
    assert "neither an artifact (manifest.json) nor a storage" in ran(capsys, "verify", storage / "work", code=2)


def test_a_storage_that_is_not_there_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    for command in ("list", "gc", "verify"):
        err = ran(capsys, command, tmp_path, code=2)
        assert re.match(rf"error: {tmp_path}\S*: (no such folder|neither an artifact)", err)


def test_the_commands_do_without_torch() -> None:
    code = "import sys, rxt_platform.cli_artifacts, rxt_platform.orchestration.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_lock_that_can_not_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/run.one.lock").symlink_to("/dev/full")
    with (
        pytest.raises(ArtifactError, match=r"run.one.lock: cannot be written: .*set 'storage' to a folder with room"),
        only_holder(tmp_path / "work/run.one.lock"),
    ):
        pass

"""Resume states on disk: which one is used, which are removed, and what is refused."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rxt_platform.config.training import BestConfig
from rxt_platform.errors import ArtifactError, ResumeError
from rxt_platform.storage.directory import MANIFEST, seal_directory
from rxt_platform.storage.remote import RemoteFolder
from rxt_platform.training.checkpoints import (
    KIND,
    STATE,
    Pieces,
    ResumeState,
    Skipped,
    Total,
    added,
    checkpoints_in,
    find,
    folder_name,
    newest_complete,
    outdated,
    owned_totals,
    remove,
)
from rxt_platform.training.sharding import KINDS

TOTALS = {kind: Total(12, 0.5, 2.0) for kind in KINDS}


def a_state(step: int, **metrics: float) -> ResumeState:
    """Of a run that skipped one batch."""
    skipped = [Skipped(1, "the loss is nan", ["story_world:3"])]
    return ResumeState(
        step, 1.5, "same", {"model": {"size": 8}}, 2, 1, {"loss": 3.0}, metrics, {"head": 2}, skipped, [2.5], TOTALS
    )


def a_checkpoint(folder: Path, step: int, **metrics: float) -> Path:
    """Sealed, with one file of tensors."""
    target = folder / folder_name(step)
    source = folder / f".{target.name}.test.tmp"
    source.mkdir(parents=True)
    save_file({"weight/0/heads.bias": torch.arange(4.0)}, source / "rank-00000-00000.safetensors")
    a_state(step, **metrics).write(source)
    seal_directory(source, target, KIND)
    return target


def names(paths: list[Path]) -> list[int]:
    """Steps of checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in paths]


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def flip(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_state(checkpoint: Path) -> None:
    path = checkpoint / STATE
    path.write_text(path.read_text().replace('"same"', '"SAME"'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "rank-00000-00000.safetensors: [0-9]+ bytes, the manifest says"),
        (flip, "rank-00000-00000.safetensors: sha256 .* the file was altered"),
        (edit_state, "state.json: sha256 .* the file was altered"),
        (lambda path: (path / MANIFEST).unlink(), "no manifest.json: not a complete artifact"),
        (lambda path: (path / MANIFEST).write_text("{"), "manifest.json: unreadable"),
        (lambda path: (path / STATE).unlink(), r"files missing: \['state.json'\]"),
        (lambda path: (path / "more").write_text(""), r"not in the manifest: \['more'\]"),
        (lambda path: (path / "link").symlink_to("/etc/passwd"), "links and special files are not allowed"),
    ],
)
def test_a_damaged_one_is_named_with_the_reason_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], reason: str
) -> None:
    whole, newest = a_checkpoint(tmp_path, 3), a_checkpoint(tmp_path, 6)
    assert newest_complete(tmp_path) == newest
    damage(newest)
    assert newest_complete(tmp_path) == whole
    assert f"skipping a damaged checkpoint: {newest}" in caplog.text
    shutil.rmtree(whole)
    with pytest.raises(ResumeError, match=f"no usable checkpoint: .*{reason}.*Delete .* to start this stage again"):
        newest_complete(tmp_path)


def test_nothing_written_yet_is_no_error(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "none") is None
    (tmp_path / ".step-00000003.attempt.tmp").mkdir()
    assert newest_complete(tmp_path) is None
    assert checkpoints_in(tmp_path) == []


def test_going_back_finds_one_from_before(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        a_checkpoint(tmp_path, step)
    assert newest_complete(tmp_path, below=9) == tmp_path / folder_name(6)
    assert newest_complete(tmp_path, below=3) is None


def uploaded(folder: Path, *steps: int) -> RemoteFolder:
    """Remote storage with checkpoints, one upload that was cut off, and a directory that is none of the run's."""
    remote = RemoteFolder(f"file://{folder}/remote")
    for step in steps:
        remote.upload(a_checkpoint(folder / "made", step))
    remote.upload(a_checkpoint(folder / "made", 99))
    (folder / "remote" / folder_name(99) / MANIFEST).unlink()
    remote.upload(a_checkpoint(folder / "made", 3).rename(folder / "zoo"))
    return remote


@pytest.mark.parametrize(
    ("here", "there", "found"),
    [((), (), None), ((3,), (), 3), ((), (3, 6), 6), ((3,), (3, 6), 6), ((3, 6), (3,), 6), ((6,), (6,), 6)],
)
def test_the_newest_one_is_found_here_or_in_the_remote_storage(
    tmp_path: Path, here: tuple[int, ...], there: tuple[int, ...], found: int | None
) -> None:
    at = tmp_path / "checkpoints"
    for step in here:
        a_checkpoint(at, step)
    for leftover in (".step-00000009.attempt.tmp", ".step-00000006.0123abcd.stale"):
        (at / leftover).mkdir(parents=True)
    assert find(at, uploaded(tmp_path, *there)) == (None if found is None else at / folder_name(found))
    assert names(list(at.iterdir())) == sorted({*here, *([] if found is None else [found])}), "and no leftovers"


def test_damaged_ones_here_and_there_are_named_and_the_newest_whole_one_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at, remote = tmp_path / "checkpoints", uploaded(tmp_path, 3, 6, 9)
    for step in (3, 6):
        flip(a_checkpoint(at, step))
    truncate(tmp_path / "remote" / folder_name(9))
    assert find(at, remote) == at / folder_name(6)
    assert ResumeState.read(at / folder_name(6)).step == 6
    assert f"skipping a checkpoint that can't be fetched: {remote.uri}/{folder_name(9)}/rank-" in caplog.text
    for step in (3, 6):
        truncate(tmp_path / "remote" / folder_name(step))
    truncate(at / folder_name(6))
    with pytest.raises(ResumeError, match=f"no usable checkpoint: .*{at}/step-00000003/.*{remote.uri}/step-00000003/"):
        find(at, remote)


def test_remote_storage_that_cannot_be_listed_may_hold_a_newer_one(tmp_path: Path) -> None:
    """So it is an error, not a run that goes on from an older one."""
    a_checkpoint(tmp_path / "checkpoints", 3)
    (tmp_path / "remote").write_text("")
    with pytest.raises(ArtifactError, match="remote: cannot be listed"):
        find(tmp_path / "checkpoints", RemoteFolder(f"file://{tmp_path}/remote"))


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        newest = a_checkpoint(tmp_path, step)
    assert names(outdated(newest, 2, None)) == [3, 6]
    assert names(outdated(newest, 9, None)) == []
    remove(outdated(newest, 1, None))
    assert names(checkpoints_in(tmp_path)) == [12]


def test_damaged_later_ones_do_not_take_the_place_of_whole_ones(tmp_path: Path) -> None:
    """The run went on from step 3, since 6 and 9 are damaged, and was stopped at step 4 by a signal."""
    for step in (3, 6, 9):
        a_checkpoint(tmp_path, step)
    for step in (6, 9):
        flip(tmp_path / folder_name(step))
    newest = a_checkpoint(tmp_path, 4)
    assert names(outdated(newest, 2, None)) == []
    remove(outdated(newest, 1, None))
    assert newest_complete(tmp_path) == newest


@pytest.mark.parametrize(
    ("highest", "losses", "kept"),
    [
        (False, [2.0, 1.0, 1.5, 1.2], [6, 12]),
        (True, [2.0, 1.0, 1.5, 1.2], [3, 12]),
        (False, [2.0, 1.0, 1.0, 1.2], [6, 12]),  # measured at 6 and not again until 12
        (False, [2.0, 1.5, 1.2, 1.0], [12]),
        (False, [math.nan, 1.0, math.inf, 1.2], [6, 12]),
        (True, [math.nan, 1.0, math.inf, 1.2], [12]),
    ],
)
def test_the_best_one_is_kept_too(tmp_path: Path, highest: bool, losses: list[float], kept: list[int]) -> None:
    for step, loss in zip((3, 6, 9, 12), losses, strict=True):
        newest = a_checkpoint(tmp_path, step, validation_loss=loss)
    remove(outdated(newest, 1, BestConfig(metric="validation_loss", highest=highest)))
    assert names(checkpoints_in(tmp_path)) == kept


def test_a_metric_that_is_never_measured_is_said_with_those_that_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a_checkpoint(tmp_path, 3, loss=1.0)
    newest = a_checkpoint(tmp_path, 6, loss=1.0, validation_loss=1.0)
    assert names(outdated(newest, 1, BestConfig(metric="validation_los"))) == [3]
    assert "training.checkpoints.best.metric 'validation_los' is not among the metrics: validation_loss" in caplog.text
    assert caplog.text.count("is not among") == 1, "the other is from before the first evaluation"


def test_a_half_removed_one_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process is killed in the middle: the manifest goes first."""
    whole, other = a_checkpoint(tmp_path, 3), a_checkpoint(tmp_path, 6)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    remove([other])
    assert (other / STATE).exists()
    assert newest_complete(tmp_path) == whole


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    state = a_state(6, loss=1.25, validation_loss=math.inf)
    state.write(tmp_path)
    assert ResumeState.read(tmp_path) == state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: "not json", "Expecting value"),
        (lambda raw: json.dumps([1]), "expected the keys before, identity"),
        (lambda raw: json.dumps({**raw, "more": 1}), "expected the keys"),
        (lambda raw: json.dumps({key: raw[key] for key in raw if key != "spec"}), "expected the keys"),
        (lambda raw: json.dumps({**raw, "step": "nine"}), "step: Input should be a valid integer"),
        (lambda raw: json.dumps({**raw, "updates": {"head": None}}), "updates.head: Input should be a valid integer"),
        (lambda raw: json.dumps({**raw, "skipped": 3}), "skipped: Input should be a valid list"),
        (lambda raw: json.dumps({**raw, "skipped": [{"step": 1}]}), "skipped.0.reason: Field required"),
        (lambda raw: json.dumps({**raw, "totals": []}), "totals: Input should be a valid dictionary"),
        (lambda raw: json.dumps({**raw, "totals": {}}), "totals: expected those of weight, exp_avg, exp_avg_sq"),
    ],
)
def test_wrong_content_is_an_error_that_names_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], str], reason: str
) -> None:
    path = tmp_path / STATE
    path.write_text(change(json.loads(json.dumps(asdict(a_state(6))))))
    with pytest.raises(ArtifactError, match=f"{path}: not a resume state: {reason}"):
        ResumeState.read(tmp_path)


def test_no_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"state.json: not a resume state: .*No such file"):
        ResumeState.read(tmp_path)


def written_pieces(folder: Path, cuts: list[list[tuple[int, int]]]) -> torch.Tensor:
    """A parameter of 12 elements in files of ranks, cut as said; another one whole."""
    whole = torch.arange(12.0)
    for rank, parts in enumerate(cuts):
        tensors = {f"weight/{start}/heads.weight": whole[start:stop].clone() for start, stop in parts}
        tensors[f"exp_avg/{12 * rank}/heads.weight"] = torch.zeros(12)
        save_file(tensors, folder / f"rank-{rank:05d}-00000.safetensors")
    return whole


@pytest.mark.parametrize(
    "cuts",
    [
        [[(0, 12)]],
        [[(0, 5)], [(5, 12)]],
        [[(8, 12), (0, 3)], [(3, 8)]],
        [[(number, number + 1)] for number in range(12)],
    ],
)
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 6), (6, 12), (2, 9), (11, 12)])
def test_any_part_is_read_from_pieces_however_they_were_cut(
    tmp_path: Path, cuts: list[list[tuple[int, int]]], start: int, stop: int
) -> None:
    whole = written_pieces(tmp_path, cuts)
    into = torch.full((stop - start,), math.nan)
    pieces = Pieces(tmp_path)
    pieces.read("weight", "heads.weight", start, stop, into)
    assert torch.equal(into, whole[start:stop])
    assert pieces.sizes("weight") == {"heads.weight": 12}
    assert pieces.sizes("exp_avg_sq") == {}


@pytest.mark.parametrize(
    ("cuts", "missing"),
    [
        ([[(0, 5)], [(7, 12)]], "0 to 12 those from 5 on"),
        ([[(0, 11)]], "0 to 12 those from 11 on"),
        ([[(1, 12)]], "0 to 12 those from 0 on"),
        ([[(0, 5)], [(3, 10)]], "0 to 12 those from 5 on"),  # 12 elements in all, but not these
    ],
)
def test_missing_elements_are_said(tmp_path: Path, cuts: list[list[tuple[int, int]]], missing: str) -> None:
    written_pieces(tmp_path, cuts)
    with pytest.raises(ResumeError, match=f"weight of heads.weight: of elements {missing} are missing"):
        Pieces(tmp_path).read("weight", "heads.weight", 0, 12, torch.empty(12))


class Payload:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    file = tmp_path / "rank-00000-00000.safetensors"
    for content in (pickle.dumps(Payload(tmp_path / "executed")), b"\x80"):
        file.write_bytes(content)
        with pytest.raises(ResumeError, match=f"{file}: not a file of a checkpoint"):
            Pieces(tmp_path)
    torch.save({"weight/0/heads.weight": Payload(tmp_path / "executed")}, file)
    with pytest.raises(ResumeError, match=f"{file}: not a file of a checkpoint"):
        Pieces(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "tensors",
    [{"heads.weight": torch.zeros(3)}, {"weight/x/heads": torch.zeros(3)}, {"weight/0/heads": torch.zeros(3, 3)}],
)
def test_tensors_of_another_making_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "rank-00000-00000.safetensors")
    with pytest.raises(ResumeError, match="not a file of a checkpoint"):
        Pieces(tmp_path)


def test_totals_agree_in_any_order_and_cut_and_not_otherwise() -> None:
    """Of numbers of very different size."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(1_000_000, generator=generator) * torch.randn(1_000_000, generator=generator).mul(5).exp()
    whole = owned_totals([("weight", tensor)])["weight"]
    shuffled = tensor[torch.randperm(len(tensor), generator=generator)]
    cut = [owned_totals([("weight", part)]) for part in shuffled.split([1, 600_000, 399_999])]
    assert added(cut)["weight"].agrees(whole)
    assert added(cut)["exp_avg"] == Total(0, 0.0, 0.0)
    assert added(cut)["weight"] != whole, "exactly it does not"
    assert not owned_totals([("weight", tensor * 1.00001)])["weight"].agrees(whole)
    exchanged = tensor.clone()
    exchanged[tensor.topk(2).indices] += tensor.max() * torch.tensor([0.01, -0.01])  # the same sum
    assert not owned_totals([("weight", exchanged)])["weight"].agrees(whole)
    assert not owned_totals([("weight", -tensor)])["weight"].agrees(whole)
    assert not owned_totals([("weight", tensor[:-1])])["weight"].agrees(whole)
    assert not replace(whole, count=whole.count + 1).agrees(whole)
    assert not replace(whole, total=math.nan).agrees(whole)
    assert not replace(whole, square=math.nan).agrees(whole)
    assert replace(whole, total=whole.total * (1 + 1e-14)).agrees(whole)
    nothing = Total(0, 0.0, 0.0)
    assert nothing.agrees(nothing)

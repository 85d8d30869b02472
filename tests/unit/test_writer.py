"""How checkpoints are written, with the ranks as threads of this process: whole or absent, and nobody waits in vain."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rxt_platform.config.training import CheckpointConfig
from rxt_platform.errors import ArtifactError, ResumeError
from rxt_platform.storage.directory import commit_directory, verify_directory
from rxt_platform.storage.remote import RemoteFolder
from rxt_platform.training.checkpoints import (
    KIND,
    Pieces,
    ResumeState,
    checkpoints_in,
    folder_name,
    newest_complete,
)
from rxt_platform.training.sharding import KINDS, Stretch
from rxt_platform.training.watch import Watch, claim
from rxt_platform.training.writer import CheckpointWriter, Uploads, WriterSettings

pytestmark = pytest.mark.timeout(120)

SIZE = 1000
STATE = ResumeState(3, 1.5, "same", {}, 2, 1, {}, {}, {"head": 3})


class Held:
    """What the writer asks of `ShardedState`, for one parameter cut over the ranks, without DeepSpeed."""

    def __init__(self, rank: int, world: int, size: int = SIZE) -> None:
        self.rank, self.world = rank, world
        part = size // world
        self.kinds = {
            kind: torch.arange(float(size))[rank * part : (rank + 1) * part] + 0.25 * number
            for number, kind in enumerate(KINDS)
        }
        parameter = nn.Parameter(torch.zeros(size))
        self.owned = [Stretch("heads.weight", parameter, rank * part, part, self.kinds["weight"], 0)]

    def state(self, stretch: Stretch, kind: str) -> Tensor:
        return self.kinds[kind].narrow(0, stretch.offset, stretch.length)


@dataclass
class Ranks:
    """The writers of a job's ranks."""

    directory: Path
    writers: list[CheckpointWriter]
    held: list[Held]

    def save(self, step: int, *ranks: int) -> None:
        """On all ranks, or those said."""
        for rank in ranks or range(len(self.writers)):
            self.writers[rank].save(replace(STATE, step=step))

    def wait(self) -> None:
        """Until what was saved last is complete."""
        for writer in self.writers:
            writer.wait()


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the writers of a job."""
    started: list[CheckpointWriter] = []
    watches: list[Watch] = []

    def make(world: int = 2, deadline: float = 60.0, size: int = SIZE, **config: object) -> Ranks:
        model = nn.Module()
        model.register_buffer("positions", torch.arange(5.0))
        directory = tmp_path / "checkpoints"
        held = [Held(rank, world, size) for rank in range(world)]
        for one in held:
            watches.append(Watch(tmp_path / f"workers-{len(watches)}", one.rank, world, "attempt"))
            settings = WriterSettings(directory, CheckpointConfig(**config), watches[-1], deadline)  # type: ignore[arg-type]
            started.append(CheckpointWriter(one, model, settings))  # type: ignore[arg-type]
        return Ranks(directory, started[-world:], held)

    yield make
    for writer in started:
        writer.close()
    for watch in watches:
        watch.close()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_parts_make_one_checkpoint(start: Start, world: int, asynchronous: bool) -> None:
    ranks = start(world, asynchronous=asynchronous)
    for rank in reversed(range(world)):  # rank 0 last: in this thread it would wait for the others
        ranks.save(3, rank)
    if asynchronous:
        ranks.wait()
    checkpoint = newest_complete(ranks.directory)
    assert checkpoint == ranks.directory / "step-00000003"
    assert list(ranks.directory.iterdir()) == [checkpoint]
    pieces = Pieces(checkpoint)
    for number, kind in enumerate(KINDS):
        into = torch.empty(SIZE)
        pieces.read(kind, "heads.weight", 0, SIZE, into)
        assert torch.equal(into, torch.arange(float(SIZE)) + 0.25 * number)
    totals = ResumeState.read(checkpoint).totals
    assert totals["weight"].count == SIZE
    assert totals["weight"].total == SIZE * (SIZE - 1) / 2
    assert torch.equal(load_file(checkpoint / "buffers.safetensors")["positions"], torch.arange(5.0))


def test_large_parts_are_cut_into_several_files(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxt_platform.training.writer._FILE_BYTES", 5_000)
    ranks = start(1)
    ranks.save(3)
    ranks.wait()
    files = sorted(path.name for path in (ranks.directory / "step-00000003").glob("rank-*"))
    assert files == ["rank-00000-00000.safetensors", "rank-00000-00001.safetensors"]
    into = torch.empty(SIZE)
    Pieces(ranks.directory / "step-00000003").read("exp_avg_sq", "heads.weight", 0, SIZE, into)
    assert torch.equal(into, torch.arange(float(SIZE)) + 0.5)


def test_what_is_written_is_what_was_there_when_it_was_saved(start: Start) -> None:
    """Training goes on while 64 MB for each kind are written."""
    ranks = start(1, size=16_000_000)
    for step in (1, 2):  # the second time into the same memory
        ranks.save(step)
        for tensor in ranks.held[0].kinds.values():
            tensor += 1.0
        ranks.wait()
        into = torch.empty(16_000_000)
        Pieces(ranks.directory / folder_name(step)).read("exp_avg_sq", "heads.weight", 0, 16_000_000, into)
        assert torch.equal(into, torch.arange(16_000_000.0) + 0.5 + (step - 1)), step


def test_a_rank_that_cannot_write_is_not_waited_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = start(2)
    ranks.save(3)
    ranks.wait()
    monkeypatch.setattr(ranks.writers[1], "_check_space", lambda folder, needed: _no_space())
    ranks.save(6)
    started = time.monotonic()
    before = f"The checkpoint before, {ranks.directory}/step-00000003, is whole"
    with pytest.raises(ArtifactError, match=rf"step-00000006: given up: workers \[1\] could not write. {before}"):
        ranks.writers[0].wait()
    told = rf"step-00000006: cannot be written: no space left; this worker's part needs 6,000 bytes. {before}"
    assert ranks.writers[1].failed
    with pytest.raises(ArtifactError, match=told):
        ranks.writers[1].wait()
    assert time.monotonic() - started < 5, "not the deadline of a minute"
    verify_directory(ranks.directory / "step-00000003", KIND)
    assert names(ranks.directory) == [3]


def _no_space() -> None:
    raise OSError("no space left")


def until(condition: Callable[[], object]) -> None:
    """Wait for what a thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names(directory: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints_in(directory)]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError()])
def test_whatever_a_rank_fails_with_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ranks = start(2)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(ranks.writers[1], "_write_files", fail)
    ranks.save(3)
    with pytest.raises(ArtifactError, match=r"workers \[1\] could not write. There is no whole one before it"):
        ranks.writers[0].wait()
    with pytest.raises(type(error)):
        ranks.writers[1].wait()


def test_a_rank_that_never_comes_is_given_up_at_the_deadline(start: Start) -> None:
    ranks = start(2, deadline=0.5)
    ranks.save(3, 0)
    with pytest.raises(ArtifactError, match=r"given up: the parts of workers \[1\] did not come within 0.5 s"):
        ranks.writers[0].wait()
    assert names(ranks.directory) == []


def test_closing_ends_the_wait(start: Start) -> None:
    ranks = start(2)
    ranks.save(3, 0)
    started = time.monotonic()
    ranks.writers[0].close()
    assert time.monotonic() - started < 5
    assert ranks.writers[0].failed
    assert names(ranks.directory) == []


def test_a_failure_is_told_before_the_next_one_is_begun(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = start(1)
    monkeypatch.setattr(ranks.writers[0], "_check_space", lambda folder, needed: _no_space())
    ranks.save(3)
    until(lambda: ranks.writers[0].failed)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="step-00000003: cannot be written"):
        ranks.save(6)
    ranks.save(9)
    ranks.wait()
    assert names(ranks.directory) == [9]


def test_a_file_that_is_gone_before_it_is_sealed_leaves_no_checkpoint(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system that shows one node's note before its file."""
    ranks = start(2)
    original = ranks.writers[0]._complete

    def lose(folder: Path, target: Path, state: ResumeState) -> None:
        until((folder / "note-00001.json").exists)
        (folder / "rank-00001-00000.safetensors").unlink()
        original(folder, target, state)

    monkeypatch.setattr(ranks.writers[0], "_complete", lose)
    ranks.save(3)
    with pytest.raises(ArtifactError, match=r"not committed: rank-00001-00000.safetensors were written but are not in"):
        ranks.writers[0].wait()
    assert names(ranks.directory) == []


def test_an_attempt_that_was_replaced_writes_no_more(start: Start) -> None:
    """A process that was halted for long must not put its old steps among the new attempt's."""
    ranks = start(1)
    ranks.save(3)
    ranks.wait()
    watch = ranks.writers[0].settings.watch
    watch.close()  # its thread would end this process
    claim(watch.directory)
    ranks.save(6)
    with pytest.raises(ResumeError, match=r"the job was started again as attempt [0-9a-f]+; this one ends"):
        ranks.wait()
    assert names(ranks.directory) == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_are_not_written(start: Start, kind: str) -> None:
    ranks = start(2)
    ranks.save(3)
    ranks.wait()
    ranks.held[1].kinds[kind][7] = math.inf
    ranks.save(6)
    before = f"The checkpoint before, {ranks.directory}/step-00000003, is whole"
    with pytest.raises(ArtifactError, match=f"step-00000006: not written: .* are not finite. {before}"):
        ranks.writers[0].wait()
    assert names(ranks.directory) == [3]


def test_the_policy_is_kept_while_training_goes_on(start: Start) -> None:
    ranks = start(2, keep=2)
    for step in (3, 6, 9):
        ranks.save(step)
    ranks.wait()
    assert names(ranks.directory) == [6, 9]


class Gate(RemoteFolder):
    """A real folder, whose uploads wait until they may."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.open, self.begun = threading.Event(), threading.Event()
        self.uploaded: list[str] = []

    def upload(self, directory: Path) -> None:
        self.begun.set()
        assert self.open.wait(30)
        super().upload(directory)
        self.uploaded.append(directory.name)


@pytest.fixture
def gated(start: Start, tmp_path: Path) -> Iterator[tuple[Ranks, Gate]]:
    """A job of one rank that keeps one checkpoint here and copies to a slow place."""
    ranks = start(1, keep=1)
    gate = Gate(f"file://{tmp_path}/remote")
    ranks.writers[0].remote = gate
    ranks.writers[0]._uploads = Uploads(gate, ranks.writers[0].settings.config)
    yield ranks, gate
    gate.open.set()


def test_slow_uploads_neither_stop_training_nor_lose_what_they_copy(gated: tuple[Ranks, Gate]) -> None:
    """Steps 6 and 9 pass while 3 is copied, with one kept here: 3 stays until its copy is made, then 9 is next."""
    ranks, gate = gated
    ranks.save(3)
    assert gate.begun.wait(30)
    for step in (6, 9):
        ranks.save(step)
        ranks.wait()
    assert names(ranks.directory) == [3, 9]
    gate.open.set()
    ranks.writers[0].close(finish_uploads=True)
    assert gate.uploaded == ["step-00000003", "step-00000009"]
    assert gate.complete() == ["step-00000003", "step-00000009"], "what is here is also there"


def test_the_remote_keeps_what_is_kept_here_and_what_is_not_ours(gated: tuple[Ranks, Gate], tmp_path: Path) -> None:
    ranks, gate = gated
    gate.open.set()
    with commit_directory(tmp_path / "remote/a-model", "model") as folder:
        (folder / "weights").write_text("")
    uploads = ranks.writers[0]._uploads
    assert uploads is not None
    for step in (3, 6):
        ranks.save(step)
        ranks.wait()
        until(lambda: folder_name(step) in gate.uploaded and uploads.skip_waiting() is None)  # noqa: B023
    assert gate.complete() == ["a-model", "step-00000006"]


def test_going_back_removes_what_is_newer_here_and_there(start: Start, tmp_path: Path) -> None:
    """Else the next start would go on from a step of the way that was given up."""
    ranks = start(1, keep=9, upload=f"file://{tmp_path}/remote")
    (writer,) = ranks.writers
    assert writer.remote is not None
    assert writer._uploads is not None
    for step in (3, 6, 9):
        ranks.save(step)
        ranks.wait()
        writer._uploads.finish()
    assert writer.remote.complete() == [folder_name(step) for step in (3, 6, 9)]
    assert writer.told_of_copies() == f"; step-00000009 is in {writer.remote.uri}"
    writer.forget_after(ranks.directory / folder_name(3))
    assert names(ranks.directory) == [3]
    assert writer.remote.complete() == [folder_name(3)]


def test_a_failed_upload_is_said_and_the_next_one_tried(
    gated: tuple[Ranks, Gate], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks, gate = gated
    gate.open.set()
    (tmp_path / "remote").write_text("a file where the folder should be")
    ranks.save(3)
    ranks.wait()
    uploads = ranks.writers[0]._uploads
    assert uploads is not None
    told = f"step-00000003 was not copied to file://{tmp_path}/remote; training goes on"
    until(lambda: told in caplog.text)
    assert uploads.failures
    (tmp_path / "remote").unlink()
    ranks.save(6)
    ranks.wait()
    ranks.writers[0].close(finish_uploads=True)
    assert gate.complete() == ["step-00000006"]


def test_an_upload_that_does_not_end_is_given_up(gated: tuple[Ranks, Gate], caplog: pytest.LogCaptureFixture) -> None:
    """Stopping a job must not hang on it: the checkpoint is whole here."""
    ranks, gate = gated
    ranks.save(3)
    ranks.wait()
    assert gate.begun.wait(30)
    uploads = ranks.writers[0]._uploads
    assert uploads is not None
    uploads.close(finish=True, deadline=0.2)
    assert "the upload did not end within 0.2 s and is given up" in caplog.text

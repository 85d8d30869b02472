"""Checkpoints written while training goes on.

`save` copies this rank's part into memory and returns; a thread writes it. The ranks meet in the storage, not in a
collective: each one leaves a note with the hashes of its files, and rank 0, once all notes are there, seals the
directory with a manifest. So a checkpoint is complete or absent, whoever is killed when, and no training step waits.
Copies to the run's remote storage follow in a second thread.
"""

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rxt_platform.config.training import CheckpointConfig
from rxt_platform.errors import ArtifactError, ResumeError
from rxt_platform.storage.directory import FileEntry, flush_and_hash, seal_directory
from rxt_platform.storage.remote import RemoteFolder
from rxt_platform.training.checkpoints import (
    BUFFERS,
    KIND,
    PREFIX,
    ResumeState,
    Total,
    added,
    checkpoints_in,
    folder_name,
    newest_complete,
    outdated,
    owned_totals,
    remove,
)
from rxt_platform.training.sharding import KINDS, ShardedState, Stretch
from rxt_platform.training.watch import Watch

logger = logging.getLogger(__name__)

_FILE_BYTES = 256 * 2**20  # of one file of a rank, about
_POLL = 0.02  # seconds


@dataclass(frozen=True)
class WriterSettings:
    """Where and how checkpoints are written; the attempt of `watch` is the same on all ranks, new with each start."""

    directory: Path
    config: CheckpointConfig
    watch: Watch
    deadline: float = 3600.0  # seconds for the parts of all ranks: storage may be slow; a rank that dies ends the job


class CheckpointWriter:
    """Writes this rank's part of every checkpoint; on rank 0 also completes and uploads it, and removes old ones."""

    def __init__(self, sharded: ShardedState, model: nn.Module, settings: WriterSettings) -> None:
        self.sharded, self.model, self.settings = sharded, model, settings
        self.bytes_written = 0
        self.seconds_to_disk = 0.0  # of the last one, from the call of `save` on
        self._copies: dict[tuple[int, str], Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._closed = threading.Event()
        upload = settings.config.upload if sharded.rank == 0 else None
        # Each step's copies have a folder of their own, named like its work folder: stages and runs share a URI.
        self.remote = RemoteFolder(upload, settings.directory.parent.name) if upload else None
        self._uploads = Uploads(self.remote, settings.config) if self.remote is not None else None

    def save(self, state: ResumeState) -> None:
        """Take a copy and have it written; waits for the one before. Raises ArtifactError if that one failed."""
        self.wait()
        started = time.monotonic()
        owned = self.sharded.owned
        if self.settings.config.asynchronous:
            tensors = self._copied(owned)
            buffers = {name: buffer.detach().cpu().clone() for name, buffer in self.model.named_buffers()}
            self._running = self._thread.submit(self._write, state, tensors, buffers, started)
        else:
            plain = [(kind, one, self.sharded.state(one, kind).cpu()) for kind in KINDS for one in owned]
            buffers = {name: buffer.detach().cpu() for name, buffer in self.model.named_buffers()}
            self._write(state, plain, buffers, started)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` says why."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises ArtifactError if it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self, finish_uploads: bool = False) -> None:
        """End the threads; what is not complete by now is given up. Uploads can be waited for."""
        self._closed.set()
        self._thread.shutdown(wait=True)
        if self._uploads is not None:
            self._uploads.close(finish_uploads)

    def forget_after(self, checkpoint: Path) -> None:
        """Remove newer checkpoints, here and in the remote storage: the run goes on from this one. Rank 0 only."""
        if self._uploads is not None:
            self._uploads.finish()
        remove(one for one in checkpoints_in(self.settings.directory) if one.name > checkpoint.name)
        for name in self.remote.complete(PREFIX) if self.remote is not None else []:
            assert self.remote is not None
            if name > checkpoint.name:
                self.remote.remove(name)

    def told_of_copies(self) -> str:
        """Whether the newest checkpoint is in the remote storage, for a message. Rank 0 only."""
        if self._uploads is None or self.remote is None:
            return ""
        newest = checkpoints_in(self.settings.directory)[-1].name
        there = self._uploads.copied == newest
        return f"; {newest} is {'' if there else 'NOT '}in {self.remote.uri}"

    def _copied(self, owned: Sequence[Stretch]) -> list[tuple[str, Stretch, Tensor]]:
        """Copies of whole holders, a few large ones, into memory that is used again each time."""
        tensors, fresh = [], set()
        for kind in KINDS:
            for one in owned:
                place = (id(one.holder), kind)
                if place not in fresh:
                    whole = self.sharded.state(replace(one, offset=0, length=one.holder.numel()), kind)
                    if place not in self._copies:
                        self._copies[place] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
                    self._copies[place].copy_(whole)
                    fresh.add(place)
                tensors.append((kind, one, self._copies[place].narrow(0, one.offset, one.length)))
        return tensors

    def _write(
        self,
        state: ResumeState,
        tensors: list[tuple[str, Stretch, Tensor]],
        buffers: dict[str, Tensor],
        started: float,
    ) -> None:
        """This rank's files and its note; on rank 0 then the whole."""
        target = self.settings.directory / folder_name(state.step)
        temporary = self.settings.directory / f".{target.name}.{self.settings.watch.attempt}.tmp"
        needed = sum(tensor.numel() * tensor.element_size() for _, _, tensor in tensors)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self._check_space(temporary, needed)
            files = self._write_files(temporary, tensors, buffers)
            totals = owned_totals((kind, tensor) for kind, _, tensor in tensors)
            self._leave_note(
                temporary,
                {
                    "files": {name: entry.model_dump() for name, entry in files.items()},
                    "totals": {kind: asdict(total) for kind, total in totals.items()},
                },
            )
            self.bytes_written = needed
            if self.sharded.rank == 0:
                self._complete(temporary, target, state)
        except Exception as error:  # whatever it is, rank 0 must not wait for this part
            self._withdraw(temporary)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
            raise ArtifactError(
                f"{target}: cannot be written: {error}; this worker's part needs {needed:,} bytes. "
                f"{self._intact(state.step)}"
            ) from error
        self.seconds_to_disk = time.monotonic() - started

    def _write_files(
        self, folder: Path, tensors: list[tuple[str, Stretch, Tensor]], buffers: dict[str, Tensor]
    ) -> dict[str, FileEntry]:
        rank = self.sharded.rank
        files: dict[str, FileEntry] = {}
        part: dict[str, Tensor] = {}

        def flush(number: int) -> None:
            path = folder / f"rank-{rank:05d}-{number:05d}.safetensors"
            save_file(part, path)
            files[path.name] = flush_and_hash(path)
            part.clear()

        size = number = 0
        for kind, one, tensor in tensors:
            part[f"{kind}/{one.start}/{one.name}"] = tensor
            size += tensor.numel() * tensor.element_size()
            if size >= _FILE_BYTES:
                flush(number)
                size, number = 0, number + 1
        if part:
            flush(number)
        if rank == 0:
            save_file(buffers, folder / BUFFERS)
            files[BUFFERS] = flush_and_hash(folder / BUFFERS)
        return files

    def _leave_note(self, folder: Path, note: dict[str, Any]) -> None:
        path = folder / f"note-{self.sharded.rank:05d}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(note))
        unfinished.rename(path)

    def _withdraw(self, folder: Path) -> None:
        """Make room, and tell rank 0; other workers may be writing still."""
        try:
            for path in folder.glob(f"rank-{self.sharded.rank:05d}-*"):
                path.unlink(missing_ok=True)
            self._leave_note(folder, {"failed": True})
        except OSError as error:
            logger.debug("rank 0 could not be told: %s", error)  # it gives up at the deadline

    def _complete(self, folder: Path, target: Path, state: ResumeState) -> None:
        """Once all ranks have left their notes: state, manifest, the final name, and out with the old ones."""
        told = self._gather_notes(folder, target, state.step)
        totals = added({kind: Total(**total) for kind, total in one["totals"].items()} for one in told)
        if not all(math.isfinite(total.square) for total in totals.values()):
            raise ArtifactError(f"{target}: not written: weights or moments are not finite. {self._intact(state.step)}")
        self.settings.watch.check_current()  # or it would be put among those of the attempt that took over
        replace(state, totals=totals).write(folder)
        hashed = {name: FileEntry(**entry) for one in told for name, entry in one["files"].items()}
        seal_directory(folder, target, KIND, hashed=hashed)
        going = outdated(target, self.settings.config.keep, self.settings.config.best)
        if self._uploads is None:
            remove(going)
            return
        copied = self._uploads.skip_waiting()
        remove(path for path in going if path != copied)  # that one goes with the next checkpoint
        self._uploads.add(target)

    def _gather_notes(self, folder: Path, target: Path, step: int) -> list[dict[str, Any]]:
        """Every rank's, once all are there; they are deleted. Raises ArtifactError when one won't come."""
        notes = [folder / f"note-{rank:05d}.json" for rank in range(self.sharded.world)]
        told: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.settings.deadline
        while len(told) < len(notes):
            for rank, note in enumerate(notes):
                if rank not in told and note.exists():
                    told[rank] = json.loads(note.read_text())
            if failed := [rank for rank, one in told.items() if "failed" in one]:
                raise ArtifactError(f"{target}: given up: workers {failed} could not write. {self._intact(step)}")
            missing = sorted(set(range(len(notes))) - set(told))
            if missing and (self._closed.is_set() or time.monotonic() > deadline):
                raise ArtifactError(
                    f"{target}: given up: the parts of workers {missing} did not come within "
                    f"{self.settings.deadline:g} s. {self._intact(step)}"
                )
            if missing:
                time.sleep(_POLL)
        for note in notes:
            note.unlink()
        return [told[rank] for rank in sorted(told)]

    def _check_space(self, folder: Path, needed: int) -> None:
        """A disk that is too small is better found before it is full."""
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"no space left: {free:,} bytes are free")

    def _intact(self, step: int) -> str:
        try:
            before = newest_complete(self.settings.directory, below=step)
        except (ResumeError, OSError):
            before = None
        return f"The checkpoint before, {before}, is whole" if before else "There is no whole one before it"


class Uploads:
    """Copies of complete checkpoints in the remote storage, made one after the other; of those waiting the newest."""

    def __init__(self, remote: RemoteFolder, config: CheckpointConfig) -> None:
        self.remote, self.config = remote, config
        self.failures = 0
        self.copied = ""  # name of the newest
        self._current: Path | None = None  # being copied
        self._waiting: Path | None = None
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Have a checkpoint copied."""
        with self._changed:
            self._waiting = checkpoint
            self._changed.notify_all()

    def skip_waiting(self) -> Path | None:
        """Forget what waits; returns what is being copied and must not be removed yet."""
        with self._changed:
            self._waiting = None
            return self._current

    def finish(self, deadline: float = 60.0) -> None:
        """Wait for what is being copied, for at most `deadline` seconds: it is whole here anyway."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None and self._current is None, deadline):
                logger.warning("%s: the upload did not end within %g s and is given up", self.remote.uri, deadline)
                self._waiting = None

    def close(self, finish: bool, deadline: float = 60.0) -> None:
        """End; what waits is still copied if `finish`."""
        if finish:
            self.finish(deadline)
        with self._changed:
            self._waiting = None
            self._ending = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._ending)
                if self._waiting is None:
                    return
                self._current, self._waiting = self._waiting, None
            try:
                self._copy(self._current)
            except Exception:  # the local checkpoint is whole, and the next one is tried again
                self.failures += 1
                logger.exception("%s was not copied to %s; training goes on", self._current, self.remote.uri)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _copy(self, checkpoint: Path) -> None:
        self.remote.upload(checkpoint)
        self.copied = checkpoint.name
        kept = {path.name for path in checkpoints_in(checkpoint.parent)} | {checkpoint.name}
        for name in self.remote.complete(PREFIX):  # whatever else is in that folder is not ours to remove
            if name not in kept:
                self.remote.remove(name)

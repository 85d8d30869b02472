"""Lock files on a store's file system: they go with the process that holds them, however it ends."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rxt_platform.errors import ArtifactError, BusyError

_STORE = "store.lock"


@contextmanager
def only_holder(path: Path) -> Iterator[None]:
    """Hold a lock alone. Raises BusyError that names the holder, ArtifactError where nothing can be written."""
    with _held(path, fcntl.LOCK_EX, f"{path.with_suffix('')}: in use by"):
        yield


def using(storage: Path) -> AbstractContextManager[None]:
    """While a run reads or makes artifacts: others may too, nobody deletes. Raises BusyError while somebody does."""
    return _held(storage / "work" / _STORE, fcntl.LOCK_SH, f"{storage}: unused artifacts are being deleted by")


def deleting(storage: Path) -> AbstractContextManager[None]:
    """While artifacts are deleted. Raises BusyError while a run is under way."""
    return _held(storage / "work" / _STORE, fcntl.LOCK_EX, f"{storage}: runs are under way, such as that of")


@contextmanager
def _held(path: Path, how: int, refusal: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
    except OSError as error:
        raise _unwritable(path, error) from None
    with lock:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise BusyError(f"{refusal} {lock.read().strip() or 'another driver'}; wait for it or stop it") from None
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}")
            lock.flush()
        except OSError as error:
            raise _unwritable(path, error) from None
        yield


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path}: cannot be written: {error}: set 'storage' to a folder with room that can be written")

"""Data sets of the Hugging Face Hub, or of a folder laid out like one, read through `datasets`."""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rxt_platform.config.data import HubSource
from rxt_platform.data.raw import RawRow
from rxt_platform.errors import DataError
from rxt_platform.storage.directory import file_hash

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(source: HubSource) -> bool:
    """Whether the data set is a local folder."""
    return Path(source.path).is_dir()


def place_of(source: HubSource, split: str) -> str:
    """How messages name a part of a data set."""
    name = Path(source.path).name if is_folder(source) else source.path
    return f"hf:{name}{f':{source.config}' if source.config else ''}[{split}]"


def commit_of(source: HubSource) -> str:
    """What identifies the data set's content: its commit, or a hash of a local folder's files. Raises DataError."""
    if is_folder(source):
        digest = hashlib.sha256()
        for path in sorted(Path(source.path).rglob("*")):
            inside = path.relative_to(source.path)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts[:-1]):  # .git, .cache
                digest.update(f"{inside.as_posix()}\0{file_hash(path)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()
    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    try:
        return _commit(source.path, source.revision)
    except Exception as error:  # the library and its HTTP client raise many types: no such set, gated, no network
        raise _unreachable(source, error) from error


@cache
def _commit(path: str, revision: str | None) -> str:
    """The commit that a branch is at: asked once, so that rows are read from the commit that identifies them."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(path, revision=revision, timeout=20).sha)


def read(source: HubSource, split: str) -> Iterator[RawRow]:
    """Raw rows of a split, streamed or from a memory-mapped download. Raises DataError with the library's reason."""
    import datasets

    datasets.disable_progress_bars()
    revision = None if is_folder(source) else commit_of(source)
    number = 0
    try:
        rows: Any = datasets.load_dataset(
            source.path, name=source.config, split=split, revision=revision, streaming=source.streaming
        )
        for number, value in enumerate(rows, start=1):
            yield RawRow(number, value)
    except Exception as error:  # as above; also a torn file in the middle
        if number:
            raise DataError(f"{place_of(source, split)}: after row {number}: {_reason(error)}") from error
        raise _unreachable(source, error) from error
    if not number:
        raise DataError(f"{place_of(source, split)}: empty: no rows")


def _unreachable(source: HubSource, error: Exception) -> DataError:
    return DataError(
        f"hf:{source.path}: cannot be read: {_reason(error)}; check the name, `config`, `split` and "
        "`validation_split` (null if it has none), log in with `hf auth login` if it is gated, or download it and use "
        "its files"
    )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:500] or type(error).__name__

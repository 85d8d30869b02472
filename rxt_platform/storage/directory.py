"""Directories committed atomically with a manifest: model artifacts, data sets and checkpoints are all kept this way.

A directory is written under a temporary name beside its target, every file is hashed and flushed, `manifest.json` is
written last, and one rename makes it visible. Reading verifies sizes and hashes. Links and special files are refused,
so that nothing outside the directory can be read or written through it.
"""

import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rxt_platform.errors import ArtifactError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class Manifest(BaseModel):
    """What a committed directory holds and where it comes from (DESIGN 6)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    schema_version: int
    content_sha256: str = Field(description="over the names and hashes of all files")
    files: dict[str, FileEntry]
    config: dict[str, Any]
    parents: dict[str, str] = Field(description="name -> fingerprint or hash of what this was made from")
    metrics: dict[str, float]
    producer: dict[str, str]
    created: float = Field(description="seconds since the epoch")


@dataclass(frozen=True)
class Provenance:
    """What the manifest says beside the files."""

    config: Mapping[str, Any]
    parents: Mapping[str, str]
    metrics: Mapping[str, float]


NO_PROVENANCE = Provenance({}, {}, {})


@contextmanager
def commit_directory(target: Path, kind: str, provenance: Provenance = NO_PROVENANCE) -> Iterator[Path]:
    """Fill the yielded temporary directory; on leaving without error it becomes `target`, on error it is removed."""
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        seal_directory(temporary, target, kind, provenance)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def commit_copy(target: Path, kind: str) -> Iterator[Path]:
    """Fill the yielded temporary directory with a copy of a committed one; it becomes `target` if it verifies."""
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        verify_directory(temporary, kind)
        _make_visible(temporary, target)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal_directory(
    source: Path,
    target: Path,
    kind: str,
    provenance: Provenance = NO_PROVENANCE,
    hashed: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Hash and flush the files of `source`, write its manifest and rename it to `target`, replacing what is there.

    `hashed` are files that whoever wrote them has flushed and hashed already. Raises ArtifactError if one is not there.
    """
    known = hashed or {}
    files = {name: known.get(name) or flush_and_hash(source / name) for name in _file_names(source)}
    if missing := sorted(set(known) - set(files)):
        raise ArtifactError(f"{target}: not committed: {', '.join(missing)} were written but are not in {source}")
    manifest = Manifest(
        kind=kind,
        schema_version=SCHEMA_VERSION,
        content_sha256=content_hash({name: entry.sha256 for name, entry in files.items()}),
        files=files,
        config=dict(provenance.config),
        parents=dict(provenance.parents),
        metrics=dict(provenance.metrics),
        producer={"package": "rxt_platform", "python": platform.python_version()},
        created=time.time(),
    )
    path = source / MANIFEST
    path.write_text(manifest.model_dump_json(indent=2))
    _fsync(path)
    _make_visible(source, target)
    return manifest


def _make_visible(source: Path, target: Path) -> None:
    """One rename, after what it shows is on the disk."""
    _fsync(source)
    stale = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.stale"
    if target.exists():
        target.rename(stale)
    source.rename(target)
    _fsync(target.parent)
    shutil.rmtree(stale, ignore_errors=True)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed directory; its files are not read. Raises ArtifactError."""
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no {MANIFEST}: not a complete artifact") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: unreadable: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path}: schema_version: expected a number, got {version!r}")
    if version > SCHEMA_VERSION:
        raise ArtifactError(f"{path}: schema version {version} is newer than {SCHEMA_VERSION}: upgrade rxt_platform")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def verify_directory(directory: Path, kind: str | None = None) -> Manifest:
    """The manifest after every file was checked against it. Raises ArtifactError that names the file and the hashes."""
    manifest = read_manifest(directory)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{directory}: is a {manifest.kind}, not a {kind}")
    present = set(_file_names(directory)) - {MANIFEST}
    if present != set(manifest.files):
        missing, extra = sorted(set(manifest.files) - present), sorted(present - set(manifest.files))
        raise ArtifactError(f"{directory}: files missing: {missing}, not in the manifest: {extra}")
    for name, entry in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            actual = file_hash(path) if size == entry.size else ""
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error}") from error
        if size != entry.size:
            raise ArtifactError(f"{path}: {size} bytes, the manifest says {entry.size}")
        if actual != entry.sha256:
            raise ArtifactError(
                f"{path}: sha256 {actual}, the manifest says {entry.sha256}: "
                "the file was altered; delete the directory to make it again"
            )
    whole = content_hash({name: entry.sha256 for name, entry in manifest.files.items()})
    if whole != manifest.content_sha256:
        raise ArtifactError(
            f"{directory}: content_sha256 {whole}, the manifest says {manifest.content_sha256}: it was altered"
        )
    return manifest


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Field-level differences of two JSON values, as `path: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        pairs = [(f"{path}.{key}" if path else str(key), old.get(key), new.get(key)) for key in keys]
        return [change for at, a, b in pairs for change in differences(a, b, at)]
    return [] if old == new else [f"{path}: {old} → {new}"]


def _file_names(directory: Path) -> list[str]:
    names = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{path}: links and special files are not allowed in an artifact")
        if path.is_file():
            names.append(path.relative_to(directory).as_posix())
    return names


def flush_and_hash(path: Path) -> FileEntry:
    """Wait until a file is on the disk; its size and hash."""
    _fsync(path)
    return FileEntry(size=path.stat().st_size, sha256=file_hash(path))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

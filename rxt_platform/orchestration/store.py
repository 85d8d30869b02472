"""What a run's storage holds: the artifacts, which runs use them, where they come from, and what nobody uses."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_platform.errors import ArtifactError
from rxt_platform.storage.directory import Manifest, read_manifest
from rxt_platform.storage.locks import deleting

PLAN = "plan.json"
"""In a run's folder: the artifacts of its last invocation, finished or not."""
_REPORT = "report.json"


@dataclass(frozen=True)
class Stored:
    """One artifact.

    manifest  None where it can't be read; `problem` says why
    size      bytes of its files
    runs      names of the runs whose plan it is in
    kept      it is in a run's plan, or something that is was made from it
    """

    path: Path
    manifest: Manifest | None
    problem: str
    size: int
    runs: tuple[str, ...] = ()
    kept: bool = False


@dataclass(frozen=True)
class Unused:
    """Something that may be deleted: an artifact, a resume state, or what a killed process left."""

    path: Path
    size: int
    why: str


@dataclass(frozen=True)
class Ancestor:
    """An input of an artifact, by the name that it has there; `depth` 0 is the artifact itself."""

    depth: int
    name: str
    identity: str
    stored: Stored | None


def record_plan(folder: Path, artifacts: Sequence[Path]) -> None:
    """Note in a run's folder which artifacts it uses, before it makes them. Raises ArtifactError."""
    temporary = folder / f".{PLAN}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(exist_ok=True)
        temporary.write_text(json.dumps({"artifacts": [path.name for path in artifacts]}, indent=2))
        temporary.replace(folder / PLAN)
    except OSError as error:
        raise ArtifactError(f"{folder / PLAN}: cannot be written: {error}") from error


def read_store(storage: Path) -> list[Stored]:
    """The artifacts of a storage, newest first. Raises ArtifactError where there are none to look for."""
    folder = storage / "artifacts"
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder: give a run's 'storage' (as its config says; by default runs)")
    found = [_read(path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    users = _users(storage)
    wanted = {name for names in users.values() for name in names}
    by_identity = _by_identity(found)
    reached, todo = set[Path](), [one for one in found if one.path.name in wanted]
    while todo:
        one = todo.pop()
        if one.path not in reached and one.manifest is not None:
            reached.add(one.path)
            todo += [by_identity[value] for value in one.manifest.parents.values() if value in by_identity]
    stored = [
        Stored(
            one.path,
            one.manifest,
            one.problem,
            one.size,
            tuple(run for run, names in users.items() if one.path.name in names),
            one.path.name in wanted or one.path in reached,
        )
        for one in found
    ]
    return sorted(stored, key=lambda one: one.manifest.created if one.manifest else 0.0, reverse=True)


def lineage(artifact: Path) -> list[Ancestor]:
    """An artifact and what it was made from, depth first. What was before has its inputs there, not again; what is not
    in its storage has no `stored`.

    Raises ArtifactError.
    """
    manifest = read_manifest(artifact)
    beside = artifact.resolve().parent
    by_identity = _by_identity(_read(path) for path in sorted(beside.iterdir()) if not path.name.startswith("."))
    identity = str(manifest.config.get("fingerprint", manifest.content_sha256))
    found: list[Ancestor] = []

    def visit(depth: int, name: str, identity: str) -> None:
        stored = by_identity.get(identity)
        first = identity not in {one.identity for one in found}
        found.append(Ancestor(depth, name, identity, stored))
        if first and stored is not None and stored.manifest is not None:
            for parent, value in stored.manifest.parents.items():
                visit(depth + 1, parent, value)

    by_identity.setdefault(identity, _read(artifact.resolve()))
    visit(0, artifact.resolve().name, identity)
    return found


def find_unused(storage: Path) -> list[Unused]:
    """What no run's last invocation uses: artifacts, resume states, and leftovers of killed processes."""
    stored = read_store(storage)
    names = {name for used in _users(storage).values() for name in used}
    finished = {one.path.name for one in stored if one.manifest is not None}
    found = [
        Unused(one.path, one.size, one.problem or "in no run's plan")
        for one in stored
        if not one.kept and one.path.is_dir() and not one.path.is_symlink()
    ]
    for path in sorted((storage / "artifacts").glob(".*")):
        if path.is_dir() and not path.is_symlink():
            found.append(Unused(path, _size(path), "left by a process that was killed"))
    for path in sorted((storage / "work").glob("*")):
        if path.is_dir() and not path.is_symlink() and (path.name not in names or path.name in finished):
            why = "resume state of a finished step" if path.name in finished else "resume state, in no run's plan"
            found.append(Unused(path, _size(path), why))
    return found


def delete_unused(storage: Path) -> Iterator[Unused]:
    """Delete what `find_unused` finds, one by one. Raises BusyError while a run is under way, ArtifactError."""
    with deleting(storage):
        for one in find_unused(storage):
            gone = one.path.with_name(f".{one.path.name.lstrip('.')}.{uuid.uuid4().hex[:8]}.stale")
            try:
                one.path.rename(gone)  # never half of an artifact under its name
                shutil.rmtree(gone)
            except OSError as error:
                raise ArtifactError(f"{one.path}: cannot be deleted: {error}") from error
            yield one


def _read(path: Path) -> Stored:
    if path.is_symlink() or not path.is_dir():
        return Stored(path, None, "a link or a file, not an artifact: never read", 0)
    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        return Stored(path, None, str(error), _size(path))
    return Stored(path, manifest, "", sum(entry.size for entry in manifest.files.values()))


def _by_identity(stored: Iterable[Stored]) -> dict[str, Stored]:
    """By what later steps name them by: a fingerprint, or the content's hash of a model that a run starts from."""
    found: dict[str, Stored] = {}
    for one in stored:
        if one.manifest is not None:
            found[one.manifest.content_sha256] = one
            if fingerprint := one.manifest.config.get("fingerprint"):
                found[str(fingerprint)] = one
    return found


def _users(storage: Path) -> dict[str, set[str]]:
    """Of each run that has a folder the names of the artifacts that its last plan and its report have."""
    users: dict[str, set[str]] = {}
    for path in [*storage.glob(f"*/{PLAN}"), *storage.glob(f"*/{_REPORT}")]:
        found = _artifacts_of(path)
        users[path.parent.name] = users.get(path.parent.name, set()) | found
    return dict(sorted(users.items()))


def _artifacts_of(path: Path) -> set[str]:
    """Raises ArtifactError: what can't be read may use anything, so that nothing may be called unused."""
    try:
        content: Any = json.loads(path.read_text())
        if path.name == PLAN:
            return {str(name) for name in content["artifacts"]}
        return {Path(step["artifact"]).name for step in content["steps"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: does not say which artifacts the run uses: {error!r}: delete it if the run is of no use"
        ) from error


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())

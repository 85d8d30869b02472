"""The critic's weights as numbered versions in a folder: the trainer publishes them there, who computes loads them.

A version is an encoder with a value head in Hugging Face layout, committed whole with a manifest. It never changes:
the same number always means the same weights, so that all who ask for it get the same values.
"""

import re
import shutil
import tempfile
import uuid
from pathlib import Path

from rxt_platform.errors import ArtifactError
from rxt_platform.model import files
from rxt_platform.model.encoder_model import RxTEncoder
from rxt_platform.storage.directory import (
    MANIFEST,
    Provenance,
    commit_directory,
    flush_and_hash,
    read_manifest,
    verify_directory,
)

KIND = "critic"
_NAME = re.compile(r"v(\d{6,})")


def publish(root: Path, version: int, model: RxTEncoder) -> Path:
    """Commit the weights as that version and return its directory; do nothing if they are there already.

    A resumed trainer publishes again what it had published. Raises ArtifactError if the version there has other
    weights or is damaged, and for an encoder without a value head.
    """
    target = _place(root, version)
    _check_head(model, target)
    if target.exists():
        _check_same(target, version, model)
        return target
    with commit_directory(target, KIND, Provenance({"version": version}, {}, {})) as directory:
        _write(model, directory)
    return target


def available(root: Path) -> list[int]:
    """The complete versions in the folder, ascending; none if there is no such folder."""
    if not root.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(int(name[1]) for name, path in named if name and (path / MANIFEST).is_file())


def load(root: Path, version: int) -> RxTEncoder:
    """A version, ready for use, after its files were checked. Raises ArtifactError that names what is wrong."""
    directory = _place(root, version)
    if not directory.is_dir():
        raise ArtifactError(f"{root}: no version {version} of the critic; there are {available(root) or 'none'}")
    _verify(directory, version)
    model = RxTEncoder.from_directory(directory, None).eval()
    _check_head(model, directory)
    return model


def prune(root: Path, keep: int) -> list[int]:
    """Delete all but the newest `keep` versions; returns those that went."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest version stays")
    gone = available(root)[:-keep]
    for version in gone:
        directory = _place(root, version)
        doomed = root / f".{directory.name}.{uuid.uuid4().hex[:8]}.pruned"
        directory.rename(doomed)  # at once, so that nobody loads half of it
        shutil.rmtree(doomed)
    return gone


def _place(root: Path, version: int) -> Path:
    if version < 0:
        raise ValueError(f"version {version}: versions count from 0")
    return root / f"v{version:06d}"


def _write(model: RxTEncoder, directory: Path) -> None:
    files.write_config(directory, model.settings(), type(model).__name__)
    files.write_weights(directory, model.weights())
    model.own_tokenizer().save(directory / files.TOKENIZER)


def _verify(directory: Path, version: int) -> None:
    manifest = verify_directory(directory, KIND)
    if manifest.config.get("version") != version:
        raise ArtifactError(f"{directory}: holds version {manifest.config.get('version')}: it was renamed or copied")


def _check_same(target: Path, version: int, model: RxTEncoder) -> None:
    _verify(target, version)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".comparing-") as name:
        _write(model, Path(name))
        mine = {path.name: flush_and_hash(path) for path in Path(name).iterdir()}
    theirs = read_manifest(target).files
    if differing := sorted(file for file in mine if mine[file] != theirs.get(file)):
        raise ArtifactError(
            f"{target}: version {version} is there already with another {', '.join(differing)}: a version never "
            "changes; publish under a new number, or start in an empty folder"
        )


def _check_head(model: RxTEncoder, directory: Path) -> None:
    if model.head_config.kind != "value":
        raise ArtifactError(f"{directory}: a {model.head_config.kind} head gives no values: a critic has a value head")

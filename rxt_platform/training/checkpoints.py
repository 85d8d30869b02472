"""Resume states of a stage on disk: complete with a manifest or absent, for any number of workers (DESIGN 8).

`step-00000200/` holds the ranks' stretches of the trained parameters and of Adam's moments (`rank-*.safetensors`), the
model's buffers and `state.json`. Nothing is pickled, and what a rank needs of which file follows from the names of the
tensors, so that another number of workers or another ZeRO stage reads the same files. The newest complete one wins; a
bad one is named and skipped; bad ones only is an error, never a silent fresh start.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rxt_platform.config.training import BestConfig
from rxt_platform.errors import ArtifactError, ResumeError
from rxt_platform.storage.directory import differences, verify_directory
from rxt_platform.storage.remote import RemoteFolder
from rxt_platform.training.distributed import on_rank_zero
from rxt_platform.training.guards import Plateau
from rxt_platform.training.sharding import KINDS, WEIGHT, ShardedState

logger = logging.getLogger(__name__)

KIND = "resume_state"
STATE, BUFFERS = "state.json", "buffers.safetensors"
PREFIX = "step-"  # of the name of a checkpoint's folder
_CLOSE = 1e-9  # relative to what sums of so many numbers may differ by in double precision


@dataclass(frozen=True)
class Total:
    """What all elements of a kind add up to, in double precision: tells whether a state was carried over whole."""

    count: int
    total: float
    square: float

    @property
    def norm(self) -> float:
        """Square root of the sum of squares."""
        return math.sqrt(self.square)

    def agrees(self, other: "Total") -> bool:
        """The same elements, added up in another order."""
        slack = _CLOSE * max(self.norm, other.norm) * math.sqrt(max(self.count, 1))
        close = abs(self.total - other.total) <= slack and math.isclose(self.norm, other.norm, rel_tol=_CLOSE)
        return self.count == other.count and close


@dataclass(frozen=True)
class Skipped:
    """A step that updated nothing, with the rows of its batch."""

    step: int
    reason: str
    rows: list[str]


@dataclass(frozen=True)
class ResumeState:
    """What a checkpoint says beside the tensors."""

    step: int  # steps done
    seconds: float  # spent training so far
    identity: str  # of the stage's inputs and settings
    spec: dict[str, Any]  # what the identity is made of
    world_size: int
    zero_stage: int
    before: Mapping[str, float]  # held-out metrics before the first step
    metrics: Mapping[str, float]  # the newest ones
    updates: Mapping[str, int]  # Adam's step count of each component
    skipped: list[Skipped] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)  # losses that a spike is measured against
    totals: dict[str, Total] = field(default_factory=dict)  # of each kind of tensor
    plateau: Plateau = field(default_factory=Plateau)  # of the metric that may end the stage
    tokens: int = 0  # real ones of all updates so far

    @classmethod
    def read(cls, directory: Path) -> "ResumeState":
        """From a checkpoint's folder. Raises ArtifactError."""
        path = directory / STATE
        try:
            raw = json.loads(path.read_text())
            known = {one.name for one in fields(cls)}
            if not isinstance(raw, dict) or set(raw) != known:
                raise ValueError(f"expected the keys {', '.join(sorted(known))}")
            state: ResumeState = TypeAdapter(cls).validate_python(raw)
            if set(state.totals) != set(KINDS):
                raise ValueError(f"totals: expected those of {', '.join(KINDS)}")
            return state
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path}: not a resume state: {place}: {first['msg']}") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: not a resume state: {error}") from error

    def write(self, directory: Path) -> None:
        """As `state.json`."""
        (directory / STATE).write_text(json.dumps(asdict(self), indent=1))


def folder_name(step: int) -> str:
    """Of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def checkpoints_in(directory: Path) -> list[Path]:
    """Oldest first, whether whole or not."""
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.is_dir()) if directory.is_dir() else []


def find(directory: Path, remote: RemoteFolder | None) -> Path | None:
    """The newest checkpoint that verifies, fetched if it is only in the remote storage; what was killed is removed.

    Bad ones are named in the log. None when none was ever written. Raises ResumeError when some were and none is whole,
    ArtifactError when the remote storage can't be listed: what is there may be newer.
    """
    remove(directory.glob(f".{PREFIX}*"))
    local, bad = _newest_complete(directory)
    for name in reversed(remote.complete(PREFIX) if remote is not None else []):
        assert remote is not None
        if local is not None and name <= local.name:
            break
        try:
            logger.info("fetching %s from %s", name, remote.uri)
            remote.download(name, directory / name, KIND)
            return directory / name
        except ArtifactError as error:
            logger.warning("skipping a checkpoint that can't be fetched: %s", error)
            bad.append(str(error))
    return _or_refuse(directory, local, bad)


def newest_complete(directory: Path, below: int | None = None) -> Path | None:
    """The newest checkpoint that verifies (of fewer than `below` steps); bad ones are named in the log.

    Raises ResumeError when some were written and none is whole.
    """
    return _or_refuse(directory, *_newest_complete(directory, below))


def _or_refuse(directory: Path, found: Path | None, bad: list[str]) -> Path | None:
    if found is None and bad:
        raise ResumeError(f"no usable checkpoint: {'; '.join(bad)}. Delete {directory} to start this stage again")
    return found


def _newest_complete(directory: Path, below: int | None = None) -> tuple[Path | None, list[str]]:
    """And what is wrong with newer ones."""
    bad: list[str] = []
    for path in reversed(checkpoints_in(directory)):
        try:
            verify_directory(path, KIND)
            if below is not None and ResumeState.read(path).step >= below:
                continue
        except ArtifactError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            bad.append(str(error))
            continue
        return path, bad
    return None, bad


def outdated(newest: Path, keep: int, best: BestConfig | None) -> list[Path]:
    """Checkpoints up to `newest` that need not be kept: all but the last `keep` and, if asked for, the best.

    Those of later steps are damaged, else the run would have gone on from there: none takes the place of a whole one.
    """
    usable = [path for path in checkpoints_in(newest.parent) if path.name <= newest.name]
    kept = set(usable[-keep:])
    if best is not None:
        scores: dict[Path, float] = {}
        for path in usable:
            try:
                scores[path] = _score(path, best)
            except ArtifactError as error:
                logger.warning("%s; it is not taken for the best", error)
        measured = [path for path, score in scores.items() if math.isfinite(score)]
        if measured:
            sign = -1 if best.highest else 1
            kept.add(min(measured, key=lambda path: sign * scores[path]))
    return [path for path in usable if path not in kept]


def _score(path: Path, best: BestConfig) -> float:
    """What a checkpoint's metric is, NaN where it was not measured yet. Raises ArtifactError where it never will be."""
    metrics = ResumeState.read(path).metrics
    held_out = best.metric.startswith("validation_")
    alike = sorted(name for name in metrics if name.startswith("validation_") == held_out)
    if alike and best.metric not in metrics:
        raise ArtifactError(
            f"{path}: training.checkpoints.best.metric {best.metric!r} is not among the metrics: {', '.join(alike)}"
        )
    return metrics.get(best.metric, math.nan)


def best_weights(
    directory: Path, best: BestConfig, like: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]] | None:
    """Metrics and weights of the best whole checkpoint; `like` gives what is not in one, and the shapes.

    None when the metric was never measured before a checkpoint.
    """
    scores = []
    for path in checkpoints_in(directory):
        try:
            verify_directory(path, KIND)
            score = _score(path, best)
        except ArtifactError as error:
            logger.warning("%s; it is not taken for the best", error)
            continue
        if math.isfinite(score):
            scores.append((-score if best.highest else score, path))
    if not scores:
        return None
    path = min(scores)[1]
    pieces, weights = Pieces(path), dict(like)
    for name, size in pieces.sizes(WEIGHT).items():
        flat = torch.empty(size)
        pieces.read(WEIGHT, name, 0, size, flat)
        weights[name] = flat.view_as(like[name])
    state = ResumeState.read(path)
    return {**state.metrics, "step": float(state.step)}, {**weights, **load_file(path / BUFFERS)}


def remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints: the manifest first, so that a half-deleted one is not taken for a whole one."""
    for path in paths:
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


class Pieces:
    """The tensors of a checkpoint's ranks, read by parameter and range of elements.

    Raises ResumeError for a file that is none of ours, whatever its name says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._where: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = {}
        for path in sorted(directory.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, "pt")
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    kind, start, name = key.split("/", 2)
                    (length,) = file.get_slice(key).get_shape()
                    self._where.setdefault((kind, name), []).append((int(start), int(start) + length, key, file))
            except (SafetensorError, OSError, ValueError) as error:
                raise ResumeError(f"{path}: not a file of a checkpoint: {error}") from error

    def sizes(self, kind: str) -> dict[str, int]:
        """Elements of each parameter that has tensors of a kind."""
        return {name: max(piece[1] for piece in where) for (one, name), where in self._where.items() if one == kind}

    def read(self, kind: str, name: str, start: int, stop: int, into: Tensor) -> None:
        """Fill `into` [stop - start] with elements of a parameter. Raises ResumeError when some are missing."""
        filled = start
        for first, last, key, file in sorted(self._where.get((kind, name), []), key=lambda piece: piece[:2]):
            low, high = max(start, first), min(stop, last)
            if low < high and low == filled:
                into[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])
                filled = high
        if filled != stop:
            raise ResumeError(
                f"{self.directory}: {kind} of {name}: of elements {start} to {stop} those from {filled} on are missing"
            )


@torch.no_grad()
def load(path: Path, sharded: ShardedState, model: nn.Module, identity: str, spec: Mapping[str, Any]) -> ResumeState:
    """Put a verified checkpoint into the engine, whatever number of workers and ZeRO stage wrote it.

    Raises ResumeError when it was made by another run, or when weights or moments don't add up to what was saved.
    """
    state = on_rank_zero(lambda: _fitting(path, sharded, identity, spec))
    pieces = Pieces(path)
    try:
        for kind in KINDS:
            for stretch in sharded.held:
                stop = stretch.start + stretch.length
                pieces.read(kind, stretch.name, stretch.start, stop, sharded.state(stretch, kind))
        for name, parameter in sharded.parameters.items():
            whole = None
            if sharded.zero_stage < 3:
                whole = torch.empty(parameter.numel(), dtype=torch.float32)
                pieces.read(WEIGHT, name, 0, parameter.numel(), whole)
            sharded.show_weights(name, whole)
        saved = load_file(path / BUFFERS)
    except (SafetensorError, OSError) as error:
        raise ResumeError(f"{path}: cannot be read: {error}") from error
    for name, buffer in model.named_buffers():
        if name not in saved or saved[name].shape != buffer.shape:
            raise ResumeError(f"{path / BUFFERS}: of another model: {name}")
        buffer.copy_(saved[name])
    sharded.set_updates(dict(state.updates))
    _check_totals(path, state, sharded)
    return state


def _fitting(path: Path, sharded: ShardedState, identity: str, spec: Mapping[str, Any]) -> ResumeState:
    """What the checkpoint says, if it was made by this run and of this model. Raises ResumeError."""
    state = ResumeState.read(path)
    if state.identity != identity:
        changes = "; ".join(differences(state.spec, dict(spec))) or "the code or the inputs"
        raise ResumeError(
            f"{path}: made by another run ({changes}): go back to those settings, "
            f"or delete {path.parent} to start this stage again"
        )
    pieces, here = Pieces(path), sharded.sizes()
    for kind in KINDS:
        if others := differences(pieces.sizes(kind), here):
            raise ResumeError(f"{path}: of another model: elements of {kind} of {'; '.join(others[:3])}")
    return state


def owned_totals(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Total]:
    """Sums of each kind over (kind, tensor) pairs."""
    sums: dict[str, tuple[int, float, float]] = dict.fromkeys(KINDS, (0, 0.0, 0.0))
    for kind, tensor in tensors:
        count, total, square = sums[kind]
        for part in tensor.split(2**22):
            exact = part.double()
            total, square = total + float(exact.sum()), square + float(exact.dot(exact))
        sums[kind] = (count + tensor.numel(), total, square)
    return {kind: Total(*values) for kind, values in sums.items()}


def added(parts: Iterable[Mapping[str, Total]]) -> dict[str, Total]:
    """The totals of all ranks together."""
    parts = list(parts)
    return {
        kind: Total(
            sum(part[kind].count for part in parts),
            math.fsum(part[kind].total for part in parts),
            math.fsum(part[kind].square for part in parts),
        )
        for kind in KINDS
    }


def _check_totals(path: Path, state: ResumeState, sharded: ShardedState) -> None:
    """What was loaded must add up to what was saved. All ranks raise alike."""
    owned = sharded.owned
    mine = owned_totals((kind, sharded.state(stretch, kind)) for kind in KINDS for stretch in owned)
    everyone: list[Any] = [None] * sharded.world
    dist.all_gather_object(everyone, mine)
    here = added(everyone)

    def compare() -> None:
        for kind, total in here.items():
            saved = state.totals[kind]
            if not total.agrees(saved):
                raise ResumeError(
                    f"{path}: {kind} does not add up after loading: {total.count} elements of sum {total.total!r} and "
                    f"norm {total.norm!r}; saved were {saved.count} of {saved.total!r} and {saved.norm!r}"
                )
        sums = ", ".join(f"{kind} sum {total.total:.9g} norm {total.norm:.9g}" for kind, total in here.items())
        logger.info(
            "%s: written by %d workers under ZeRO-%d, loaded by %d under ZeRO-%d; as saved: %s",
            *(path, state.world_size, state.zero_stage, sharded.world, sharded.zero_stage, sums),
        )

    on_rank_zero(compare)

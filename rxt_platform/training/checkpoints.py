"""Resume states of a stage: DeepSpeed's shards and our own state, complete with a manifest or absent (DESIGN 8).

`step-00000200/` holds `deepspeed/` and `state.json`. All ranks write into one temporary directory, rank 0 seals it. The
newest complete one wins; a bad one is named and skipped; bad ones only is an error, never a silent fresh start.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rxt_platform.errors import ArtifactError, ResumeError
from rxt_platform.storage.directory import seal_directory, verify_directory
from rxt_platform.training.distributed import on_rank_zero

logger = logging.getLogger(__name__)

KIND = "resume_state"


@dataclass(frozen=True)
class ResumeState:
    """What a checkpoint says beside DeepSpeed's shards."""

    step: int  # steps done
    seconds: float  # spent training so far
    identity: str  # of the stage's inputs and settings
    world_size: int
    zero_stage: int
    before: Mapping[str, float]  # held-out metrics before the first step


def save(engine: Any, directory: Path, state: ResumeState, keep: int) -> None:
    """Write a checkpoint from all ranks; keeps the newest `keep`."""
    target = directory / f"step-{state.step:08d}"
    temporary = directory / f".{target.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary / "deepspeed"), tag="state", save_latest=False)
    dist.barrier()

    def seal() -> None:
        try:
            (temporary / "state.json").write_text(json.dumps(vars(state)))
            seal_directory(temporary, target, KIND)
            for old in _checkpoints(directory)[:-keep]:
                shutil.rmtree(old)
        except OSError as error:
            raise ArtifactError(f"{target}: cannot be written: {error}") from error

    on_rank_zero(seal)


def load(engine: Any, directory: Path, identity: str, zero_stage: int) -> ResumeState | None:
    """Load the newest complete checkpoint into the engine; None when none was ever written.

    Raises ResumeError when there are only damaged ones, or when it was made by another run or worker count.
    """
    found = on_rank_zero(lambda: _find(directory))
    if found is None:
        return None
    state = ResumeState(**json.loads((found / "state.json").read_text()))
    _check_same_run(found, state, identity, zero_stage)
    loaded, _ = engine.load_checkpoint(str(found / "deepspeed"), tag="state")
    if loaded is None:
        raise ResumeError(f"{found}: DeepSpeed found nothing to load in it")
    return state


def _find(directory: Path) -> Path | None:
    """The newest checkpoint that verifies; raises ResumeError when some were written and none does."""
    bad = []
    for path in reversed(_checkpoints(directory)):
        try:
            verify_directory(path, KIND)
        except ArtifactError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            bad.append(str(error))
            continue
        return path
    if bad:
        raise ResumeError(f"no usable checkpoint: {'; '.join(bad)}. Delete {directory} to start this stage again")
    return None


def _check_same_run(path: Path, state: ResumeState, identity: str, zero_stage: int) -> None:
    here = {"identity": identity, "world_size": dist.get_world_size(), "zero_stage": zero_stage}
    for name, value in here.items():
        saved = getattr(state, name)
        if saved != value:
            raise ResumeError(
                f"{path}: saved with {name} {saved}, this job has {value}: "
                f"go on with the same {name}, or delete {path.parent} to start this stage again"
            )


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*")) if directory.is_dir() else []

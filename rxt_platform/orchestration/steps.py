"""What the steps of a plan share: their artifact's folder, and a training step as a job."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rxt_platform.config.model import ModelConfig
from rxt_platform.config.run import RunConfig
from rxt_platform.errors import ConfigError
from rxt_platform.orchestration.plan import ARTIFACT_KIND, Step
from rxt_platform.storage.directory import Provenance, commit_directory
from rxt_platform.training.job import StageJob


def stage_job(config: RunConfig, plan: list[Step], step: Step) -> StageJob:
    """A training step as a job for workers."""
    if step.stage is None:
        raise ConfigError(f"{step.name} is not a training step")
    return StageJob(
        name=step.spec["name"],
        stage=step.stage,
        model=ModelConfig.model_validate(step.spec["model"]),
        stateless=step.stateless,
        window=config.model.max_length,
        training=config.training,
        seed=config.seed,
        identity=step.fingerprint,
        corpus=plan[0].artifact,
        too_long=config.data.validation.too_long,
        tokens=plan[2].artifact,
        weights=step.spec["weights"],
        tokenizer=plan[1].artifact,
        start=step.start,
        output=step.artifact,
        work=step.work,
        cpus=config.resources.cpus_per_worker,
        use_gpu=config.resources.use_gpu,
        provenance=step.provenance,
        parents=step.inputs,
    )


def commit_step(step: Step, metrics: dict[str, Any]) -> AbstractContextManager[Path]:
    """The folder that becomes a step's artifact; `metrics` are read when it is committed."""
    return commit_directory(step.artifact, ARTIFACT_KIND[step.kind], Provenance(step.provenance, step.inputs, metrics))


def remove_leftovers(step: Step) -> None:
    """Delete what a killed attempt at a step left beside its artifact. Only for who holds the step's lock."""
    for leftover in step.artifact.parent.glob(f".{step.artifact.name}.*"):
        shutil.rmtree(leftover)

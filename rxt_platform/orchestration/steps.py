"""What a step does in this process: corpus and tokenizer are made here; a training step becomes a job."""

import time
from contextlib import AbstractContextManager
from pathlib import Path

from rxt_platform.config.run import RunConfig
from rxt_platform.data.corpus import build_corpus, corpus_texts
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ConfigError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration.plan import ARTIFACT_KIND, Step
from rxt_platform.storage.directory import Provenance, commit_directory
from rxt_platform.training.job import StageJob


def prepare(config: RunConfig, plan: list[Step]) -> list[str]:
    """Make corpus and tokenizer where they are not finished; returns the names of the steps that were made.

    Raises DataError for bad rows: everything that input can get wrong is known before any job starts.
    """
    made = []
    corpus, tokenizer = plan[:2]
    if corpus.finished() is None:
        metrics: dict[str, float] = {}
        started = time.monotonic()
        with _commit(corpus, metrics) as folder:
            metrics |= build_corpus(config.data, folder)
            metrics["seconds"] = time.monotonic() - started
        made.append(corpus.name)
    if tokenizer.finished() is None:
        metrics = {}
        started = time.monotonic()
        with _commit(tokenizer, metrics) as folder:
            trained = RxtTokenizer.train(corpus_texts(corpus.artifact), config.model.vocab_size)
            trained.save(folder / TOKENIZER)
            metrics |= {"vocab_size": trained.vocab_size, "seconds": time.monotonic() - started}
        made.append(tokenizer.name)
    return made


def stage_job(config: RunConfig, plan: list[Step], step: Step) -> StageJob:
    """A training step as a job for workers."""
    if step.stage is None:
        raise ConfigError(f"{step.name} is not a training step")
    return StageJob(
        stage=step.stage,
        model=config.model,
        training=config.training,
        seed=config.seed,
        identity=step.fingerprint,
        corpus=plan[0].artifact,
        tokenizer=plan[1].artifact,
        start=step.start,
        output=step.artifact,
        work=step.work,
        cpus=config.resources.cpus_per_worker,
        use_gpu=config.resources.use_gpu,
        provenance=step.provenance,
        parents=step.inputs,
    )


def _commit(step: Step, metrics: dict[str, float]) -> AbstractContextManager[Path]:
    return commit_directory(step.artifact, ARTIFACT_KIND[step.kind], Provenance(step.provenance, step.inputs, metrics))

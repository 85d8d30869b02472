"""What a step does in this process: corpus and tokenizer are made here; a training step becomes a job."""

import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

from rxt_platform.config.run import RunConfig
from rxt_platform.data.corpus import ROW_KINDS, SPLITS, build_corpus, corpus_texts, load_examples
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ConfigError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration.plan import ARTIFACT_KIND, Step
from rxt_platform.stages.build import row_kind
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
            if tokenizer.start is not None:
                shutil.copyfile(tokenizer.start / TOKENIZER, folder / TOKENIZER)
            else:
                texts = corpus_texts(corpus.artifact)
                RxtTokenizer.train(texts, config.model.vocab_size).save(folder / TOKENIZER)
            metrics |= _check_rows(config, corpus.artifact, RxtTokenizer.load(folder / TOKENIZER))
            metrics["seconds"] = time.monotonic() - started
        made.append(tokenizer.name)
    return made


def _check_rows(config: RunConfig, corpus: Path, tokenizer: RxtTokenizer) -> dict[str, float]:
    """Token counts of all rows, and how many turns the model's window cuts.

    Raises DataError when a query fills the window, and ConfigError when a batch is larger than its rows.
    """
    window = config.model.max_length
    counts: dict[str, float] = {"vocab_size": tokenizer.vocab_size}
    for kind in ROW_KINDS:
        for split in SPLITS:
            examples = load_examples(corpus, kind, split, tokenizer, window)
            counts[f"{kind}_{split}_tokens"] = sum(len(turn) for example in examples for turn in example.turns)
            counts[f"{kind}_{split}_truncated"] = sum(example.truncated for example in examples)
            for name, stage in config.stages.items():
                if split == "train" and row_kind(stage) == kind and stage.global_batch_size > len(examples):
                    raise ConfigError(
                        f"stages.{name}.global_batch_size {stage.global_batch_size} is more than the "
                        f"{len(examples)} training rows of {kind}: lower it"
                    )
    return counts


def stage_job(config: RunConfig, plan: list[Step], step: Step) -> StageJob:
    """A training step as a job for workers."""
    if step.stage is None:
        raise ConfigError(f"{step.name} is not a training step")
    return StageJob(
        name=step.name,
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

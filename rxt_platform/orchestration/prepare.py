"""The steps before training: corpus, tokenizer and token shards. What input can get wrong is found here."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rxt_platform.config.run import RunConfig
from rxt_platform.data.corpus import build_corpus, training_texts
from rxt_platform.data.fertility import measure_fertility
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ConfigError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.plan import PREPARED, Step
from rxt_platform.orchestration.steps import commit_step, remove_leftovers
from rxt_platform.orchestration.tokens import check_stages, make_tokens, needs_workers
from rxt_platform.storage.directory import Manifest, read_manifest, verify_directory
from rxt_platform.storage.locks import only_holder

FERTILITY = "fertility.json"


@dataclass(frozen=True)
class Prepared:
    """A step whose artifact is there, and whole: made just now, or verified."""

    step: Step
    made: bool
    manifest: Manifest


def prepare(config: RunConfig, plan: list[Step], connect: Callable[[], object]) -> list[Prepared]:
    """Verify the plan's first steps or make them, in order, so that nothing is made from what was damaged.

    `connect` is called when Ray is needed: only for a corpus that is worth several tasks. Raises an RxtError for
    whatever input can get wrong, a stage's batch that is larger than its rows included.
    """
    corpus, tokenizer, tokens = plan[: len(PREPARED)]

    def tokens_on_workers() -> None:
        on_workers = None
        if needs_workers(corpus.artifact):
            connect()
            on_workers = ray_jobs.each
        make_tokens(config, tokens, corpus.artifact, tokenizer.artifact, on_workers)

    makers: list[tuple[Step, Callable[[], None]]] = [
        (corpus, lambda: make_corpus(config, corpus)),
        (tokenizer, lambda: make_tokenizer(config, tokenizer, corpus.artifact)),
        (tokens, tokens_on_workers),
    ]
    prepared = [_prepare_step(step, make) for step, make in makers]
    check_stages(config, tokens.artifact)
    return prepared


def _prepare_step(step: Step, make: Callable[[], None]) -> Prepared:
    if step.finished() is None:
        # Runs of other names share steps: only one makes it, and whoever comes later finds it finished or is told.
        with only_holder(step.work.with_name(step.work.name + ".lock")):
            if step.finished() is None:
                remove_leftovers(step)
                make()
                return Prepared(step, True, read_manifest(step.artifact))
    return Prepared(step, False, verify_directory(step.artifact))


def make_corpus(config: RunConfig, step: Step) -> None:
    """Read and validate every row. Raises DataError for bad ones."""
    metrics: dict[str, float] = {}
    started = time.monotonic()
    with commit_step(step, metrics) as folder:
        metrics |= build_corpus(config.data, folder)
        metrics["seconds"] = time.monotonic() - started


def make_tokenizer(config: RunConfig, step: Step, corpus: Path) -> None:
    """Train the tokenizer, or take over that of the model which the run starts from; measure it on held-out rows."""
    metrics: dict[str, float] = {}
    started = time.monotonic()
    with commit_step(step, metrics) as folder:
        if step.start is not None:
            shutil.copyfile(step.start / TOKENIZER, folder / TOKENIZER)
        else:
            settings = config.data.tokenizer
            texts = training_texts(corpus, settings.max_bytes)
            RxtTokenizer.train(texts, config.model.vocab_size, settings.min_frequency).save(folder / TOKENIZER)
        tokenizer = RxtTokenizer.load(folder / TOKENIZER)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}: "
                "some ids would have no embedding"
            )
        fertility = measure_fertility(tokenizer, corpus)
        (folder / FERTILITY).write_text(json.dumps(fertility, indent=2))
        metrics["vocab_size"] = tokenizer.vocab_size
        metrics |= {f"{section}_tokens_per_word": one["tokens_per_word"] for section, one in fertility.items()}
        metrics["seconds"] = time.monotonic() - started

"""The steps before training: corpus, tokenizer and token shards. What input can get wrong is found here."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rxt_platform.config.run import RunConfig
from rxt_platform.data.corpus import build_corpus, training_texts
from rxt_platform.data.fertility import measure_fertility
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ConfigError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.plan import PREPARED, Step
from rxt_platform.orchestration.steps import commit_step, only_holder, remove_leftovers
from rxt_platform.orchestration.tokens import make_tokens, needs_workers
from rxt_platform.storage.directory import verify_directory

FERTILITY = "fertility.json"


def prepare(config: RunConfig, plan: list[Step], connect: Callable[[], object]) -> list[str]:
    """Make what is not finished of the plan's first steps; returns the names of those that were made.

    `connect` is called when Ray is needed: only for a corpus that is worth several tasks.
    """
    corpus, tokenizer, tokens = plan[: len(PREPARED)]

    def tokens_on_workers() -> None:
        on_workers = None
        if needs_workers(corpus.artifact):
            connect()
            on_workers = ray_jobs.each
        make_tokens(config, tokens, corpus.artifact, tokenizer.artifact, on_workers)

    makers: list[tuple[Step, list[Step], Callable[[], None]]] = [
        (corpus, [], lambda: make_corpus(config, corpus)),
        (tokenizer, [corpus], lambda: make_tokenizer(config, tokenizer, corpus.artifact)),
        (tokens, [corpus, tokenizer], tokens_on_workers),
    ]
    made = []
    for step, inputs, make in makers:
        if step.finished() is not None:
            continue
        # Runs of other names share steps: only one makes it, and whoever comes later finds it finished or is told.
        with only_holder(step.work.with_name(step.work.name + ".lock")):
            if step.finished() is None:
                remove_leftovers(step)
                for one in inputs:
                    verify_directory(one.artifact)  # nothing is made from what was damaged
                make()
                made.append(step.name)
    return made


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

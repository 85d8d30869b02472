"""How fast a large text corpus becomes token shards, in how much memory, and whether more workers change them.

    python benchmarks/data_shards.py --gigabytes 2 --folder /tmp/shards

Writes that much plain text (the story world's sentences, newly mixed), builds the corpus from it, trains a tokenizer,
and makes the shards with one and with two Ray workers of one CPU. Exits with 1 when the shards differ by a byte. Peak
memory is the resident set of the process that does the work.
"""

import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rxt_platform.config.data import DataConfig
from rxt_platform.data.corpus import build_corpus, training_texts
from rxt_platform.data.shards import ShardPlan, TokenShards, plan_shards, write_summary
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.tokens import make_one
from rxt_platform.storage.directory import file_hash

SEPARATOR = "<|endoftext|>"
WINDOW = 256
VOCABULARY = 7500


def write_text(path: Path, size: int) -> None:
    """At least `size` bytes of stories of three to thirty sentences."""
    rng = random.Random(0)
    sentences = [f"{part}." for story in StoryWorld(0).stories("train", 20_000) for part in story.split(". ")]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            stories = [" ".join(rng.choices(sentences, k=rng.randint(3, 30))) for _ in range(1000)]
            written += file.write("".join(f"{story}\n{SEPARATOR}\n" for story in stories))


def measured_shard(plan: ShardPlan, *shared: Any) -> dict[str, Any]:
    """A shard, with the peak memory of the worker that made it."""
    shard = make_one(plan, *shared)
    return {**shard, "peak": peak_memory()}


def peak_memory() -> float:
    """MiB that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def texts_of(plans: list[ShardPlan]) -> float:
    """MB of text in some shards."""
    return sum(plan.bytes for plan in plans) / 1e6


def arms(folder: Path, corpus: Path, plans: list[ShardPlan]) -> Iterator[tuple[int, float, float, dict[str, str]]]:
    """Workers, seconds, peak MiB of a worker and the shards' hashes, for one worker and for two."""
    import ray

    shared = (corpus, folder / "tokenizer.json", WINDOW, "truncate")
    for workers in (1, 2):
        target = folder / f"tokens-{workers}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        ray_jobs.each(_ready, list(range(workers)), ())  # so that starting workers is not timed
        started = time.monotonic()
        shards = ray_jobs.each(measured_shard, plans, (*shared, target))
        seconds = time.monotonic() - started
        ray.shutdown()
        write_summary(target, shards, WINDOW)
        yield (
            workers,
            seconds,
            max(shard["peak"] for shard in shards),
            {s["file"]: file_hash(target / s["file"]) for s in shards},
        )


def _ready(number: int) -> int:
    import rxt_platform.orchestration.tokens  # noqa: F401 - what a worker imports first

    time.sleep(1)
    return number


@click.command(help=__doc__)
@click.option("--gigabytes", default=2.0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
def main(gigabytes: float, folder: Path) -> None:
    """Run it."""
    folder.mkdir(parents=True, exist_ok=True)
    text, corpus = folder / "stories.txt", folder / "corpus"
    if not text.exists():
        write_text(text, int(gigabytes * 1e9))
    size = text.stat().st_size / 1e6
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir()
    world = {"kind": "story_world", "train_rows": 8, "validation_rows": 8}
    config = DataConfig(texts=str(text), conversations=world)  # type: ignore[arg-type]
    started = time.monotonic()
    counts = build_corpus(config, corpus)
    seconds = time.monotonic() - started
    print(
        f"corpus     {size:,.0f} MB of text in {seconds:.0f} s: {size / seconds:.1f} MB/s, peak {peak_memory():.0f} MiB"
    )
    print(f"           {counts}")
    started = time.monotonic()
    RxtTokenizer.train(training_texts(corpus, 64 * 2**20), VOCABULARY).save(folder / "tokenizer.json")
    print(f"tokenizer  {time.monotonic() - started:.0f} s from 64 MiB of it, peak so far {peak_memory():.0f} MiB")
    plans = plan_shards(corpus)
    hashes, times = [], []
    size = texts_of(plans)
    for workers, seconds, peak, made in arms(folder, corpus, plans):
        print(
            f"{workers} worker{'s' if workers > 1 else ' '}  {len(plans)} shards, {size:,.0f} MB in {seconds:.0f} s: "
            f"{size / seconds:.1f} MB/s, peak of a worker {peak:.0f} MiB",
            flush=True,
        )
        hashes.append(made)
        times.append(seconds)
    rows = TokenShards(folder / "tokens-1", "texts", "train")
    lengths, _ = rows.turn_lengths
    print(
        f"two workers are {times[0] / times[1]:.2f} times as fast as one; "
        f"{len(rows):,} examples, {lengths.sum():,} tokens"
    )
    print(f"the same bytes: {hashes[0] == hashes[1]} (sha256 over all: {_hash(hashes[0])})")
    sys.exit(0 if hashes[0] == hashes[1] else 1)


def _hash(hashes: dict[str, str]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()

"""The tokens step: shards made in this process, or by Ray tasks where the corpus is large (DESIGN 7).

Shards are the same either way. Ray tasks write into the step's folder on the storage that all nodes share; each runs on
one CPU with tokenizer threads off, so that nothing forks inside a worker.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rxt_platform.config.run import RunConfig
from rxt_platform.data.examples import RowEncoder, TooLong
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.shards import ShardPlan, TokenShards, make_shard, plan_shards, write_summary
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ConfigError, DataError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration.plan import Step
from rxt_platform.orchestration.steps import commit_step
from rxt_platform.stages.build import sampling

Shard = dict[str, Any]
_SHOWN = 5


def needs_workers(corpus: Path) -> bool:
    """Whether a corpus is large enough that Ray tasks make its shards sooner than this process alone."""
    return sum(plan.number > 0 for plan in plan_shards(corpus)) >= 2


def make_tokens(
    config: RunConfig, step: Step, corpus: Path, tokenizer: Path, on_workers: Callable[..., list[Shard]] | None = None
) -> None:
    """Make all shards, with `on_workers` (`ray_jobs.each`) as Ray tasks.

    Raises DataError for rows that don't fit the window, as `too_long` says.
    """
    metrics: dict[str, float] = {}
    started = time.monotonic()
    policy = config.data.validation
    with commit_step(step, metrics) as folder:
        shared = (corpus, tokenizer / TOKENIZER, config.model.max_length, policy.too_long, folder)
        plans = plan_shards(corpus)
        shards = (
            [make_one(plan, *shared) for plan in plans] if on_workers is None else on_workers(make_one, plans, shared)
        )
        judge_too_long(shards, policy.too_long, policy.max_bad_share)
        metrics |= write_summary(folder, shards, config.model.max_length)
        metrics["seconds"] = time.monotonic() - started


def make_one(plan: ShardPlan, corpus: Path, tokenizer: Path, max_length: int, too_long: TooLong, folder: Path) -> Shard:
    """One shard, wherever this runs."""
    return make_shard(plan, corpus, RowEncoder(RxtTokenizer.load(tokenizer), max_length, too_long), folder)


def judge_too_long(shards: Sequence[Shard], policy: TooLong, max_bad_share: float) -> None:
    """Raises DataError when rows don't fit the window and that is not allowed, or too many don't."""
    parts: dict[str, list[Shard]] = {}
    for shard in shards:
        parts.setdefault(f"{shard['section']}, {shard['split']}", []).append(shard)
    for name, part in parts.items():
        _judge_part(name, part, policy, max_bad_share)


def _judge_part(name: str, shards: Sequence[Shard], policy: TooLong, max_bad_share: float) -> None:
    bad = [entry for shard in shards for entry in shard["bad"]]
    if not bad:
        return
    rows = sum(shard["rows"] for shard in shards)
    listed = "; ".join(f"{one['file']}:{one['row']}: column '{one['column']}': {one['reason']}" for one in bad[:_SHOWN])
    listed += f" (and {len(bad) - _SHOWN} more)" if len(bad) > _SHOWN else ""
    if policy != "quarantine":
        raise DataError(f"{listed}: shorten them, use a longer window, or set data.validation.too_long=truncate")
    if len(bad) > max_bad_share * rows or len(bad) == rows:
        raise DataError(
            f"{name}: {len(bad)} of {rows} rows are too long, more than data.validation.max_bad_share "
            f"{max_bad_share:g}: {listed}"
        )


def check_batches(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError for a stage whose batch is larger than its rows, of tokens made now or by another run."""
    for name, stage in config.stages.items():
        weights = [source.weight for source in getattr(config.data, stage.section)]
        rows = TokenShards(folder, stage.section, "train")
        sampler = BatchSampler(rows, sampling(stage, config.seed, config.model.max_length, weights))
        if stage.global_batch_size > sampler.rows:
            kind = "packed rows" if sampler.sampling.capacity else "training rows"
            raise ConfigError(
                f"stages.{name}.global_batch_size {stage.global_batch_size} is more than the {sampler.rows} {kind} of "
                f"{stage.section}: lower it"
            )

"""The tokens step: shards made in this process, or by Ray tasks where the corpus is large (DESIGN 7).

Shards are the same either way. Ray tasks write into the step's folder on the storage that all nodes share; each runs on
one CPU with tokenizer threads off, so that nothing forks inside a worker.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rxt_platform.config.data import Section
from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.config.run import RunConfig, trains_without_memory
from rxt_platform.config.stage_base import Component
from rxt_platform.data.examples import RowEncoder, TooLong
from rxt_platform.data.shards import ShardPlan, TokenShards, make_shard, plan_shards, write_summary
from rxt_platform.data.sources import SPLITS
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ConfigError, DataError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration.plan import Step
from rxt_platform.orchestration.steps import commit_step
from rxt_platform.stages.build import build_stage, stage_rows

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


def check_stages(config: RunConfig, folder: Path) -> None:
    """What a run asks of its stages must be possible with its rows, of tokens made now or by another run.

    Raises ConfigError for a batch larger than its rows, a schedule of which a part never begins, a learning rate for
    what a stage never trains, and rows that are too long for the baseline.
    """
    for name, config_of_stage in config.stages.items():
        weights = [source.weight for source in getattr(config.data, config_of_stage.section)]
        held_out, rows = (
            stage_rows(TokenShards(folder, config_of_stage.section, split), config_of_stage)
            for split in ("validation", "train")
        )
        for what, part in (("training", rows), ("held-out", held_out)):
            if not len(part):
                raise ConfigError(f"stages.{name}: of its sources no {what} row is one that it can use")
        stage = build_stage(config_of_stage, rows, config.seed, config.model.max_length, weights)
        key, size = f"stages.{name}", stage.sampler.sampling.global_batch_size
        if size > stage.sampler.rows:
            times = " * minibatches" if isinstance(config_of_stage, EpisodeConfig) else ""
            kind = "packed rows" if stage.sampler.sampling.capacity else "training rows"
            raise ConfigError(
                f"{key}.global_batch_size{times} {size} is more than the {stage.sampler.rows} {kind} of "
                f"{config_of_stage.section}: lower it"
            )
        phases, steps = stage.phases(), stage.sampler.total_steps
        last = max(phases[-1].start, *stage.sampler.changes, 0)
        if last >= steps:
            raise ConfigError(
                f"{key}: its {config_of_stage.epochs:g} epochs are {steps} steps, and its last lesson or phase would "
                f"begin after step {last}: raise epochs, or shorten the curriculum and the unfreezing"
            )
        trained = frozenset[Component]().union(*(phase.trains for phase in phases))
        if unused := sorted(config_of_stage.optimizer.learning_rate_scale.keys() - trained):
            raise ConfigError(
                f"{key}.optimizer.learning_rate_scale.{unused[0]}: the stage never trains it; it trains "
                f"{', '.join(sorted(trained))}"
            )
        if config.baseline is not None and trains_without_memory(config_of_stage):
            _check_window(config.baseline.window, folder, config_of_stage.section)


def _check_window(window: int, folder: Path, section: Section) -> None:
    """The baseline reads whole conversations: none of its rows may be longer than its window."""
    for split in SPLITS:
        rows = TokenShards(folder, section, split)
        lengths, starts = rows.turn_lengths
        totals = np.add.reduceat(lengths, starts[:-1])
        longest = int(totals.argmax())
        if totals[longest] > window:
            raise ConfigError(
                f"baseline.window {window}: {rows.place(longest)} has {totals[longest]} tokens in all its turns; raise "
                "the window, or cut conversations with max_turns"
            )

"""`rxt data build`: a run's corpus, tokenizer and token shards without its training, and what came of them.

It takes the run's lock, so it never works beside a run of the same name, and what it makes is what the run then reuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.config.run import RunConfig
from rxt_platform.config.stages import MemoryAwareConfig, StageConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.shards import TokenShards
from rxt_platform.errors import ArtifactError
from rxt_platform.evaluation.report.data_tables import data_tables
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.plan import Step, build_plan, used_artifacts
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.runner import data_report
from rxt_platform.orchestration.store import record_plan
from rxt_platform.stages.build import sampling, stage_rows
from rxt_platform.stages.unroll import turn_groups
from rxt_platform.storage.locks import only_holder, using
from rxt_platform.tables import Table, text_table
from rxt_platform.training.engine import forward_rows

_STEPS = 50  # batches of each stage that are measured


def build_data(config: RunConfig) -> dict[str, Any]:
    """Make what is not finished; returns the run's data report, what its batches hold, and where the artifacts are.

    Raises an RxtError for rows that can't be used, BusyError while another driver holds the run.
    """
    plan = build_plan(config)
    storage = plan[0].storage
    connected: list[bool] = []
    try:
        plan[0].artifact.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{storage}: cannot be made: {error}: set 'storage' to a folder that can be written"
        ) from None
    with only_holder(storage / "work" / f"run.{config.name}.lock"), using(storage):
        record_plan(storage / config.name, used_artifacts(plan))
        try:
            prepared = prepare(config, plan, lambda: connected.append(ray_jobs.connect(config.resources)))
        finally:
            if any(connected):
                ray_jobs.disconnect()
    artifacts = {
        one.step.name: {
            "status": "made" if one.made else "reused",
            "seconds": one.manifest.metrics["seconds"],
            "path": str(one.step.artifact),
        }
        for one in prepared
    }
    batches = {name: _batches(config, stage, prepared[-1].step) for name, stage in config.stages.items()}
    return {"name": config.name, "artifacts": artifacts, **data_report(plan), "batches": batches}


def render_built(built: Mapping[str, Any]) -> str:
    """What `build_data` found, as tables."""
    artifacts = [
        [name, one["status"], one["path"], f"{one['seconds']:,.1f} s"] for name, one in built["artifacts"].items()
    ]
    batches = [
        [
            name,
            one["section"],
            f"{one['steps']:,}",
            f"{one['batch']:,}",
            f"{100 * one['real_share']:.1f} %",
            f"{100 * one['naive_share']:.1f} %",
        ]
        for name, one in built["batches"].items()
    ]
    header = ["stage", "section", "steps", "batch", "real tokens", "padded to the longest"]
    tables = [*data_tables(built), Table(header, batches, labels=2)]
    rendered = [text_table(table, 90) for table in tables]
    rendered[-1] += "\nreal tokens: of all positions that the stage computes; last: in whole batches, without packing"
    rendered.append(text_table(Table(["artifact", "", "path", "time"], artifacts, labels=3), 200))
    return "\n\n".join(rendered)


def _batches(config: RunConfig, stage: StageConfig, tokens: Step) -> dict[str, Any]:
    """A stage's steps, and the share of real tokens in what it computes; naive is whole batches of unpacked rows."""
    weights = [source.weight for source in getattr(config.data, stage.section)]
    rows = stage_rows(TokenShards(tokens.artifact, stage.section, "train"), stage)
    how = sampling(stage, config.seed, config.model.max_length, weights)
    sampler = BatchSampler(rows, how)
    unpacked = BatchSampler(rows, replace(how, capacity=None))
    workers = config.resources.workers
    device = "cuda" if config.resources.use_gpu else "cpu"
    micro = forward_rows(stage, sampler, workers, config.training, device)

    def computed(batch: Batch) -> int:
        parts = (part for rank in range(workers) for part in batch.shares(rank, workers, micro))
        return sum(_positions(part, stage) for part in parts)

    return {
        "section": stage.section,
        "steps": sampler.total_steps * (stage.updates if isinstance(stage, EpisodeConfig) else 1),
        "batch": stage.global_batch_size,
        "real_share": _real_share(sampler, computed),
        "naive_share": _real_share(unpacked, lambda batch: batch.mask.numel()),
    }


def _real_share(sampler: BatchSampler, positions: Callable[[Batch], int]) -> float:
    """Real tokens over positions, in at most 50 steps spread evenly."""
    count = min(_STEPS, sampler.total_steps)
    tokens = total = 0
    for number in range(count):
        batch = sampler.global_batch(number * sampler.total_steps // count)
        tokens += batch.tokens
        total += positions(batch)
    return tokens / total


def _positions(part: Batch, stage: StageConfig) -> int:
    """Positions that a forward computes: conversations turn by turn, or by groups of turns, each to its own length."""
    if isinstance(stage, MemoryAwareConfig):
        return sum(part.mask[:, turns, :length].numel() for turns, length in turn_groups(part))
    return len(part.rows) * sum(part.turn_lengths)

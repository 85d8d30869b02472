"""What Ray Train, the metrics and the tracking cost a training step, against the same loop in plain processes.

    python benchmarks/ray_overhead.py [--repeats 3] [--workers 2]

The quickstart's memory-aware stage, about 110 steps, from random weights; arms alternate: `plain` is `python -m
rxt_platform.training` (torchrun where there are two workers), `ray` the same job through `ray_jobs.train` with the
driver following its metrics and writing them to MLflow, as `rxt run` does. Seconds of a step are the median over the
steps of the run; start-up is what the rest took.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from processes import job_environment, launcher
from timing import Machine, machine_options, ratio, report, spread

from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.plan import PREPARED, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.progress import HistoryFollower
from rxt_platform.orchestration.steps import stage_job
from rxt_platform.orchestration.tracking import Tracker
from rxt_platform.training.job import HISTORY, StageJob

CONFIG = Path(__file__).parents[1] / "pipelines/configs/quickstart.yaml"
STAGE = "memory_aware"


def seconds_of_steps(job: StageJob) -> tuple[float, float]:
    """Median seconds from one step's start to the next, and of all steps together, from the spans of rank 0."""
    spans = [json.loads(line) for line in (job.output / "spans/rank-00000.jsonl").read_text().splitlines()]
    starts = [span["start"] for span in spans]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    return statistics.median(gaps), sum(gaps)


def plain(job: StageJob, config: RunConfig, folder: Path) -> None:
    """Without Ray, without tracking."""
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    command = [sys.executable, *launcher(config.resources.workers), "rxt_platform.training", str(path)]
    subprocess.run(command, env=job_environment(), capture_output=True, check=True)


def on_ray(job: StageJob, config: RunConfig, folder: Path) -> None:
    """As `rxt run` does it."""
    tracker = Tracker(config.tracking, folder)
    tracker.start("overhead", {}, folder / "open.json")
    child = tracker.step(job.name, {}, {}, folder / "open.json")
    ray_jobs.connect(config.resources)
    try:
        with HistoryFollower(job.work / HISTORY, lambda rows: tracker.history(child, rows)):
            ray_jobs.train(job, config.resources)
    finally:
        ray_jobs.disconnect()
    tracker.finish("FINISHED", [], {}, folder / "open.json")


@click.command()
@machine_options
@click.option("--repeats", default=3, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(machine: Machine, seed: int, json_file: Path | None, repeats: int, workers: int) -> None:
    """Alternate the arms."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    steps: dict[str, list[float]] = {"plain": [], "ray": []}
    whole: dict[str, list[float]] = {"plain": [], "ray": []}
    startup: dict[str, list[float]] = {"plain": [], "ray": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"storage={folder}", f"resources.workers={workers}", f"stages.{STAGE}.epochs=0.3"]
        overrides += [f"stages.{STAGE}.{field}" for field in ("curriculum=[]", "unfreeze_memory_attention=0")]
        config = load_run(CONFIG, [*overrides, f"stages.{STAGE}.unfreeze_encoder=0"])
        plan = build_plan(config)
        prepare(config, plan, lambda: ray_jobs.connect(config.resources))
        ray_jobs.disconnect()
        (step,) = (step for step in plan[len(PREPARED) :] if step.name == STAGE)
        job = stage_job(config, plan, step).model_copy(update={"start": None})
        for _ in range(repeats):
            for arm, run in (("plain", plain), ("ray", on_ray)):
                shutil.rmtree(job.work, ignore_errors=True)
                shutil.rmtree(job.output, ignore_errors=True)
                started = time.monotonic()
                run(job, config, folder)
                took = time.monotonic() - started
                median, together = seconds_of_steps(job)
                steps[arm].append(median)
                whole[arm].append(together)
                startup[arm].append(took - together)
                print(
                    f"{arm:<6} step {1e3 * median:.1f} ms, all steps {together:.1f} s, the rest {took - together:.1f} s"
                )
    found = {
        "step_ms": {arm: spread([1e3 * value for value in values]) for arm, values in steps.items()},
        "startup_seconds": {arm: spread(values) for arm, values in startup.items()},
        "step_ratio": ratio(steps["ray"], steps["plain"]),
        "steps_ratio": ratio(whole["ray"], whole["plain"]),
    }
    print(f"\nray / plain: median step {found['step_ratio']:.3f}, all steps {found['steps_ratio']:.3f}")
    print(
        f"start and end: plain {spread(startup['plain'])['median']:.1f} s, ray {spread(startup['ray'])['median']:.1f} s"
    )
    report("ray_overhead", machine, {"repeats": repeats, "workers": workers, "seed": seed}, found, json_file)


if __name__ == "__main__":
    main()

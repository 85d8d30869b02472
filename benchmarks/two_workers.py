"""Do two workers compute what one does? Per-step losses of all four stages side by side, fp32, same global batch.

    python benchmarks/two_workers.py

Runs the quickstart's model for 10 steps a stage, once in one process and once in two (torchrun, gloo), each chain from
its own random weights. Exits with 1 when a loss differs by more than 1e-5.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rxt_platform.config.loading import load_run
from rxt_platform.orchestration.plan import PREPARED, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.steps import stage_job

CONFIG = Path(__file__).parents[1] / "pipelines/configs/quickstart.yaml"
LARGEST = 1e-5
OVERRIDES = [
    *(f"data.{kind}.train_rows=640" for kind in ("texts", "interactions", "conversations")),
    *(f"stages.{stage}.epochs=1" for stage in ("pretraining", "sft", "memory_aware")),
    "stages.memory_pretraining.epochs=0.5",
    "stages.memory_aware.unfreeze_memory_attention=0.2",
    "stages.memory_aware.unfreeze_encoder=0.2",
    "training.log_every=1",
]


def launcher(workers: int) -> list[str]:
    """Arguments of Python that start `-m`'s module in so many processes."""
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(workers), "-m"] if workers > 1 else ["-m"]


def job_environment() -> dict[str, str]:
    """Of a job's processes: one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}


def losses(workers: int) -> dict[str, list[float]]:
    """The objective of every step, by stage."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_run(CONFIG, [*OVERRIDES, f"storage={folder}"])
        plan = build_plan(config)
        prepare(config, plan, lambda: None)
        found = {}
        for step in plan[len(PREPARED) : -1]:
            job = Path(folder) / f"{step.name}.json"
            job.write_text(stage_job(config, plan, step).model_dump_json())
            subprocess.run(
                [sys.executable, *launcher(workers), "rxt_platform.training", str(job)],
                env=job_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            rows = (step.work / "metrics.jsonl").read_text().splitlines()
            found[step.name] = [json.loads(row)["objective"] for row in rows]
    return found


def main() -> int:
    """Print the table."""
    one, two = losses(1), losses(2)
    largest = 0.0
    for stage, values in one.items():
        print(f"\n{stage}\nstep   1 worker      2 workers     difference")
        for step, (a, b) in enumerate(zip(values, two[stage], strict=True), start=1):
            largest = max(largest, abs(a - b))
            print(f"{step:>4}   {a:.8f}   {b:.8f}   {abs(a - b):.1e}")
    print(f"\nlargest difference {largest:.1e} (allowed {LARGEST:.0e})")
    return int(largest > LARGEST)


if __name__ == "__main__":
    sys.exit(main())

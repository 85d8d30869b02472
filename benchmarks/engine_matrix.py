"""Do all strategies compute the same? 20 steps of each stage under ZeRO 0 to 3, 1 and 2 workers, fp32 and bf16.

    python benchmarks/engine_matrix.py [--stages sft] [--json matrix.json]

Prints, for each combination, the largest difference of a step's loss from the same stage under plain fp32 training by
one worker. Exits with 1 when one in fp32 is larger than 1e-5, or one in bf16 larger than 2e-2.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from processes import job_environment, launcher

from rxt_platform.config.loading import load_run
from rxt_platform.orchestration.plan import PREPARED, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.steps import stage_job
from rxt_platform.training.job import StageJob

CONFIG = Path(__file__).parents[1] / "pipelines/configs/quickstart.yaml"
STAGES = ("pretraining", "sft", "memory_pretraining", "memory_aware")
STEPS = 20
LARGEST = {"fp32": 1e-5, "bf16": 2e-2}
OVERRIDES = [
    *(f"data.{kind}.train_rows=640" for kind in ("texts", "interactions", "conversations.0")),
    *(f"stages.{stage}.{field}" for stage in STAGES for field in ("epochs=1", "global_batch_size=32")),
    "stages.memory_aware.curriculum=[{turns: 2, epochs: 0.3}]",
    "stages.memory_aware.unfreeze_memory_attention=0.2",
    "stages.memory_aware.unfreeze_encoder=0.2",
    "training.log_every=1",
]


def losses(job: StageJob, folder: Path, workers: int) -> list[float]:
    """The objective of every step; the job's folders are removed."""
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    done = subprocess.run(
        [sys.executable, *launcher(workers), "rxt_platform.training", str(path)],
        env=job_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    rows = [json.loads(row) for row in (job.work / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(job.work)
    shutil.rmtree(job.output)
    return [row["objective"] for row in rows]


@click.command()
@click.option("--stages", default=",".join(STAGES), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write all losses here")
def main(stages: str, json_file: Path | None) -> None:
    """Run the matrix."""
    found: dict[str, list[float]] = {}
    failed = False
    print(f"largest difference of {STEPS} losses from ZeRO-0, fp32, 1 worker")
    print(f"{'stage':<20}{'workers':>8}{'precision':>11}" + "".join(f"{f'ZeRO-{zero}':>10}" for zero in range(4)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_run(CONFIG, [*OVERRIDES, f"storage={folder}"])
        plan = build_plan(config)
        prepare(config, plan, lambda: None)
        for step in plan[len(PREPARED) : -1]:
            if step.name not in stages.split(","):
                continue
            job = stage_job(config, plan, step).model_copy(update={"start": None})
            for precision in ("fp32", "bf16"):
                for workers in (1, 2):
                    differences = []
                    for zero in range(4):
                        training = job.training.model_copy(update={"zero_stage": zero, "precision": precision})
                        values = losses(job.model_copy(update={"training": training}), folder, workers)
                        found[f"{step.name}/{precision}/{workers}/{zero}"] = values
                        plain = found[f"{step.name}/fp32/1/0"]
                        differences.append(max(abs(a - b) for a, b in zip(values, plain, strict=True)))
                        failed |= len(values) != STEPS or differences[-1] > LARGEST[precision]
                    figures = "".join(f"{one:>10.1e}" for one in differences)
                    print(f"{step.name:<20}{workers:>8}{precision:>11}{figures}", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(found))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

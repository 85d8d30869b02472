"""Joint pre-training steps through the engine: real tokens/s, utilisation, and where a step's time goes.

    python benchmarks/engine_speed.py --preset alpha-nano --workers 2 [--zero 0,1] [--precision bf16] [--device cuda]

Texts of random tokens that fill the window, so that all tokens are real. The arms (ZeRO stages) alternate, each run in
processes of its own under torchrun; a worker has --threads threads. Utilisation is a share of what a worker's device
reaches: the data sheet's figure for bf16 on an H100 or H200, elsewhere the best matrix product timed at the start.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
import torch.distributed as dist
from joint_step import joint_stage
from processes import job_environment
from timing import Machine, machine_options, ratio, report

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.config.training import CheckpointConfig, TrainingConfig
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.training.distributed import on_rank_zero, start_process_group, stop_process_group, use_cpus
from rxt_platform.training.engine import Engine, EngineSettings, Hooks
from rxt_platform.training.measures import PARTS, Metrics
from rxt_platform.training.watch import Watch, claim

SHOWN = ("tokens_per_second", "utilisation", "step_seconds", *(f"{part}_seconds" for part in PARTS))


def worker(folder: Path, given: dict[str, str]) -> None:
    """What each process does: the steps; rank 0 writes the medians."""
    use_cpus(int(given["threads"]))
    device = start_process_group(given["device"] == "cuda", 600)
    rank, world = dist.get_rank(), dist.get_world_size()
    training = TrainingConfig(
        precision=given["precision"],  # type: ignore[arg-type]
        zero_stage=int(given["zero"]),  # type: ignore[arg-type]
        compile=given["compile"] == "True",
        checkpoints=CheckpointConfig(every=10**6),
        log_every=1,
    )
    torch.manual_seed(0)
    model = ReactiveTransformer(load_preset(given["preset"])).to(device)
    stage = joint_stage(model, int(given["batch"]), 0, int(given["steps"]), int(given["micro"]) or None)
    watch = Watch(folder / "workers", rank, world, on_rank_zero(lambda: claim(folder / "workers")))
    rows: list[Metrics] = []
    settings = EngineSettings(training, folder, "benchmark", {}, device, watch)
    engine = Engine(model, stage, settings)
    engine.run([], Hooks(on_metrics=lambda step, steps, metrics: rows.append(metrics)))
    watch.close()
    warm = rows[min(5, len(rows) // 2) :]
    found = {name: statistics.median(row[name] for row in warm) for name in SHOWN}
    found["peak_memory_bytes"] = warm[-1]["peak_memory_bytes"]
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    stop_process_group()


def run(given: dict[str, str], workers: int) -> dict[str, float]:
    """One arm, in processes of its own."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), __file__]
        environment = {**job_environment(), "DS_ACCELERATOR": given["device"], "RXT_BENCHMARK": json.dumps(given)}
        done = subprocess.run(
            [*command, "--worker", name], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found: dict[str, float] = json.loads((Path(name) / "result.json").read_text())
        return found


@click.command()
@machine_options
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-nano", show_default=True)
@click.option("--batch", default=32, show_default=True, help="texts of a full window a step, over all workers")
@click.option("--micro", default=0, show_default=True, help="rows of a forward; 0: what the engine chooses")
@click.option("--workers", default=1, show_default=True)
@click.option("--zero", "stages", default="0,1", show_default=True, help="ZeRO stages to compare")
@click.option("--compile", "compiled", is_flag=True)
@click.option("--steps", default=12, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--worker", "folder", type=click.Path(path_type=Path), hidden=True)
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    preset: str,
    batch: int,
    micro: int,
    workers: int,
    stages: str,
    compiled: bool,
    steps: int,
    repeats: int,
    folder: Path | None,
) -> None:
    """Compare ZeRO stages."""
    if folder is not None:
        worker(folder, json.loads(os.environ["RXT_BENCHMARK"]))
        return
    precision = "bf16" if machine.dtype == torch.bfloat16 else "fp32"
    given = {"preset": preset, "batch": str(batch), "micro": str(micro), "steps": str(steps), "precision": precision}
    given |= {"device": machine.device.type, "threads": str(machine.threads), "compile": str(compiled)}
    runs: dict[str, list[dict[str, float]]] = {zero: [] for zero in stages.split(",")}
    for _ in range(repeats):
        for zero, found in runs.items():
            found.append(run({**given, "zero": zero}, workers))
    print(f"{preset}, {batch} x {load_preset(preset).max_length} tokens a step, {workers} workers, {precision}")
    print(f"{'':<8}" + "".join(f"{name.removesuffix('_seconds'):>20}" for name in SHOWN) + f"{'peak MiB':>12}")
    results = {}
    for zero, found in runs.items():
        best = {name: statistics.median(one[name] for one in found) for name in found[0]}
        results[f"ZeRO-{zero}"] = best
        print(f"ZeRO-{zero:<3}" + "".join(f"{best[name]:>20,.4g}" for name in SHOWN), end="")
        print(f"{best['peak_memory_bytes'] / 2**20:>12,.0f}")
    first, *others = runs
    for other in others:
        seconds = [[one["step_seconds"] for one in runs[arm]] for arm in (other, first)]
        print(f"ZeRO-{other} / ZeRO-{first}: {ratio(*seconds):.3f} of the time a step")
    report("engine_speed", machine, {**given, "workers": workers, "seed": seed, "repeats": repeats}, results, json_file)


if __name__ == "__main__":
    main()

"""Is a killed run the run that was not killed? Workers, drivers and nodes are killed; weights and rows are compared.

    python benchmarks/faults.py [--stages sft,memory_aware] [--seed 0] [--steps 60]

For each stage, a Ray Train job of two workers on a small model: once undisturbed; once with five SIGKILLs of a worker
at random steps, the third in the middle of a checkpoint write; once with its driver killed and started again; once with
a node (a second raylet) killed. Prints the sha256 of the final weights, the time from each kill to the first new step,
and whether every row was trained on exactly as often as planned. Exits with 1 when anything differs.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import psutil

from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.data.batches import derive_seed
from rxt_platform.data.shards import TokenShards
from rxt_platform.errors import RxtError
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.plan import PREPARED, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.steps import stage_job
from rxt_platform.stages.build import build_stage, stage_rows
from rxt_platform.training.job import StageJob

CONFIG = Path(__file__).parents[1] / "pipelines/configs/quickstart.yaml"
STAGES = ("pretraining", "sft", "memory_pretraining", "memory_aware")
SMALL = [
    *(f"data.{kind}.train_rows=1280" for kind in ("texts", "interactions", "conversations.0")),
    *(
        "resources.workers=2",
        "model.hidden_size=64",
        "model.memory.slots=16",
        "training.log_every=1",
        "training.log_rows=true",
    ),
    *("training.checkpoints.every=5", "stages.memory_aware.curriculum=[{turns: 2, epochs: 0.3}]"),
    *("stages.memory_aware.unfreeze_memory_attention=0.2", "stages.memory_aware.unfreeze_encoder=0.2"),
]


def jobs(folder: Path, steps: int, *overrides: str) -> tuple[RunConfig, dict[str, StageJob]]:
    """The four stages' jobs, each from random weights, `steps` long."""
    config = load_run(CONFIG, [*SMALL, *overrides, f"storage={folder}"])
    sizes = {stage: f"stages.{stage}.global_batch_size={max(2, 1280 // steps // 2 * 2)}" for stage in STAGES}
    epochs = [f"stages.{stage}.epochs=1" for stage in STAGES]
    config = load_run(CONFIG, [*SMALL, *overrides, *sizes.values(), *epochs, f"storage={folder}"])
    plan = build_plan(config)
    prepare(config, plan, lambda: None)
    made = {step.name: stage_job(config, plan, step) for step in plan[len(PREPARED) : -1]}
    return config, {name: job.model_copy(update={"start": None}) for name, job in made.items()}


def rows_of(path: Path) -> list[dict[str, object]]:
    """Complete JSON lines."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def logged(job: StageJob) -> int:
    """The newest step that was logged."""
    rows = rows_of(job.work / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0  # type: ignore[call-overload]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 240) -> None:
    """Poll, with a deadline that says what it waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.002)


def last_span(job: StageJob) -> dict[str, object]:
    """The newest step of worker 0; its attempt is another one after a restart."""
    spans = rows_of(job.work / "spans/rank-00000.jsonl")
    return spans[-1] if spans else {"attempt": "", "step": 0}


def recovery(job: StageJob, attempt: object) -> str:
    """How long it takes from now until a new attempt has done a step; workers of a lost driver go on for a while."""
    killed = time.monotonic()
    wait_for("a step of a new attempt", lambda: last_span(job)["attempt"] != attempt)
    return f"{time.monotonic() - killed:.1f} s until the next step, {last_span(job)['step']}"


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Ray Train's worker processes below a driver."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def sha256(job: StageJob) -> str:
    """Of the weights that a job ended with."""
    return hashlib.sha256((job.output / "model.safetensors").read_bytes()).hexdigest()


def audit(job: StageJob) -> str:
    """Were the rows trained on those of the plan? Of a step done twice, the newest attempt counts."""
    shards = stage_rows(TokenShards(job.tokens, job.stage.section, "train"), job.stage)
    sampler = build_stage(job.stage, shards, derive_seed(job.seed, job.name), job.model.max_length, job.weights).sampler
    spans = [span for path in sorted((job.output / "spans").glob("*.jsonl")) for span in rows_of(path)]
    newest: dict[tuple[int, int], dict[str, object]] = {}
    for span in sorted(spans, key=lambda one: float(one["start"])):  # type: ignore[arg-type]
        newest[int(span["step"]), int(span["rank"])] = span  # type: ignore[call-overload]
    wrong = []
    for step in range(sampler.total_steps):
        trained = [row for (at, _), span in newest.items() if at == step + 1 for row in span["rows"]]  # type: ignore[attr-defined]
        if sorted(trained) != sorted(sampler.global_batch(step).rows.tolist()):
            wrong.append(step + 1)
    again = len(spans) - len(newest)
    return f"rows as planned ({again} spans of steps done again)" if not wrong else f"WRONG ROWS in steps {wrong}"


@contextlib.contextmanager
def ray_here(config: RunConfig) -> Iterator[None]:
    """A Ray of this process."""
    ray_jobs.connect(config.resources)
    try:
        yield
    finally:
        ray_jobs.disconnect()


def straight(job: StageJob, config: RunConfig) -> str:
    """The undisturbed run."""
    with ray_here(config):
        ray_jobs.train(job, config.resources)
    return sha256(job)


def killed_workers(job: StageJob, config: RunConfig, seed: int, steps: int) -> list[str]:
    """Five SIGKILLs in one run; what was killed where, and how long it took to get on."""
    chance = random.Random(seed)
    told: list[str] = []
    marks = sorted(chance.sample(range(6, steps - 6), 5))
    checkpoints = job.work / "checkpoints"

    def reached(mark: int) -> bool:
        return logged(job) >= mark

    def kill() -> None:
        me = psutil.Process()
        for number, mark in enumerate(marks):
            wait_for(f"step {mark}", functools.partial(reached, mark))
            at = f"step {logged(job)}"
            if number == 2:
                wait_for("a checkpoint write", lambda: list(checkpoints.glob(".step-*.tmp")))
                at = f"the write of {next(checkpoints.glob('.step-*.tmp')).name[1:14]}"
            attempt = last_span(job)["attempt"]
            chance.choice(workers_of(me)).kill()
            told.append(f"worker killed in {at}: {recovery(job, attempt)}")

    resources = config.resources.model_copy(update={"max_failures": 8})
    killer = threading.Thread(target=kill, daemon=True)
    with ray_here(config):
        killer.start()
        ray_jobs.train(job, resources)
    killer.join(timeout=10)
    return told


def killed_driver(job: StageJob, chance: random.Random, steps: int) -> list[str]:
    """The driver's process and nothing else; then the same command."""
    path = job.work.parent / "driver-job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.model_dump_json())
    command = [sys.executable, __file__, "--drive", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mark = chance.randrange(6, steps - 6)
    wait_for(f"step {mark}", lambda: logged(job) >= mark)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before, attempt = logged(job), last_span(job)["attempt"]
    again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = f"driver killed in step {before}: {recovery(job, attempt)}"
    if again.wait(timeout=600):
        raise RuntimeError(f"the second driver ended with {again.returncode}")
    return [told]


def killed_node(job: StageJob, config: RunConfig, chance: random.Random, steps: int) -> list[str]:
    """A head and three nodes of one CPU; one that has a worker is killed."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    told: list[str] = []

    def kill() -> None:
        mark = chance.randrange(6, steps - 6)
        wait_for(f"step {mark}", lambda: logged(job) >= mark)
        raylets = {node: psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes}
        busy = [node for node, raylet in raylets.items() if workers_of(raylet)]
        before, attempt = logged(job), last_span(job)["attempt"]
        cluster.remove_node(chance.choice(busy), allow_graceful=False)
        told.append(f"node killed in step {before}: {recovery(job, attempt)}")

    try:
        own = {"env_vars": {"RAY_ADDRESS": cluster.address}}  # as `ray_jobs.connect` does: see there
        ray.init(address=cluster.address, log_to_driver=False, runtime_env=own)
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        ray_jobs.train(job, config.resources)
        killer.join(timeout=10)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return told


@click.command()
@click.option("--stages", default=",".join(STAGES), show_default=True)
@click.option("--seed", default=0, show_default=True, help="of the moments of the kills")
@click.option("--steps", default=60, show_default=True, help="of each run")
@click.option("--drive", type=click.Path(exists=True, path_type=Path), hidden=True)
def main(stages: str, seed: int, steps: int, drive: Path | None) -> None:
    """Kill things and compare."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if drive is not None:
        job = StageJob.model_validate_json(drive.read_text())
        config = load_run(CONFIG, ["resources.workers=2"])
        with ray_here(config):
            ray_jobs.train(job, config.resources)
        return
    wrong = False
    folder = Path(tempfile.mkdtemp())
    try:
        for stage in stages.split(","):
            expected = ""
            for name in ("straight", "workers", "driver", "node"):
                storage = folder / stage / name
                config, made = jobs(storage, steps)
                job, chance = made[stage], random.Random(f"{seed}/{stage}/{name}")
                started = time.monotonic()
                told: list[str] = []
                if name == "straight":
                    expected = straight(job, config)
                elif name == "workers":
                    told = killed_workers(job, config, chance.randrange(10**6), steps)
                elif name == "driver":
                    told = killed_driver(job, chance, steps)
                else:
                    told = killed_node(job, config, chance, steps)
                same, rows = sha256(job) == expected, audit(job)
                wrong |= not same or "WRONG" in rows or (name == "workers" and len(told) < 5)
                print(
                    f"{stage:<18} {name:<8} sha256 {sha256(job)[:16]} {'same' if same else 'DIFFERENT'}; {rows}; ",
                    end="",
                )
                print(f"{time.monotonic() - started:.0f} s", flush=True)
                for line in told:
                    print(f"    {line}", flush=True)
    except (RxtError, TimeoutError) as error:
        print(f"error: {error}")
        wrong = True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()

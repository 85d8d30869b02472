"""Small stage jobs on the story world, run as users run them: in processes of their own."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.evaluation.report.report import Report
from rxt_platform.orchestration.plan import PREPARED, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.steps import stage_job
from rxt_platform.training.job import StageJob
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = [
    "data.texts.train_rows=160",
    "data.texts.validation_rows=16",
    "data.interactions.train_rows=160",
    "data.interactions.validation_rows=16",
    "data.conversations.0.train_rows=160",
    "data.conversations.0.validation_rows=16",
    "data.conversations.1={kind: story_world, seed: 1, train_rows: 48, validation_rows: 8, turns: [5]}",
    "model.hidden_size=32",
    "model.memory.slots=8",
    "model.encoder.feed_forward_size=48",
    "model.decoder.experts.size=32",
    "resources.workers=2",
    "evaluation.conversations=16",
    "evaluation.samples=1",
    "training.checkpoints.every=3",
    "training.log_every=1",
    "stages.pretraining.packing=1",
    "stages.pretraining.global_batch_size=8",
    *(f"stages.{name}.global_batch_size=16" for name in ("sft", "memory_pretraining", "memory_aware")),
    *(f"stages.{name}.epochs=1" for name in ("pretraining", "sft", "memory_pretraining", "memory_aware")),
    "stages.memory_aware.curriculum=[{turns: 2, epochs: 0.3}]",
    "stages.memory_aware.unfreeze_memory_attention=0.2",
    "stages.memory_aware.unfreeze_encoder=0.3",
    "stages.mrl.steps=4",
    "stages.mrl.epochs=1",
    "stages.mrl.global_batch_size=8",
    "stages.mrl.answers=3",
    "stages.mrl.max_answer_tokens=12",
    "stages.mrl.held_out=8",
    "stages.mrl.reward={}",
]
ONE_SOURCE = [f"stages.{name}.sources=null" for name in ("memory_pretraining", "memory_aware", "mrl")]
"""Where `data.conversations` is replaced by a single source."""
STAGES = ("pretraining", "sft", "memory_pretraining", "memory_aware")
ALL_STAGES = (*STAGES, "mrl")


def small_run(storage: Path, *overrides: str) -> RunConfig:
    """The quickstart, made small: 10 steps a stage, 6 of reinforcement learning."""
    return load_run(ROOT / "pipelines/configs/quickstart.yaml", [*SMALL, f"storage={storage}", *overrides])


def environment() -> dict[str, str]:
    """Of a test's child processes."""
    venv = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{venv}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
    }


@dataclass
class Jobs:
    """The four stage jobs of a small run, not run yet."""

    config: RunConfig
    jobs: dict[str, StageJob]
    folder: Path

    def command(self, stage: str, workers: int = 1) -> list[str]:
        """How a user starts a stage without Ray."""
        path = self.folder / f"{stage}.json"
        path.write_text(self.jobs[stage].model_dump_json())
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(workers)] if workers > 1 else []
        return [sys.executable, *launcher, "-m", "rxt_platform.training", str(path)]

    def forked(self, stage: str, workers: int = 1, script: str | None = None, *arguments: str) -> Forked:
        """Start a stage, by a script of the tests or as `python -m rxt_platform.training` does."""
        *_, job = self.command(stage)
        target = "rxt_platform.training" if script is None else ROOT / "tests" / script
        return Forked(target, [job, *arguments], workers, environment(), ROOT)

    def run(
        self, stage: str, workers: int = 1, script: str | None = None, *arguments: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a stage to its end."""
        with self.forked(stage, workers, script, *arguments) as process:
            return process.wait(300)

    def run_command(self, stage: str, workers: int = 1) -> subprocess.CompletedProcess[str]:
        """Run a stage to its end by the command that a user gives: a new interpreter, a hash seed of its own."""
        command = self.command(stage, workers)
        return subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )

    def run_and_kill(self, stage: str, step: int) -> None:
        """SIGKILL a stage's process as soon as it has logged `step`."""
        with self.forked(stage) as process:
            deadline = time.monotonic() + 120
            while len(self.history(stage)) < step:
                assert process.poll() is None, "ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.002)

    def history(self, stage: str) -> list[dict[str, float]]:
        """Logged metrics, one row for each step."""
        path = self.jobs[stage].work / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def weights_sha256(self, stage: str) -> str:
        """Hash of the trained model's weights file."""
        return hashlib.sha256((self.jobs[stage].output / "model.safetensors").read_bytes()).hexdigest()


def make_jobs(folder: Path, *overrides: str) -> Jobs:
    """The small run's jobs, with corpus, tokenizer and tokens made."""
    return make_jobs_of(small_run(folder, *overrides), folder)


def make_jobs_of(config: RunConfig, folder: Path) -> Jobs:
    """The jobs of a run, with corpus, tokenizer and tokens made."""
    plan = build_plan(config)
    prepare(config, plan, no_ray)
    return Jobs(config, {step.name: stage_job(config, plan, step) for step in plan[len(PREPARED) : -1]}, folder)


def no_ray() -> None:
    """Stands for connecting to Ray where nothing is large enough to need it."""
    raise AssertionError("a small corpus needs no Ray")


def driver_command(
    storage: Path, *overrides: str, script: str = "full_smst.py", stages: Sequence[str] = ALL_STAGES
) -> list[str]:
    """How a user starts the small pipeline, or only its first stages."""
    config = ROOT / "pipelines/configs/quickstart.yaml"
    if stages != ALL_STAGES:
        raw = yaml.safe_load(config.read_text())
        raw["stages"] = {name: raw["stages"][name] for name in stages}
        config = storage / config.name
        config.write_text(yaml.safe_dump(raw, sort_keys=False))
    small = [one for one in SMALL if not one.startswith("stages.") or one.split(".")[1] in stages]
    command = [sys.executable, str(ROOT / "pipelines" / script), "--config", str(config)]
    return [*command, *small, f"storage={storage}", *overrides]


def run_driver(
    storage: Path, *overrides: str, script: str = "full_smst.py", stages: Sequence[str] = ALL_STAGES
) -> subprocess.CompletedProcess[str]:
    """Run the small pipeline to its end in a process of its own."""
    command = driver_command(storage, *overrides, script=script, stages=stages)
    return subprocess.run(
        command, env=environment(), cwd=storage, capture_output=True, text=True, timeout=900, check=False
    )


def read_report(storage: Path) -> Report:
    """The report of the small pipeline."""
    report: Report = json.loads((storage / "quickstart/report.json").read_text())
    return report


def weights_of(report: Report, stage: str) -> str:
    """Hash of the weights that a stage of a run ended with."""
    (folder,) = (step["artifact"] for step in report["steps"] if step["name"] == stage)
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()

"""What each part of the recipe is worth: recall by distance of `tiny` on the story world, several seeds an arm.

    python benchmarks/ablation.py --storage runs/ablation [--seeds 3] [--parallel 2] [--json FILE]

The base is pipelines/configs/recall.yaml with a smaller last stage, so that differences show. All arms train on as many
tokens as the full recipe: the last stage of an arm is made longer or shorter until they are. Each process has one
worker on one thread, without Ray. What was trained or measured before is taken over: an interrupted run goes on with
the same command.
"""

import json
import multiprocessing
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from processes import job_environment

from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.shards import TokenShards
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.evaluation.conversations import encode_talks, hold_conversations
from rxt_platform.evaluation.intervals import RESAMPLES
from rxt_platform.evaluation.responders import ReactiveResponder
from rxt_platform.model.files import load_model
from rxt_platform.orchestration.plan import PREPARED, Step, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.steps import remove_leftovers, stage_job
from rxt_platform.stages.build import build_stage, stage_rows
from rxt_platform.training.distributed import use_cpus

ROOT = Path(__file__).parents[1]
BASE = [
    "data.conversations.train_rows=16000",
    "stages.memory_aware.epochs=1.25",
    "stages.memory_aware.global_batch_size=32",
    "stages.memory_aware.curriculum=[{turns: 2, epochs: 0.25}, {turns: 4, epochs: 0.25}]",
    "training.zero_stage=0",
]
LAST = "memory_aware"
CONVERSATIONS, TURNS = 600, 9
DISTANCES = (1, 2, 4, 8)
Run = list[tuple[int, int, bool, bool]]
"""A model's questions: conversation, distance, whether it was right, and whether with the memory reset."""


@dataclass(frozen=True)
class Arm:
    """What an arm changes in the base: configuration, or a stage that it leaves out."""

    overrides: tuple[str, ...] = ()
    without: str | None = None


ARMS = {
    "full recipe": Arm(),
    "no memory-attention pre-training": Arm(without="memory_pretraining"),
    "no joint pre-training": Arm(without="pretraining"),
    "bptt_window 1": Arm((f"stages.{LAST}.bptt_window=1",)),
    "bptt_window 2": Arm((f"stages.{LAST}.bptt_window=2",)),
    "bptt_window 4": Arm((f"stages.{LAST}.bptt_window=4",)),
    "no gradual unfreezing": Arm((f"stages.{LAST}.unfreeze_memory_attention=0", f"stages.{LAST}.unfreeze_encoder=0")),
    "elementwise gates": Arm(("model.memory.gate=elementwise",)),
    "self-interlayer": Arm(("model.memory.variant=self-interlayer",)),
    "no curriculum": Arm((f"stages.{LAST}.curriculum=[]",)),
    "random initial memory": Arm(("model.memory.initialization=standard",)),
    "memory path frozen in decoder-only rows": Arm(
        tuple(f"stages.{stage}.loss.freeze_memory_path=true" for stage in ("pretraining", "sft"))
    ),
    "no decoder-only rows": Arm(tuple(f"stages.{stage}.loss.decoder_only=0" for stage in ("pretraining", "sft"))),
}


def configured(arm: Arm, seed: int, storage: Path) -> RunConfig:
    """The arm's run, before its tokens are evened out."""
    settings = [*BASE, *arm.overrides, f"seed={seed}", f"storage={storage}", "resources.workers=1"]
    config = load_run(ROOT / "pipelines/configs/recall.yaml", settings)
    stages = {name: stage for name, stage in config.stages.items() if name != arm.without}
    return config.model_copy(update={"stages": stages})


def tokens_of(config: RunConfig, name: str, epochs: float | None = None) -> int:
    """Tokens that a stage reads; with `epochs` that many of its whole conversations."""
    stage = config.stages[name]
    if epochs is not None:
        stage = stage.model_copy(update={"epochs": epochs, "curriculum": []})
    rows = stage_rows(TokenShards(build_plan(config)[2].artifact, stage.section, "train"), stage)
    sampler = build_stage(stage, rows, config.seed, config.model.max_length).sampler
    return sum(sampler.global_batch(step).tokens for step in range(sampler.total_steps))


def evened(config: RunConfig, whole: RunConfig) -> RunConfig:
    """The run with as many epochs of its last stage as make its tokens those of the `whole` recipe."""
    missing = sum(tokens_of(whole, name) for name in whole.stages) - sum(
        tokens_of(config, name) for name in config.stages
    )
    if not missing:
        return config
    last = config.stages[LAST]
    epochs = last.epochs + missing / tokens_of(config, LAST, epochs=1.0)
    return config.model_copy(update={"stages": {**config.stages, LAST: last.model_copy(update={"epochs": epochs})}})


class Trainer:
    """Trains each step once, whichever arm comes first."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self.preparing = threading.Lock()

    def train(self, name: str, seed: int) -> Path:
        """The folder of an arm's model."""
        arm = ARMS[name]
        with self.preparing:
            config, whole = configured(arm, seed, self.storage), configured(Arm(), seed, self.storage)
            for one in (config, whole):
                prepare(one, build_plan(one), _no_ray)
            config = evened(config, whole)
            plan = build_plan(config)
        steps = [step for step in plan[len(PREPARED) :] if step.kind == "training"]
        for step in steps:
            with self.preparing:
                lock = self.locks[step.artifact]
            with lock:
                if step.finished() is None:
                    self._run(config, plan, step)
        return steps[-1].artifact

    def _run(self, config: RunConfig, plan: list[Step], step: Step) -> None:
        remove_leftovers(step)
        step.work.mkdir(parents=True, exist_ok=True)
        job = step.work / "job.json"
        job.write_text(stage_job(config, plan, step).model_dump_json())
        command = [sys.executable, "-m", "rxt_platform.training", str(job)]
        done = subprocess.run(command, env=job_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{step.label}: {done.stderr[-2000:]}")
        click.echo(f"trained  {step.label}", err=True)


def measure(seed: int, model: Path, file: Path) -> None:
    """Every question of the held-out conversations: [conversation, distance, right, right with the memory reset]."""
    use_cpus(1)
    loaded, tokenizer = load_model(model)
    conversations = StoryWorld(1).conversations("validation", CONVERSATIONS, TURNS)
    talks = encode_talks(conversations, RowEncoder(tokenizer, loaded.config.max_length, "fail"))
    outcomes = hold_conversations(ReactiveResponder(loaded), tokenizer, talks, seed, free_running=False)
    asked = [(one.conversation, one.question) for one in outcomes if one.question is not None]
    found = [[number, one.distance, one.right, one.reset] for number, one in asked]
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found))
    unfinished.rename(file)


def recall_at(runs: Sequence[Run], distance: int) -> dict[str, Any]:
    """Recall, the same with the memory reset, and gain at a distance, over all seeds' runs, and each seed's recall.

    95 % intervals by bootstrap over seeds and conversations: both are drawn anew, as all runs hold the same
    conversations.
    """
    hits = np.zeros((3, len(runs), CONVERSATIONS))
    asked = np.zeros((len(runs), CONVERSATIONS))
    for number, run in enumerate(runs):
        for conversation, far, right, reset in run:
            if far == distance:
                asked[number, conversation] += 1
                hits[:, number, conversation] += (right, reset, right - reset)
    generator = np.random.default_rng(0)
    seeds = generator.multinomial(len(runs), [1 / len(runs)] * len(runs), RESAMPLES)
    talks = generator.multinomial(CONVERSATIONS, [1 / CONVERSATIONS] * CONVERSATIONS, RESAMPLES)
    below = np.einsum("rs,rc,sc->r", seeds, talks, asked, optimize=True)
    drawn = np.einsum("rs,rc,msc->mr", seeds, talks, hits, optimize=True) / below
    bounds = np.percentile(drawn, (2.5, 97.5), axis=1).T.tolist()
    values = (hits.sum(axis=(1, 2)) / asked.sum()).tolist()
    names = ("with_memory", "reset", "gain")
    return {
        **dict(zip(names, values, strict=True)),
        "count": int(asked.sum()),
        "intervals": dict(zip(names, bounds, strict=True)),
        "seeds": (hits[0].sum(axis=1) / asked.sum(axis=1)).tolist(),
    }


def table(results: dict[str, dict[str, Any]], name: str) -> str:
    """Markdown: one row an arm, one column a distance."""
    lines = [
        "| arm | " + " | ".join(f"distance {distance}" for distance in DISTANCES) + " |",
        "|---" * (len(DISTANCES) + 1) + "|",
    ]
    for arm, by_distance in results.items():
        cells = []
        for distance in DISTANCES:
            entry = by_distance[str(distance)]
            low, high = (100 * bound for bound in entry["intervals"][name])
            seeds = (
                " (" + ", ".join(f"{100 * one:.0f}" for one in entry["seeds"]) + ")" if name == "with_memory" else ""
            )
            cells.append(f"{100 * entry[name]:.1f} [{low:.1f}, {high:.1f}]{seeds}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--storage", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--parallel", type=click.IntRange(1), default=2, show_default=True, help="processes at a time")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="only these; may be given again")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write the results here")
def main(storage: Path, seeds: int, parallel: int, arms: tuple[str, ...], json_file: Path | None) -> None:
    """Train and measure all arms, and print recall and memory gain by distance."""
    storage = storage.resolve()
    measured = storage / "measured"
    measured.mkdir(parents=True, exist_ok=True)
    tasks = [(arm, seed) for arm in arms or ARMS for seed in range(seeds)]
    trainer = Trainer(storage)
    with ThreadPoolExecutor(parallel) as threads:
        models = list(threads.map(lambda task: trainer.train(*task), tasks))
    files = [measured / f"{model.name}-{CONVERSATIONS}x{TURNS}.json" for model in models]
    missing = [
        (seed, model, file) for (_, seed), model, file in zip(tasks, models, files, strict=True) if not file.exists()
    ]
    with ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn")) as processes:
        for done in [processes.submit(measure, *one) for one in missing]:
            done.result()
    runs: defaultdict[str, list[Run]] = defaultdict(list)
    for (arm, _), file in zip(tasks, files, strict=True):
        runs[arm].append(json.loads(file.read_text()))
    results = {arm: {str(far): recall_at(found, far) for far in DISTANCES} for arm, found in runs.items()}
    click.echo(f"{CONVERSATIONS} held-out conversations of {TURNS} turns, {seeds} seeds; %, 95 % intervals\n")
    for title, name in (("Recall", "with_memory"), ("Recall with the memory reset", "reset"), ("Memory gain", "gain")):
        click.echo(f"{title}\n\n{table(results, name)}\n")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1))


def _no_ray() -> None:
    """Everything here runs without."""


if __name__ == "__main__":
    main()

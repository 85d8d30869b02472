"""What memory reinforcement learning gains: reward and free-running recall by distance before and after, several seeds.

    python benchmarks/mrl.py --storage runs/mrl_benchmark [--seeds 3] [--arm group ...] [--model DIR ...] [--json FILE]

The base is pipelines/configs/mrl.yaml: supervised stages on conversations of up to four turns, then 2, 4 and 8
follow-ups. Beside the curriculum ("group") stands as much CPU time of going on with memory-aware training on the same
conversations ("supervised"), and the same curriculum with other objectives. Held-out conversations of nine turns;
facts are combinations (character, attribute, value) that no training row holds. Each process has one worker on one
thread, without Ray. What was trained or measured before is taken over: an interrupted run goes on with the same
command.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from processes import job_environment

from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.config.stage_base import StartFrom
from rxt_platform.data.batches import derive_seed
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.recall import matches
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.data.tokenizer import answer_ids
from rxt_platform.evaluation.intervals import RESAMPLES
from rxt_platform.model.files import load_model
from rxt_platform.orchestration.plan import PREPARED, Step, build_plan
from rxt_platform.orchestration.prepare import prepare
from rxt_platform.orchestration.reinforce import reinforced
from rxt_platform.orchestration.steps import remove_leftovers, stage_job
from rxt_platform.rl.episodes import Episode
from rxt_platform.rl.rollouts import RolloutOptions, hold_episodes
from rxt_platform.training.distributed import use_cpus

ROOT = Path(__file__).parents[1]
CONVERSATIONS, TURNS, SAMPLED = 400, 9, 2
DISTANCES = (1, 2, 4, 8)
CURRICULUM = ("mrl_2", "mrl_4", "mrl_8")
_CRITIC = ("critic={}", "optimizer.learning_rate_scale={critic: 1.0, critic_head: 3.0}", "critic_warmup=0.02")
ARMS: dict[str, tuple[str, ...]] = {
    "group": (),
    "group, 3 epochs of 2 minibatches": ("minibatches=2", "global_batch_size=16", "update_epochs=3"),
    "group, gradient through one write": ("bptt_window=1",),
    "group, KL 0.02": ("objective={kind: policy, kl_weight: 0.02}",),
    "impo": ("objective={kind: policy, advantage: impo, normalise: batch}", *_CRITIC),
    "gae": (
        "objective={kind: policy, advantage: gae, discount: 0.5, normalise: batch}",
        *_CRITIC,
        "answers=1",
        "global_batch_size=128",
        "reward={weights: {recall: 0.5, bleu: 0.25, cosine: 0.15, length: 0.1}}",
    ),
    "dmpo": ("objective={kind: dmpo, beta: 1.0}",),
}
"""Overrides of every stage of the curriculum."""


def base_run(seed: int, storage: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The whole recipe."""
    settings = [f"seed={seed}", f"storage={storage}", "resources.workers=1", "training.zero_stage=0"]
    return load_run(ROOT / "pipelines/configs/mrl.yaml", [*settings, *overrides])


def supervised_base(seed: int, storage: Path) -> RunConfig:
    """The recipe's supervised stages."""
    config = base_run(seed, storage)
    stages = {name: stage for name, stage in config.stages.items() if name not in CURRICULUM}
    return config.model_copy(update={"stages": stages})


def configured(arm: str, seed: int, storage: Path, base: Path) -> RunConfig:
    """An arm's curriculum on a model."""
    overrides = [f"stages.{stage}.{one}" for stage in CURRICULUM for one in ARMS[arm]]
    if arm == "gae":  # one answer a question: as many answers an update need four times the conversations
        epochs = zip(CURRICULUM, (0.32, 0.32, 0.64), strict=True)
        overrides += [f"stages.{stage}.epochs={value}" for stage, value in epochs]
    return reinforced(base_run(seed, storage, overrides), str(base))


def supervised(seed: int, storage: Path, base: Path, steps: int) -> RunConfig:
    """Memory-aware training that goes on for so many steps, on the conversations of the curriculum."""
    config = base_run(seed, storage)
    last = config.stages["memory_aware"]
    changes: dict[str, Any] = {
        "sources": [1, 2, 3],
        "epochs": steps * last.global_batch_size / 24000,
        "curriculum": [],
        "unfreeze_memory_attention": 0.0,
        "unfreeze_encoder": 0.0,
        "optimizer": last.optimizer.model_copy(update={"learning_rate": 3e-4}),
        "start_from": StartFrom(artifact=str(base)),
    }
    return config.model_copy(update={"stages": {"more_memory_aware": last.model_copy(update=changes)}})


def steps_for(seconds: float, storage: Path, base: Path) -> int:
    """Of memory-aware training in so many seconds of CPU, the start of a process included."""
    few, more = 5, 45
    costs = [
        spent(supervised(0, storage, base, steps))
        for steps in (few, more)
        if train(supervised(0, storage, base, steps))
    ]
    each = (costs[1] - costs[0]) / (more - few)
    return round((seconds - costs[0] + few * each) / each)


def train(config: RunConfig) -> Path:
    """Make what is not there yet; the folder of the last model."""
    plan = build_plan(config)
    prepare(config, plan, _no_ray)
    steps = [step for step in plan[len(PREPARED) :] if step.kind == "training"]
    for step in steps:
        if step.finished() is None:
            _run(config, plan, step)
    return steps[-1].artifact


def _run(config: RunConfig, plan: list[Step], step: Step) -> None:
    remove_leftovers(step)
    step.work.mkdir(parents=True, exist_ok=True)
    job = step.work / "job.json"
    job.write_text(stage_job(config, plan, step).model_dump_json())
    command = [sys.executable, "-m", "rxt_platform.training", str(job)]
    with (step.work / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=job_environment(), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{step.label}: {(step.work / 'log.txt').read_text()[-2000:]}")
    _cpu_file(step).write_text(json.dumps(usage.ru_utime + usage.ru_stime))
    click.echo(f"trained  {step.label}", err=True)


def _cpu_file(step: Step) -> Path:
    return step.artifact.parents[1] / "measured" / f"{step.label}.cpu.json"


def spent(config: RunConfig) -> float:
    """Seconds of CPU that a run's training took: what other processes do at the time does not count."""
    steps = [step for step in build_plan(config) if step.kind == "training"]
    return sum(float(json.loads(_cpu_file(step).read_text())) for step in steps)


def measure(model: Path, file: Path) -> None:
    """Hold held-out conversations free-running: questions as [conversation, distance, greedy, sampled (of two)]."""
    use_cpus(1)
    loaded, tokenizer = load_model(model)
    talks = StoryWorld(1).conversations("validation", CONVERSATIONS, TURNS)
    examples = [one[0] for one in RowEncoder(tokenizer, loaded.config.max_length, "fail").encode(talks)]  # type: ignore[index]
    held = [
        Episode.of(talk, one, derive_seed(5, n), n, TURNS - 1)
        for n, (talk, one) in enumerate(zip(talks, examples, strict=True))
    ]

    def right(episode: Episode, turn: int, answer: list[int]) -> bool:
        item = episode.asked(turn)
        assert item.recall is not None
        return matches(tokenizer.decode(answer_ids(answer)), item.reply, item.recall.spans)

    found = []
    for start in range(0, CONVERSATIONS, 100):
        part = held[start : start + 100]
        greedy = hold_episodes(loaded, part, RolloutOptions(1, 0.0))
        sampled = hold_episodes(loaded, part, RolloutOptions(SAMPLED, 1.0))
        for one, other in zip(greedy, sampled, strict=True):
            for turn in range(1, TURNS):
                key = one.episode.asked(turn).recall
                if key is not None:
                    hits = [right(one.episode, turn, answer) for answer in (*one.answers[turn], *other.answers[turn])]
                    found.append([one.episode.row, key.distance, float(hits[0]), float(np.mean(hits[1:]))])
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found))
    unfinished.rename(file)


def summary(rows: Sequence[Sequence[float]], other: Sequence[Sequence[float]] | None = None) -> dict[str, Any]:
    """Sampled reward (0 to 10) and greedy recall by distance, with 95 % intervals by bootstrap over conversations; with
    `other` the differences from that one."""
    weights = np.random.default_rng(0).multinomial(CONVERSATIONS, [1 / CONVERSATIONS] * CONVERSATIONS, RESAMPLES)

    def mean(of: Sequence[Sequence[float]], column: int, distance: int | None) -> np.ndarray:
        sums, counts = np.zeros(CONVERSATIONS), np.zeros(CONVERSATIONS)
        for row in of:
            if distance is None or row[1] == distance:
                sums[int(row[0])] += row[column]
                counts[int(row[0])] += 1
        drawn = weights @ sums / np.maximum(weights @ counts, 1)
        return np.concatenate([[sums.sum() / counts.sum()], drawn])

    def told(column: int, distance: int | None, scale: float) -> dict[str, Any]:
        values = scale * mean(rows, column, distance)
        if other is not None:
            values = values - scale * mean(other, column, distance)
        return {"value": float(values[0]), "interval": np.percentile(values[1:], (2.5, 97.5)).tolist()}

    return {
        "reward": told(3, None, 10.0),
        "greedy_reward": told(2, None, 10.0),
        **{f"recall at {distance}": told(2, distance, 1.0) for distance in DISTANCES},
    }


def lowest(config: RunConfig) -> dict[str, float]:
    """Of each stage of the curriculum, the lowest mean reward of five updates over that of the first five."""
    found = {}
    for step in build_plan(config):
        if step.name in CURRICULUM:
            rewards = [json.loads(line)["reward"] for line in (step.artifact / "history.jsonl").open()]
            means = np.convolve(rewards, np.ones(5) / 5, "valid")
            found[step.name] = float(means.min() / means[0])
    return found


def curve(config: RunConfig) -> list[tuple[str, list[float]]]:
    """The reward of every update, stage by stage."""
    return [
        (step.name, [json.loads(line)["reward"] for line in (step.artifact / "history.jsonl").open()])
        for step in build_plan(config)
        if step.name in CURRICULUM
    ]


def draw(curves: Mapping[str, Sequence[Sequence[tuple[str, list[float]]]]], path: Path) -> None:
    """Rewards of the updates of each arm: one panel an arm, one line a seed."""
    from matplotlib.figure import Figure

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    for number, (arm, seeds) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for seed, stages in enumerate(seeds):
            at = 0
            for _, rewards in stages:
                smooth = np.convolve(rewards, np.ones(3) / 3, "valid") if len(rewards) > 3 else np.array(rewards)
                axes.plot(at + np.arange(len(smooth)) + 1, smooth, color=f"C{seed}", linewidth=1.3)
                at += len(rewards)
                axes.axvline(at + 0.5, color="0.85", linewidth=0.8, zorder=0)
        axes.set_title(arm, fontsize=10, loc="left")
        axes.set_ylim(0, 10)
        axes.set_xlabel("update: 2, 4, 8 follow-ups")
        axes.set_ylabel("reward of sampled answers")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> str:
    """Markdown: one row for an arm and seed, one column a measure."""
    lines = ["| arm | seed | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for arm, seeds in results.items():
        for seed, entry in enumerate(seeds):
            cells = []
            for name in names:
                one, scale = entry[name], 100 if name.startswith("recall") else 1
                digits = 1 if scale > 1 else 2
                value, low, high = (f"{scale * bound:.{digits}f}" for bound in (one["value"], *one["interval"]))
                cells.append(f"{value} [{low}, {high}]")
            lines.append(f"| {arm} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclass
class Trained:
    """What was trained: runs and models of each arm by seed, and of the arms that have no curriculum."""

    runs: dict[tuple[str, int], RunConfig]
    models: dict[tuple[str, int], Path]
    supervised: list[RunConfig]

    def seeds(self, arm: str) -> list[int]:
        """That an arm was trained with."""
        return sorted(seed for other, seed in self.models if other == arm)


def train_all(
    storage: Path, tasks: Sequence[tuple[str, int]], seeds: int, given: Sequence[Path], compare: bool, parallel: int
) -> Trained:
    """The base of each seed, the arms, and with `compare` as much supervised training as the first arm took."""
    every = range(seeds)
    with ThreadPoolExecutor(parallel) as threads:
        base = list(given) or list(threads.map(lambda seed: train(supervised_base(seed, storage)), every))
        base = [model.resolve() for model in base]
        runs = {task: configured(*task, storage, base[task[1]]) for task in tasks}
        for run in (*list(runs.values())[:1], supervised(0, storage, base[0], 5)):
            prepare(run, build_plan(run), _no_ray)  # what all share, before two want to make it
        models = dict(zip(tasks, threads.map(train, runs.values()), strict=True))
        go_on: list[RunConfig] = []
        if compare:
            first = float(np.mean([spent(runs[tasks[0][0], seed]) for seed in every]))
            steps = steps_for(first, storage, base[0])
            go_on = [supervised(seed, storage, base[seed], steps) for seed in every]
            models |= {("supervised", seed): model for seed, model in enumerate(threads.map(train, go_on))}
    return Trained(runs, {**{("before", seed): base[seed] for seed in every}, **models}, go_on)


def measure_all(trained: Trained, storage: Path, parallel: int) -> dict[tuple[str, int], Any]:
    """The questions of each model."""
    files = {
        key: storage / "measured" / f"{model.name}-{CONVERSATIONS}x{TURNS}.json"
        for key, model in trained.models.items()
    }
    with ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn")) as processes:
        missing = [(trained.models[key], file) for key, file in files.items() if not file.exists()]
        for done in [processes.submit(measure, *one) for one in missing]:
            done.result()
    return {key: json.loads(file.read_text()) for key, file in files.items()}


def tell(
    trained: Trained, rows: Mapping[tuple[str, int], Any], arms: Sequence[str], supervised: bool
) -> dict[str, Any]:
    """Print all tables."""
    order = ["before", *arms, *(["supervised"] if supervised else [])]
    results = {arm: [summary(rows[arm, seed]) for seed in trained.seeds(arm)] for arm in order}
    gains = {arm: [summary(rows[arm, seed], rows["before", seed]) for seed in trained.seeds(arm)] for arm in order[1:]}
    names = ["reward", "greedy_reward", *(f"recall at {distance}" for distance in DISTANCES)]
    click.echo(f"{CONVERSATIONS} held-out conversations of {TURNS} turns, free-running; recall in %, 95 % intervals\n")
    click.echo(f"{table(results, names)}\n\nDifference from before\n\n{table(gains, names)}\n")
    floors = {arm: [lowest(trained.runs[arm, seed]) for seed in trained.seeds(arm)] for arm in arms}
    click.echo("Lowest mean reward of five updates over that of a stage's first five")
    for arm, stages in floors.items():
        click.echo(f"{arm}: " + "; ".join(", ".join(f"{k} {v:.2f}" for k, v in one.items()) for one in stages))
    click.echo("\nSeconds of CPU")
    for arm in arms:
        click.echo(f"{arm}: " + ", ".join(f"{spent(trained.runs[arm, seed]):.0f}" for seed in trained.seeds(arm)))
    if supervised:
        click.echo("supervised: " + ", ".join(f"{spent(one):.0f}" for one in trained.supervised))
    return {"results": results, "gains": gains, "floors": floors}


@click.command()
@click.option("--storage", type=click.Path(path_type=Path), default=Path("runs/mrl_benchmark"), show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--others", type=click.IntRange(1), default=3, show_default=True, help="seeds of all arms but the first")
@click.option("--parallel", type=click.IntRange(1), default=2, show_default=True, help="processes at a time")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="only these; may be given again")
@click.option("--supervised/--no-supervised", "compare", default=True, help="also go on with memory-aware training")
@click.option("--model", "given", multiple=True, type=click.Path(path_type=Path), help="start from these, one a seed")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write the results here")
@click.option("--curves", type=click.Path(path_type=Path), help="also draw the updates' rewards here")
def main(
    storage: Path,
    seeds: int,
    others: int,
    parallel: int,
    arms: tuple[str, ...],
    compare: bool,
    given: tuple[Path, ...],
    json_file: Path | None,
    curves: Path | None,
) -> None:
    """Train and measure, and print reward and recall before and after."""
    storage = storage.resolve()
    (storage / "measured").mkdir(parents=True, exist_ok=True)
    if given and len(given) != seeds:
        raise click.UsageError(f"{len(given)} --model for {seeds} --seeds: give one for each")
    chosen = list(arms or ARMS)
    tasks = [(arm, seed) for arm in chosen for seed in range(seeds if arm == chosen[0] else min(others, seeds))]
    trained = train_all(storage, tasks, seeds, given, compare, parallel)
    found = tell(trained, measure_all(trained, storage, parallel), chosen, compare)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))
    if curves is not None:
        draw({arm: [curve(trained.runs[arm, seed]) for seed in trained.seeds(arm)] for arm in chosen}, curves)


def _no_ray() -> None:
    """Everything here runs without."""


if __name__ == "__main__":
    main()

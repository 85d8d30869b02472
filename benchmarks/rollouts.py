"""What holding conversations costs: many at a time against one at a time, and where the time of an update goes.

    python benchmarks/rollouts.py --model runs/quickstart                  # 64 conversations of 8 follow-ups
    python benchmarks/rollouts.py --model DIR --history DIR/history.jsonl  # shares of a stage that was trained

Story-world conversations, free-running, sampled at temperature 1. Exits with 1 when a conversation that is held alone
says something else than in the batch.
"""

import json
import statistics
import sys
from pathlib import Path

import click
from timing import Machine, interleaved, machine_options, ratio, report, spread

from rxt_platform.data.batches import derive_seed
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.model.files import find_model, load_model
from rxt_platform.rl.episodes import Episode, Rollout
from rxt_platform.rl.rollouts import RolloutOptions, hold_episodes

PARTS = {
    "generation": ("generation",),
    "reward": ("reward",),
    "update": ("forward", "backward", "optimizer"),
    "everything else": ("data", "collection", "checkpoint"),
}


def episodes(model: Path, count: int, turns: int) -> list[Episode]:
    """Held-out conversations of the story world."""
    loaded, tokenizer = load_model(model)
    talks = StoryWorld(1).conversations("validation", count, turns)
    encoded = RowEncoder(tokenizer, loaded.config.max_length, "fail").encode(talks)
    examples = [one[0] for one in encoded if isinstance(one, list)]
    return [
        Episode.of(talk, example, derive_seed("rollouts", row), row, turns - 1)
        for row, (talk, example) in enumerate(zip(talks, examples, strict=True))
    ]


def tokens(rollouts: list[Rollout]) -> int:
    """That were sampled."""
    return sum(len(answer) for one in rollouts for answers in one.answers for answer in answers)


def shares(history: Path) -> dict[str, float]:
    """Of a training step's time, by part, over a stage's whole history."""
    rows = [json.loads(line) for line in history.open()]
    whole = sum(row["step_seconds"] for row in rows)
    found = {
        name: sum(row.get(f"{part}_seconds", 0.0) for row in rows for part in parts) / whole
        for name, parts in PARTS.items()
    }
    found["everything else"] = 1 - sum(found[name] for name in list(PARTS)[:-1])
    return found


@click.command()
@machine_options
@click.option("--model", required=True, help="a model directory, or the folder of a run")
@click.option("--conversations", default=64, show_default=True)
@click.option("--follow-ups", default=8, show_default=True)
@click.option("--alone", default=4, show_default=True, help="conversations that are held one at a time")
@click.option("--repeats", default=3, show_default=True)
@click.option("--history", type=click.Path(path_type=Path), help="history.jsonl of an MRL stage")
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    model: str,
    conversations: int,
    follow_ups: int,
    alone: int,
    repeats: int,
    history: Path | None,
) -> None:
    """Measure rollouts, and say where a stage's time went."""
    directory = find_model(model)
    loaded, _ = load_model(directory, machine.dtype)
    loaded.to(machine.device)
    held = episodes(directory, conversations, follow_ups + 1)
    options, eight = RolloutOptions(), RolloutOptions(answers=8)
    together = hold_episodes(loaded, held, options)
    different = sum(hold_episodes(loaded, [one], options) != [together[row]] for row, one in enumerate(held[:alone]))
    arms = {
        "together": lambda: hold_episodes(loaded, held, options),
        "one at a time": lambda: [hold_episodes(loaded, [one], options) for one in held[:alone]],
        "together, 8 answers each": lambda: hold_episodes(loaded, held, eight),
    }
    said = {
        "together": tokens(together),
        "one at a time": tokens(together[:alone]),
        "together, 8 answers each": tokens(hold_episodes(loaded, held, eight)),
    }
    number = {"together": conversations, "one at a time": alone, "together, 8 answers each": conversations}
    seconds = interleaved(arms, repeats, machine)
    results = {}
    for name, times in seconds.items():
        middle = statistics.median(times)
        results[name] = {
            "seconds": spread(times),
            "episodes_per_second": number[name] / middle,
            "tokens_per_second": said[name] / middle,
        }
        print(f"{name:<26}{number[name] / middle:>10.2f} episodes/s{said[name] / middle:>10.0f} tokens/s")
    each = [time * conversations / alone for time in seconds["one at a time"]]
    results["speed_up"] = ratio(each, seconds["together"])
    print(f"together is {results['speed_up']:.1f} times as fast")
    if history is not None:
        results["shares"] = shares(history)
        print("an update: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in results["shares"].items()))
    settings = {"seed": seed, "conversations": conversations, "follow_ups": follow_ups, "repeats": repeats}
    report("rollouts", machine, settings, results, json_file)
    if different:
        print(f"{different} of {alone} conversations differ when they are held alone")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""What a conversation costs, turn by turn: a Reactive Transformer against a stateless model of the same size.

    python benchmarks/latency_by_turn.py --json turns.json --plot turns.png

reactive   answers over its memory, then writes query and answer into it
rereading  `matched_baseline`: reads the whole history anew at every turn (a stateless server), caches while it answers
keeping    the same baseline with its KV cache kept between turns: reads only the last answer's last token and the query

Prompt latency is the time from the prompt to the first token: for the first two arms, until `generate` yields it. Then
tokens/s of the rest of the answer, and the time of the memory update, which a user does not wait for unless the next
prompt is there already. The arms alternate turn by turn; figures are medians over whole conversations. Random weights,
greedy, no answer ends early (see random_models.py).

With several --execution, `reactive` and `rereading` run with each. Other than eager ones have a cache as long as the
model's window: for the baseline, the longest history. `keeping` is always eager. In float32, `keeping` must give the
tokens of `rereading`; the script exits with 1 otherwise (a bf16 rounding flips the choice of an expert now and then).
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from random_models import random_model, random_queries
from timing import Machine, machine_options, ratio, report, spread
from turn_arms import Arm, Keeping, Reactive, Rereading, Rows, Turn
from turn_plot import plot

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.parameters import count
from rxt_platform.model.stepper import Execution, Stepper
from rxt_platform.model.transformer import ReactiveTransformer


def converse(arms: dict[str, Arm], queries: Sequence[Rows]) -> dict[str, list[Turn]]:
    """One whole conversation with every arm, alternating turn by turn."""
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    for query in queries:
        for name, arm in arms.items():
            turns[name].append(arm.turn(query))
    return turns


def summarise(conversations: list[list[Turn]], batch: int, new: int) -> dict[str, Any]:
    """Medians over repeated conversations of one arm: of each turn, and of the whole."""
    rows: list[dict[str, float]] = []
    for number, repeats in enumerate(zip(*conversations, strict=True), start=1):
        row: dict[str, float] = {
            "turn": number,
            "prompt_ms": 1e3 * statistics.median(turn.prompt_seconds for turn in repeats),
            "tokens_per_second": statistics.median(batch * (new - 1) / turn.rest_seconds for turn in repeats),
            "processed": repeats[0].processed,
            "kept_bytes": repeats[0].kept_bytes,
            "answering_bytes": repeats[0].answering_bytes,
        }
        if repeats[0].update_seconds:
            row["update_ms"] = 1e3 * statistics.median(turn.update_seconds for turn in repeats)
        rows.append(row)
    first, last = ([turns[end] for turns in conversations] for end in (0, -1))
    return {
        "turns": rows,
        "last_to_first_prompt": ratio([t.prompt_seconds for t in last], [t.prompt_seconds for t in first]),
        "last_to_first_speed": ratio([t.rest_seconds for t in first], [t.rest_seconds for t in last]),
        "total_seconds": spread([sum(turn.seconds for turn in turns) for turns in conversations]),
        "processed": sum(turn.processed for turn in conversations[0]),
    }


def show(arms: dict[str, dict[str, Any]]) -> None:
    """Print turns 1, 2, 4, ... and the whole conversation."""
    for name, arm in arms.items():
        print(f"\n{name}")
        print(f"{'turn':>6}{'prompt ms':>12}{'tokens/s':>12}{'update ms':>12}{'kept KiB':>12}{'answering KiB':>16}")
        for turn in arm["turns"]:
            if turn["turn"] & (turn["turn"] - 1) == 0:
                update = f"{turn['update_ms']:.2f}" if "update_ms" in turn else "-"
                print(
                    f"{turn['turn']:>6}{turn['prompt_ms']:>12.2f}{turn['tokens_per_second']:>12,.0f}{update:>12}"
                    f"{turn['kept_bytes'] / 1024:>12,.1f}{turn['answering_bytes'] / 1024:>16,.1f}"
                )
    print(f"\n{'last turn / first':<26}{'prompt':>10}{'tokens/s':>10}{'total s':>10}{'tokens processed':>18}")
    for name, arm in arms.items():
        total = arm["total_seconds"]["median"]
        ratios = f"{arm['last_to_first_prompt']:>10.2f}{arm['last_to_first_speed']:>10.2f}"
        print(f"{name:<26}{ratios}{total:>10.2f}{arm['processed']:>18,}")


@click.command()
@machine_options
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-nano", show_default=True)
@click.option("--turns", default=32, show_default=True)
@click.option("--query-tokens", type=click.IntRange(4), default=32, show_default=True, help="[BOS][Q]...[A] together")
@click.option("--answer-tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--batch", default=1, show_default=True, help="conversations held at once")
@click.option(
    "--execution",
    "executions",
    type=click.Choice(["eager", "compile", "cuda_graph"]),
    multiple=True,
    default=("eager",),
    show_default=True,
)
@click.option("--repeats", default=5, show_default=True, help="whole conversations")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="PNG of the three quantities by turn")
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    preset: str,
    turns: int,
    query_tokens: int,
    answer_tokens: int,
    batch: int,
    executions: tuple[Execution, ...],
    repeats: int,
    plot_file: Path | None,
) -> None:
    """Time a conversation turn by turn, with a memory and without."""
    config = load_preset(preset)
    if query_tokens + answer_tokens > config.max_length:
        raise click.UsageError(f"query and answer must fit in the model's window of {config.max_length} tokens")
    model = random_model(ReactiveTransformer(config)).to(machine.device, machine.dtype)
    wide = matched_baseline(config, turns * (query_tokens + answer_tokens))
    stateless = random_model(StatelessTransformer(wide)).to(machine.device, machine.dtype)
    steppers = {execution: (Stepper(model, execution), Stepper(stateless, execution)) for execution in executions}

    def arms() -> dict[str, Arm]:
        made: dict[str, Arm] = {}
        for execution, (own, other) in steppers.items():
            made[f"reactive, {execution}"] = Reactive(machine, model, own, batch, answer_tokens)
            made[f"rereading, {execution}"] = Rereading(machine, stateless, other, batch, answer_tokens)
        return made | {"keeping, eager": Keeping(machine, stateless, batch, answer_tokens)}

    lengths = [query_tokens] * batch
    queries = [random_queries(lengths, config.vocab_size, seed + 1000 * turn) for turn in range(turns)]
    converse(arms(), queries[:2])  # warm-up
    conversations = [converse(arms(), queries) for _ in range(repeats)]
    found = {}
    for name in conversations[0]:
        kind, execution = name.split(", ")
        summary = summarise([one[name] for one in conversations], batch, answer_tokens)
        found[name] = {"kind": kind, "execution": execution, **summary}
    print(f"{preset}, {batch} conversation(s) of {turns} turns, {query_tokens} + {answer_tokens} tokens a turn")
    show(found)
    other = f"rereading, {executions[0]}"
    pairs = [pair for one in conversations for pair in zip(one["keeping, eager"], one[other], strict=True)]
    same = sum(kept.answers == reread.answers for kept, reread in pairs) / len(pairs)
    print(f"\nturns in which keeping gave the tokens of {other}: {same:.0%}")
    settings = {
        "preset": preset,
        "turns": turns,
        "query_tokens": query_tokens,
        "answer_tokens": answer_tokens,
        "batch": batch,
        "repeats": repeats,
        "seed": seed,
        "parameters": {
            "reactive": count(model).parameters - count(model.mlm_head).parameters,
            "stateless": count(stateless).parameters,
        },
    }
    results = {"turns_with_same_tokens": same, "arms": found}
    measured = report("latency_by_turn", machine, settings, results, json_file)
    if plot_file is not None:
        plot(measured, plot_file)
    if machine.dtype == torch.float32 and same < 1:
        sys.exit(1)


if __name__ == "__main__":
    main()

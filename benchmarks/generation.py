"""Tokens per second of generation: a batch at once, one conversation at a time, and without a cache.

    python benchmarks/generation.py --execution eager --execution compile

batch      `answer_batch` on all prompts, greedy and sampled (temperature 0.8, top_p 0.9), for each --execution
one by one the first --rows prompts, each alone: what a server without batching does
no cache   all prompts at once, every token from the whole sequence anew (`decode_states`; only the last state of each
           row goes to the head)

Prompts of 8 to 48 tokens, random weights, no answer ends early (see random_models.py).

Before anything is timed, greedy answers are compared token by token; the script exits with 1 when any differ. In
float32, because a bf16 rounding flips the choice of an expert now and then: the batch, rows alone, no cache, compiled
steps. In the timed precision: a CUDA graph, and eager steps on a cache of the same length, which it replays.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from random_models import random_model, random_queries
from timing import Machine, interleaved, machine_options, ratio, report, spread
from torch import Tensor

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.model.decoder import Cache
from rxt_platform.model.generation import answer_batch
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.stepper import Execution, Stepper
from rxt_platform.model.transformer import ReactiveTransformer

Answers = list[list[int]]


class WindowStepper(Stepper):
    """Eager steps on a cache as long as the model's window, as a CUDA graph has it."""

    def start(self, memory: Tensor | None, batch: int, length: int) -> Cache:
        """See `Stepper`."""
        return super().start(memory, batch, self.model.config.max_length)

    def next(
        self, tokens: Tensor, positions: Tensor, draws: Tensor, cache: Cache, options: SamplingOptions, length: int
    ) -> Tensor:
        """See `Stepper`."""
        return super().next(tokens, positions, draws, cache, options, cache.length)


def one_by_one(
    model: ReactiveTransformer,
    prompts: Sequence[Sequence[int]],
    memory: Tensor,
    options: SamplingOptions,
    stepper: Stepper | None = None,
) -> Answers:
    """Each prompt answered alone."""
    return [
        answer_batch(model, [prompt], memory[:, row : row + 1], options, stepper=stepper)[0]
        for row, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def without_cache(model: ReactiveTransformer, prompts: Sequence[Sequence[int]], memory: Tensor, new: int) -> Answers:
    """Greedy answers of `new` tokens, the whole sequences computed anew for each token."""
    device, rows = memory.device, torch.arange(len(prompts), device=memory.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()) + new, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    starts = lengths.clone()
    for width in range(int(lengths.max()), ids.shape[1]):
        mask = torch.arange(width, device=device) < lengths[:, None]
        states = model.decode_states(ids[:, :width], mask, memory).states
        ids[rows, lengths] = model.head(states[rows, lengths - 1]).argmax(dim=-1)
        lengths += 1
    return [row[start : start + new] for row, start in zip(ids.tolist(), starts.tolist(), strict=True)]


def check(
    model: ReactiveTransformer, prompts: list[list[int]], rows: int, new: int, executions: Sequence[str]
) -> dict[str, bool]:
    """Are greedy answers the same whichever way they are computed? In the precision that `model` has."""
    options = SamplingOptions(max_new_tokens=new)
    memory = model.initial_memory(torch.arange(len(prompts)))
    if executions == ("cuda_graph",):
        expected = answer_batch(model, prompts, memory, options, stepper=WindowStepper(model))
        graph = Stepper(model, "cuda_graph")
        return {"cuda_graph": expected == answer_batch(model, prompts, memory, options, stepper=graph)}
    batch = answer_batch(model, prompts, memory, options)
    same = {
        "one by one": batch[:rows] == one_by_one(model, prompts[:rows], memory, options),
        "no cache": batch == without_cache(model, prompts, memory, new),
    }
    if "compile" in executions:
        same["compile"] = batch == answer_batch(model, prompts, memory, options, stepper=Stepper(model, "compile"))
    return same


@click.command()
@machine_options
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-nano", show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--new", default=64, show_default=True, help="tokens of each answer")
@click.option("--rows", default=8, show_default=True, help="conversations measured one by one")
@click.option(
    "--execution",
    "executions",
    type=click.Choice(["eager", "compile", "cuda_graph"]),
    multiple=True,
    default=("eager",),
    show_default=True,
)
@click.option("--repeats", default=3, show_default=True)
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    preset: str,
    batch: int,
    new: int,
    rows: int,
    executions: tuple[Execution, ...],
    repeats: int,
) -> None:
    """Time generation of a batch, one by one and without a cache."""
    config = load_preset(preset)
    model = random_model(ReactiveTransformer(config)).to(machine.device)
    lengths = torch.randint(8, 49, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = random_queries(lengths, config.vocab_size, seed)
    rows = min(rows, batch)

    same = check(model, prompts, rows, new, executions)
    model.to(machine.dtype)
    if "cuda_graph" in executions:
        same |= check(model, prompts, rows, new, ("cuda_graph",))
    for name, equal in same.items():
        print(f"{name}: {'the same tokens' if equal else 'OTHER TOKENS'} as the batch")
    if not all(same.values()):
        sys.exit(1)

    memory = model.initial_memory(torch.arange(batch))
    greedy = SamplingOptions(max_new_tokens=new)
    sampled = SamplingOptions(temperature=0.8, top_p=0.9, max_new_tokens=new)
    arms: dict[str, Callable[[], Answers]] = {}
    for execution in executions:
        stepper = Stepper(model, execution)
        arms |= {
            f"batch, {execution}": partial(answer_batch, model, prompts, memory, greedy, stepper=stepper),
            f"batch sampled, {execution}": partial(answer_batch, model, prompts, memory, sampled, stepper=stepper),
            f"one by one, {execution}": partial(one_by_one, model, prompts[:rows], memory, greedy, stepper),
        }
    arms["no cache"] = lambda: without_cache(model, prompts, memory, new)

    seconds = interleaved(arms, repeats, machine)
    first = f"batch, {executions[0]}"
    results = {}
    print(f"\n{preset}, {batch} conversations ({rows} of them one by one), {new} new tokens each")
    print(f"{'arm':<26}{'tokens/s':>12}{'low':>12}{'high':>12}{first + ' / arm':>24}")
    for name, values in seconds.items():
        tokens = new * (rows if name.startswith("one") else batch)
        speed = [tokens / value for value in values]
        results[name] = {**spread(speed), "speed_up": ratio([new * batch / value for value in seconds[first]], speed)}
        median, low, high, faster = results[name].values()
        print(f"{name:<26}{median:>12,.0f}{low:>12,.0f}{high:>12,.0f}{faster:>24.2f}")
    settings = {"preset": preset, "batch": batch, "new": new, "rows_one_by_one": rows, "repeats": repeats, "seed": seed}
    report("generation", machine, settings, {"same_tokens": same, "tokens_per_second": results}, json_file)


if __name__ == "__main__":
    main()

"""Where the time of a joint pre-training step goes on a CPU, and what was done about the largest costs.

    python benchmarks/step_costs.py [--batch 16]

First the shares by kind of operation, from torch.profiler; then the step as it is against the step with one thing done
as it was before, arms alternating: `ratio` is how much longer the old way takes.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from joint_step import joint_stage, training_step
from timing import Machine, interleaved, machine_options, ratio, report, spread
from torch import Tensor

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.model import attention, feedforward
from rxt_platform.model.heads import MaskedLanguageHead
from rxt_platform.model.transformer import ReactiveTransformer

KINDS = {
    "weights (matrix products)": ("aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "softmax over the vocabulary": ("aten::_log_softmax", "aten::nll_loss", "aten::argmax"),
    "element by element": (
        "aten::mul",
        "aten::add",
        "aten::div",
        "aten::pow",
        "aten::silu",
        "aten::gelu",
        "aten::rsqrt",
    ),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index", "aten::scatter", "aten::_index_put"),
    "sums": ("aten::sum", "aten::mean"),
    "optimizer": ("aten::_fused_adamw_",),
}


def kind_of(name: str) -> str:
    """Of an operation."""
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "other")


def shares(step: Callable[[], float]) -> dict[str, float]:
    """Share of the step's own CPU time of each kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    sums: Counter[str] = Counter()
    for event in profiler.key_averages():
        sums[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: value / sum(sums.values()) for kind, value in sums.most_common()}


def rotate_by_parts(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on the even and the odd channels, as until 2026-11-23."""
    cos, sin = rotary
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def experts_one_by_one(tokens: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """The experts' products in a loop."""
    ends = [0, *offs.tolist()]
    parts = [tokens[start:end] @ weights[i] for i, (start, end) in enumerate(itertools.pairwise(ends))]
    return torch.cat(parts)


@contextlib.contextmanager
def instead(place: object, name: str, value: object) -> Iterator[None]:
    """Put something else in a place, for the block."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@click.command()
@machine_options
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-nano", show_default=True)
@click.option("--batch", "rows", default=16, show_default=True)
@click.option("--repeats", default=8, show_default=True)
def main(machine: Machine, seed: int, json_file: Path | None, preset: str, rows: int, repeats: int) -> None:
    """Shares, then ratios."""
    model = ReactiveTransformer(load_preset(preset)).train()
    stage = joint_stage(model, rows, seed)
    batch = stage.sampler.global_batch(0)
    step = training_step(model, stage, batch)
    step()
    found = shares(step)
    print("\n".join(f"{kind:<28}{share:>7.1%}" for kind, share in found.items()))

    head_forward = MaskedLanguageHead.forward
    states: list[Tensor] = []

    def every_token(self: MaskedLanguageHead, some: Tensor, labels: Tensor | None = None) -> object:
        """The masked head on all positions, of which the masked ones count."""
        logits = head_forward(self, states[-1].flatten(0, 1))
        hidden = batch.hidden[:, 0].flatten()
        chosen = logits[hidden]
        return F.cross_entropy(chosen, labels, reduction="sum"), (chosen.argmax(-1) == labels).sum()

    encode = model.encode

    def remembered(*inputs: Tensor) -> Tensor:
        encoded = encode(*inputs)
        states.append(encoded[-1])
        return encoded

    def old(*changes: tuple[object, str, object]) -> Callable[[], float]:
        def run() -> float:
            with contextlib.ExitStack() as stack:
                for change in changes:
                    stack.enter_context(instead(*change))
                return step()

        return run

    arms = {
        "as it is": step,
        "rotary positions in parts": old((attention, "rotate", rotate_by_parts)),
        "experts in a loop": old((feedforward, "grouped_mm", experts_one_by_one)),
        "masked head on all tokens": old((MaskedLanguageHead, "forward", every_token), (model, "encode", remembered)),
    }
    seconds = interleaved(arms, repeats, machine)
    print(f"\n{'arm':<28}{'ms':>10}{'ratio':>8}")
    results = {}
    for arm, values in seconds.items():
        results[arm] = {"ms": spread([1e3 * value for value in values]), "ratio": ratio(values, seconds["as it is"])}
        print(f"{arm:<28}{results[arm]['ms']['median']:>10.0f}{results[arm]['ratio']:>8.3f}")
    settings = {"preset": preset, "batch": rows, "repeats": repeats, "seed": seed}
    report("step_costs", machine, settings, {"shares": found, "arms": results}, json_file)


if __name__ == "__main__":
    main()

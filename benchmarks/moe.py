"""How fast is `MixtureOfExperts`? One forward and backward, against a loop over experts and a dense SwiGLU.

    python benchmarks/moe.py                                                          # alpha-nano's mixture
    python benchmarks/moe.py --experts 28 --per-token 4 --hidden 256 --inner 512      # alpha-synthetic's

ours   `MixtureOfExperts.forward` as training runs it, with the balance loss and the experts' usage
loop   the same parameters: for each expert a mask, two matrix products and index_add; no statistics
dense  one SwiGLU of the same active size, inner width k * inner, for all tokens

Before anything is timed, output and all gradients of `ours` and `loop` are compared; exits with 1 when they differ.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from timing import Machine, interleaved, machine_options, ratio, report, spread
from torch import Tensor, nn

from rxt_platform.config.model import ExpertsConfig
from rxt_platform.model.feedforward import MixtureOfExperts, RealTokens, SwiGLU

# Norm of the difference / norm: sums in another order. In bf16 on the CPU, the gradient of `input_bias[expert]` is
# summed token by token in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}


def loop_over_experts(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """The mixture's output for tokens [N, D], expert by expert."""
    assert mixture.input_bias is not None  # the default, which `main` builds
    assert mixture.output_bias is not None
    weights, chosen = mixture.router(x).float().softmax(dim=-1).topk(mixture.config.per_token, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
    output = torch.zeros_like(x)
    for expert in range(mixture.config.number):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        hidden = x[tokens] @ mixture.input_weight[expert] + mixture.input_bias[expert]
        linear, gate = hidden.chunk(2, dim=-1)
        result = (linear * F.silu(gate)) @ mixture.output_weight[expert] + mixture.output_bias[expert]
        output.index_add_(0, tokens, result * weights[tokens, places, None])
    return output


def largest_difference(mixture: MixtureOfExperts, x: Tensor, real: RealTokens, gradient: Tensor) -> float:
    """Of output and every gradient between `ours` and `loop`, as norm of the difference / norm."""
    inputs = [x, *mixture.parameters()]
    ours, loop = mixture(x, real).output, loop_over_experts(mixture, x[0])[None]
    pairs = [
        (ours, loop),
        *zip(
            torch.autograd.grad(ours, inputs, gradient),
            torch.autograd.grad(loop, inputs, gradient),
            strict=True,
        ),
    ]
    return max(float((a - b).detach().float().norm() / b.detach().float().norm()) for a, b in pairs)


def training_step(module: nn.Module, forward: Callable[[], Tensor], gradient: Tensor) -> Callable[[], None]:
    """One forward and backward from empty gradients."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        forward().backward(gradient)

    return step


@click.command()
@machine_options
@click.option("--tokens", default=8192, show_default=True)
@click.option("--experts", default=12, show_default=True)
@click.option("--per-token", default=2, show_default=True)
@click.option("--hidden", default=128, show_default=True)
@click.option("--inner", default=256, show_default=True)
@click.option("--repeats", default=15, show_default=True)
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    tokens: int,
    experts: int,
    per_token: int,
    hidden: int,
    inner: int,
    repeats: int,
) -> None:
    """Time one forward and backward of the mixture of experts against a loop over experts and a dense SwiGLU."""
    config = ExpertsConfig(number=experts, per_token=per_token, size=inner)
    mixture = MixtureOfExperts(hidden, config).to(machine.device, machine.dtype)
    dense = SwiGLU(hidden, per_token * inner).to(machine.device, machine.dtype)
    x = torch.randn(1, tokens, hidden, device=machine.device, dtype=machine.dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    real = RealTokens.of(torch.ones(1, tokens, dtype=torch.bool, device=machine.device))

    difference, allowed = largest_difference(mixture, x, real, gradient), TOLERANCE[machine.dtype]
    print(f"largest relative difference between ours and loop: {difference:.1e} (allowed {allowed:.0e})")
    if not difference <= allowed:
        sys.exit(1)

    arms = {
        "ours": training_step(mixture, lambda: mixture(x, real).output, gradient),
        "loop": training_step(mixture, lambda: loop_over_experts(mixture, x[0])[None], gradient),
        "dense": training_step(dense, lambda: dense(x), gradient),
    }
    milliseconds = {
        name: [1e3 * value for value in seconds]
        for name, seconds in interleaved(arms, repeats, machine, warmup=3).items()
    }
    print(f"\n{tokens} tokens, {experts} experts, top-{per_token}, {hidden} -> {inner}; forward + backward")
    print(f"{'arm':<8}{'ms':>10}{'low':>10}{'high':>10}{'ours/arm':>10}")
    for name, values in milliseconds.items():
        median, low, high = spread(values).values()
        print(f"{name:<8}{median:>10.2f}{low:>10.2f}{high:>10.2f}{ratio(milliseconds['ours'], values):>10.2f}")
    report(
        "moe",
        machine,
        {"seed": seed, "tokens": tokens, **config.model_dump(), "hidden": hidden, "repeats": repeats},
        {
            "largest_difference": difference,
            "milliseconds": {name: spread(values) for name, values in milliseconds.items()},
            "ours_to_loop": ratio(milliseconds["ours"], milliseconds["loop"]),
            "ours_to_dense": ratio(milliseconds["ours"], milliseconds["dense"]),
        },
        json_file,
    )


if __name__ == "__main__":
    main()

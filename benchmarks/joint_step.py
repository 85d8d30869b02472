"""One step of joint pre-training: tokens/s and the share of the machine's peak that the model's arithmetic reaches.

    python benchmarks/joint_step.py --batch 4 --compile

A step is `JointStage.loss` on a batch of full windows of random tokens, backward, and fused AdamW; no DeepSpeed, no
gradient clipping, the batch lies on the device. fp32: weights, gradients and optimizer in fp32. bf16: weights and
gradients in bf16, AdamW on fp32 masters that are copied back, as DeepSpeed does it; not autocast, which the package
doesn't use and which would run the experts in fp32 (it doesn't know grouped_mm). `--compile` adds a second model with
the same weights after `compile_layers()`; steps alternate. `empty memory` is the part of a step that draws initial
memories for the decoder-only rows, on the host.

FLOPs of a step are those of the engine's own utilisation, `JointStage.flops`: matrix products of forward and backward,
causal self-attention at half the window, memory cross-attention at all positions that it is given, heads at the tokens
whose loss is computed. The peak is --peak-tflops; without it the data sheet's 989 (dense bf16) on an H100 or H200, and
elsewhere the best of the matrix products that are timed between the steps.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from timing import Machine, gemm_flops, interleaved, machine_options, ratio, report, spread
from torch import Tensor

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.config.stage_base import OptimizerConfig
from rxt_platform.config.stages import JointPretrainingConfig
from rxt_platform.data.batches import Batch
from rxt_platform.data.examples import Example
from rxt_platform.data.sampler import BatchSampler, Sampling
from rxt_platform.data.tokenizer import BOS, SPECIAL_TOKENS
from rxt_platform.model import heads
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.layers import compile_layers
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.joint import JointStage
from rxt_platform.training.measures import DATA_SHEET_TFLOPS

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of compiled against eager, relative


def joint_stage(
    model: ReactiveTransformer, rows: int, seed: int, steps: int = 1, micro: int | None = None
) -> JointStage:
    """The stage with its default losses, on random texts that fill the window: `steps` steps of `rows` texts."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    shape = (steps * rows, config.max_length - 1)
    words = torch.randint(len(SPECIAL_TOKENS), config.vocab_size, shape, generator=generator)
    examples = [Example(((BOS, *text),), (1,)) for text in words.tolist()]
    settings = JointPretrainingConfig(
        kind="joint_pretraining",
        epochs=1,
        global_batch_size=rows,
        micro_batch_size=micro,
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    sampling = Sampling(rows, seed, mask_probability=settings.loss.mask_probability)
    return JointStage(settings, BatchSampler(examples, sampling))


def training_step(model: ReactiveTransformer, stage: JointStage, batch: Batch) -> Callable[[], float]:
    """Forward, backward and update; gives the loss."""
    (phase,) = stage.phases()
    trained: list[Tensor] = [weight for name, weight in model.named_parameters() if component_of(name) in phase.trains]
    in_bf16 = trained[0].dtype == torch.bfloat16
    masters = [weight.detach().float() for weight in trained] if in_bf16 else trained
    optimizer = torch.optim.AdamW(masters, lr=stage.config.optimizer.learning_rate, fused=True)

    def step() -> float:
        report = stage.loss(model, batch, phase)
        report.loss.backward()
        if in_bf16:
            for master, weight in zip(masters, trained, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        optimizer.step()
        if in_bf16:
            with torch.no_grad():
                torch._foreach_copy_(trained, masters)
        model.zero_grad(set_to_none=True)
        return float(report.loss.detach())

    return step


@click.command()
@machine_options
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-nano", show_default=True)
@click.option("--batch", "rows", default=32, show_default=True, help="texts of a full window")
@click.option("--compile", "compiled", is_flag=True, help="also measure compiled layers")
@click.option("--peak-tflops", type=click.FloatRange(min=0, min_open=True), help="of the machine, in --dtype")
@click.option("--repeats", default=10, show_default=True)
def main(
    machine: Machine,
    seed: int,
    json_file: Path | None,
    preset: str,
    rows: int,
    compiled: bool,
    peak_tflops: float | None,
    repeats: int,
) -> None:
    """Time steps of joint pre-training."""
    model = ReactiveTransformer(load_preset(preset)).to(machine.device, machine.dtype).train()
    whole_logits = not hasattr(F, "linear_cross_entropy")
    if whole_logits:  # torch before 2.13 can't compute the loss of a large vocabulary in parts
        heads._LOGITS_AT_ONCE = sys.maxsize
    stage = joint_stage(model, rows, seed)
    batch = stage.sampler.global_batch(0).to(machine.device)
    models = {"eager": model}
    if compiled:
        models["compiled"] = copy.deepcopy(model)
        compile_layers(models["compiled"])
    steps = {name: training_step(each, stage, batch) for name, each in models.items()}

    losses = {name: step() for name, step in steps.items()}
    print("loss of the first step: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    if not all(abs(loss / losses["eager"] - 1) <= LOSS_TOLERANCE[machine.dtype] for loss in losses.values()):
        sys.exit(1)

    product, product_flops = gemm_flops(machine)
    parts = {"empty memory": lambda: model.initial_memory(batch.seeds), "matrix product": product}
    seconds = interleaved({**steps, **parts}, repeats, machine, warmup=2)
    measured = product_flops / min(seconds["matrix product"]) / 1e12
    name = str(machine.environment()["device"])
    sheet = next((peak for chip, peak in DATA_SHEET_TFLOPS.items() if chip in name), None)
    if machine.dtype != torch.bfloat16:
        sheet = None
    peak = peak_tflops or sheet or measured
    source = "given" if peak_tflops else "data sheet" if sheet else "best matrix product of this run"

    (phase,) = stage.phases()
    flops, tokens = stage.flops(ForwardFlops.of(model), batch, phase), batch.mask.numel()
    print(f"\n{preset}, {rows} x {batch.mask.shape[-1]} tokens, {flops / 1e9:,.1f} GFLOPs a step; ", end="")
    print(f"peak {peak:,.3g} TFLOP/s ({source}), matrix product {measured:,.3g} TFLOP/s")
    print(f"{'arm':<16}{'ms':>10}{'low':>10}{'high':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'eager/arm':>11}")
    results = {}
    for arm in steps:
        median, low, high = spread(seconds[arm]).values()
        results[arm] = {
            "step_ms": spread([1e3 * value for value in seconds[arm]]),
            "tokens_per_second": tokens / median,
            "tflops": flops / median / 1e12,
            "utilisation": flops / median / 1e12 / peak,
            "speed_up": ratio(seconds["eager"], seconds[arm]),
        }
        *figures, faster = list(results[arm].values())[1:]
        print(f"{arm:<16}{1e3 * median:>10.1f}{1e3 * low:>10.1f}{1e3 * high:>10.1f}", end="")
        print(f"{figures[0]:>12,.0f}{figures[1]:>10.3g}{figures[2]:>8.1%}{faster:>11.2f}")
    drawing = spread([1e3 * value for value in seconds["empty memory"]])
    print(f"{'empty memory':<16}{drawing['median']:>10.1f}{drawing['low']:>10.1f}{drawing['high']:>10.1f}")
    settings = {"preset": preset, "batch": rows, "repeats": repeats, "seed": seed, "whole_logits": whole_logits}
    found = {
        "steps": results,
        "empty_memory_ms": drawing,
        "flops_per_step": flops,
        "peak": {"tflops": peak, "source": source, "matrix_product_tflops": measured},
        "first_loss": losses,
    }
    report("joint_step", machine, settings, found, json_file)


if __name__ == "__main__":
    main()

"""How long a checkpoint of a 160M-parameter model holds up training, and how long until it is safe on the disk.

    python benchmarks/checkpoint.py [--preset alpha-synthetic] [--steps 6]

Trains the decoder, encoder and heads of the preset on one worker in fp32 with ZeRO-1, a checkpoint after every second
step, once asynchronously and once not. Prints the seconds that a step was blocked, the seconds until the checkpoint was
complete (hashed, flushed, renamed), its size, the seconds of a step with and without a write under way, and the seconds
that reading it back takes, with all checks.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from timing import Machine, machine_options, report

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.config.stage_base import OptimizerConfig
from rxt_platform.config.stages import JointPretrainingConfig
from rxt_platform.config.training import CheckpointConfig, TrainingConfig
from rxt_platform.data.examples import Example
from rxt_platform.data.sampler import BatchSampler, Sampling
from rxt_platform.data.tokenizer import BOS, SPECIAL_TOKENS
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.joint import JointStage
from rxt_platform.storage.directory import verify_directory
from rxt_platform.training import checkpoints
from rxt_platform.training.distributed import start_process_group, stop_process_group
from rxt_platform.training.engine import Engine, EngineSettings, Hooks
from rxt_platform.training.watch import Watch, claim


def joint_stage(vocab: int, rows: int, length: int) -> JointStage:
    """Short random texts: the checkpoint is what is measured."""
    words = torch.randint(len(SPECIAL_TOKENS), vocab, (rows, length - 1))
    examples = [Example(((BOS, *text),), (1,)) for text in words.tolist()]
    config = JointPretrainingConfig(
        kind="joint_pretraining", epochs=1, global_batch_size=2, optimizer=OptimizerConfig(learning_rate=1e-4)
    )
    return JointStage(config, BatchSampler(examples, Sampling(2, 0, mask_probability=config.loss.mask_probability)))


def train(preset: str, steps: int, asynchronous: bool, folder: Path, machine: Machine) -> dict[str, float]:
    """One run with a checkpoint after every second step; the figures."""
    training = TrainingConfig(log_every=1, checkpoints=CheckpointConfig(every=2, keep=1, asynchronous=asynchronous))
    torch.manual_seed(0)
    model = ReactiveTransformer(load_preset(preset)).to(machine.device)
    watch = Watch(folder / "workers", 0, 1, claim(folder / "workers"))
    settings = EngineSettings(training, folder, "benchmark", {}, machine.device, watch)
    engine = Engine(model, joint_stage(model.config.vocab_size, 2 * steps, 64), settings)
    rows: list[dict[str, float]] = []
    to_disk: list[float] = []
    sizes: list[int] = []

    def heard(step: int, _: int, metrics: dict[str, float]) -> None:
        if metrics["checkpoint_seconds"]:
            rows.append({"step": step, **metrics})
        if step % 2:  # the write began after the step before; a quiet step follows
            engine.writer.wait()
            to_disk.append(engine.writer.seconds_to_disk)
            sizes.append(engine.writer.bytes_written)
        steps_seconds[step] = metrics["forward_seconds"] + metrics["backward_seconds"] + metrics["optimizer_seconds"]

    steps_seconds: dict[int, float] = {}
    engine.run([], Hooks(on_metrics=heard))
    started = time.monotonic()
    newest = checkpoints.newest_complete(engine.directory)
    assert newest is not None
    verified = time.monotonic() - started
    checkpoints.load(newest, engine.strategy.sharded, model, "benchmark", {})
    loaded = time.monotonic() - started - verified
    verify_directory(newest)
    watch.close()
    written = [value for value in to_disk[1:] if value]
    return {
        "blocked_seconds": statistics.median(row["checkpoint_seconds"] for row in rows[1:]),
        "first_blocked_seconds": rows[0]["checkpoint_seconds"],
        "to_disk_seconds": statistics.median(written),
        "bytes": float(max(sizes)),
        "step_with_write_seconds": statistics.median(s for step, s in steps_seconds.items() if step % 2 and step > 2),
        "step_without_seconds": statistics.median(s for step, s in steps_seconds.items() if step % 2 == 0 and step > 2),
        "verify_seconds": verified,
        "load_seconds": loaded,
    }


@click.command()
@machine_options
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-synthetic", show_default=True)
@click.option("--steps", type=click.IntRange(6), default=10, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where to write; a temporary folder by default")
def main(machine: Machine, seed: int, json_file: Path | None, preset: str, steps: int, folder: Path | None) -> None:
    """Measure both ways of writing."""
    start_process_group(machine.device.type == "cuda", 600)
    found = {}
    for name, asynchronous in (("asynchronous", True), ("synchronous", False)):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found[name] = train(preset, steps, asynchronous, Path(place), machine)
    stop_process_group()
    print(json.dumps(found, indent=1))
    report("checkpoint", machine, {"preset": preset, "steps": steps, "seed": seed}, found, json_file)
    sys.stdout.flush()


if __name__ == "__main__":
    main()

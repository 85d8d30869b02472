"""What batches are made of: real tokens, exact resume, packed against unpacked loss, and a loader that keeps up.

    python benchmarks/data_batches.py --root /path/to/data   # that of pipelines/configs/tinystories.yaml
    python benchmarks/data_batches.py                        # the story world

On texts and interactions at the window of a preset: the share of real tokens with naive padding, with rows of like
length in a forward, and with packing; the sequence of batch hashes of a run that is stopped after random steps, with 1,
2 and 4 workers, against the uninterrupted one; the loss of packed rows against the same texts one a row; and the
loader's tokens per second against what a training step of the preset consumes. Exits with 1 when hashes or losses
differ.
"""

import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from timing import Machine, interleaved, machine_options, report, spread

from rxt_platform.config.data import DataConfig, Section
from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.config.stage_base import OptimizerConfig
from rxt_platform.config.stages import JointPretrainingConfig
from rxt_platform.data.batches import Batch, collate
from rxt_platform.data.corpus import build_corpus, training_texts
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.prefetch import prefetched
from rxt_platform.data.sampler import BatchSampler, Sampling
from rxt_platform.data.shards import TokenShards, make_shard, plan_shards, write_summary
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.build import sampling
from rxt_platform.stages.joint import JointStage
from rxt_platform.training.engine import FORWARD_OVERHEAD

WORKERS = (1, 2, 4)
BATCH = 128  # rows of a step whose padding is counted
TOLERANCE = 1e-5


def data_of(root: Path | None) -> DataConfig:
    """The recipe's data, or the story world."""
    if root is None:
        world = {"kind": "story_world", "train_rows": 4000, "validation_rows": 64}
        return DataConfig.model_validate(dict.fromkeys(("texts", "interactions", "conversations"), world))
    talks = {
        "kind": "files",
        "path": "fairytaleqa/mrl_train.jsonl",
        "validation_path": "fairytaleqa/mrl_validation.jsonl",
    }
    texts = "tinystories/tinystories_train_2mib.txt"
    policy = {"bad_rows": "quarantine"}
    sections = {"texts": texts, "interactions": talks, "conversations": talks}
    return DataConfig.model_validate({"root": str(root), **sections, "validation": policy})


def shards_of(config: DataConfig, folder: Path, window: int, vocabulary: int) -> Path:
    """Corpus, tokenizer and token shards."""
    corpus, tokens = folder / "corpus", folder / "tokens"
    corpus.mkdir()
    tokens.mkdir()
    build_corpus(config, corpus)
    tokenizer = RxtTokenizer.train(training_texts(corpus, 2**28), vocabulary)
    made = [make_shard(plan, corpus, RowEncoder(tokenizer, window), tokens) for plan in plan_shards(corpus)]
    write_summary(tokens, made, window)
    return tokens


def real_share(sampler: BatchSampler, micro: int) -> float:
    """Real tokens over the positions of all micro-batches of an epoch."""
    parts = [part for step in range(sampler.total_steps) for part in sampler.global_batch(step).shares(0, 1, micro)]
    return sum(part.tokens for part in parts) / sum(part.mask.numel() for part in parts)


def padding(tokens: Path, window: int) -> dict[str, dict[str, float]]:
    """Share of real tokens by section and way of making batches."""
    found: dict[str, dict[str, float]] = {}
    sections: tuple[Section, ...] = ("texts", "interactions")
    for section in sections:
        rows = BatchSampler(TokenShards(tokens, section, "train"), Sampling(BATCH, 0))
        ways = {"naive": real_share(rows, BATCH)}
        ways |= {f"sorted, {micro} a forward": real_share(rows, micro) for micro in (32, 16, 8, 4)}
        if section == "texts":
            for windows in (1, 2):
                how = Sampling(BATCH // windows, 0, capacity=windows * window)
                packed = BatchSampler(TokenShards(tokens, section, "train"), how)
                ways[f"packed, {windows} window{'s'[: windows - 1]}"] = real_share(packed, BATCH // windows)
        found[section] = ways
    return found


def resumes(tokens: Path, window: int, stops: int) -> dict[str, int]:
    """How many of `stops` random interruptions go on with another batch, for each number of workers and section."""
    different: dict[str, int] = {}
    ways: dict[Section, Sampling] = {
        "texts": Sampling(8, 0, epochs=2, mask_probability=0.15, capacity=2 * window),
        "interactions": Sampling(32, 0, epochs=1, mask_probability=0.15),
        "conversations": Sampling(16, 0, epochs=2, lessons=[(0.5, 2)]),
    }
    for section, how in ways.items():
        straight = hashes(tokens, section, how, 0, 1)
        for workers in WORKERS:
            wrong = 0
            for stop in random.Random(workers).choices(range(len(straight)), k=stops):
                wrong += hashes(tokens, section, how, stop, workers) != straight[stop:]
            different[f"{section}, {workers} workers, {len(straight)} steps"] = wrong
    return different


def hashes(tokens: Path, section: Section, how: Sampling, first: int, workers: int) -> list[str]:
    """One hash for each row of each step from `first` on, as `workers` processes would see them together."""
    sampler = BatchSampler(TokenShards(tokens, section, "train"), how)
    micro = how.global_batch_size // workers // 2
    found = []
    with prefetched(sampler.global_batch, first, sampler.total_steps) as next_batch:
        for _ in range(first, sampler.total_steps):
            batch = next_batch()
            shares = [batch.shares(rank, workers, micro) for rank in range(workers)]
            parts = [part for step in zip(*shares, strict=True) for part in step]
            found.append("".join(digest for part in parts for digest in part.digests()))
    return found


def packed_difference(stage: JointStage, model: ReactiveTransformer, batches: int) -> float:
    """Largest difference of any metric between packed rows and the same texts one a row."""
    sampler, largest = stage.sampler, 0.0
    for step in range(batches):
        packed = sampler.global_batch(step)
        with torch.no_grad():
            one = stage.loss(model, packed, stage.phases()[0])
            other = stage.loss(model, unpacked(packed), stage.phases()[0])
        largest = max(largest, *(abs(float(value - other.metrics[name])) for name, value in one.metrics.items()))
    return largest


def unpacked(packed: Batch) -> Batch:
    """The texts of a packed batch, one a row, with the same tokens hidden and the same memory to start from."""
    assert packed.documents is not None
    from rxt_platform.data.examples import Example

    examples, seeds, hidden = [], [], []
    for row, documents in enumerate(packed.documents):
        for number in range(int(documents.max()) + 1):
            there = documents == number
            examples.append(Example((packed.ids[row, 0][there].numpy(),), (1,)))
            seeds.append(int(packed.seeds[row]))
            hidden.append(packed.hidden[row, 0][there])
    single = collate(examples, seeds, range(len(examples)))
    for row, chosen in enumerate(hidden):
        single.hidden[row, 0, : len(chosen)] = chosen
    return Batch(**{**vars(single), "total_hidden": packed.total_hidden})


def speed(stages: dict[str, JointStage], model: ReactiveTransformer, machine: Machine, repeats: int) -> dict[str, Any]:
    """Real tokens per second: of forwards, backwards and update on each kind of batch, and of the loader alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    counts: dict[str, int] = {}
    steps = iter(range(10**6))
    overhead = FORWARD_OVERHEAD[machine.device.type]
    micro = {
        name: stage.sampler.forward_rows(stage.config.global_batch_size, 1, overhead) for name, stage in stages.items()
    }

    def train(name: str) -> None:
        stage = stages[name]
        batch = stage.sampler.global_batch(next(steps) % stage.sampler.total_steps)
        counts[name] = counts.get(name, 0) + batch.tokens
        for part in [batch] if name == "naive padding" else batch.shares(0, 1, micro[name]):
            stage.loss(model, part, stage.phases()[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def load(name: str) -> None:
        for _ in range(20):
            batch = stages[name].sampler.global_batch(next(steps) % stages[name].sampler.total_steps)
            counts[f"loader, {name}"] = counts.get(f"loader, {name}", 0) + batch.tokens

    runs: dict[str, Any] = {name: partial(train, name) for name in stages}
    runs |= {f"loader, {name}": partial(load, name) for name in stages}
    seconds = interleaved(runs, repeats, machine, warmup=0)
    return {name: {"tokens_per_second": counts[name] / sum(times), **spread(times)} for name, times in seconds.items()}


@click.command(help=__doc__)
@machine_options
@click.option("--root", type=click.Path(path_type=Path, exists=True), help="folder of tinystories/ and fairytaleqa/")
@click.option("--preset", type=click.Choice(preset_names()), default="alpha-nano", show_default=True)
@click.option("--stops", default=50, show_default=True, help="random interruptions")
@click.option("--repeats", default=6, show_default=True)
def main(
    machine: Machine, seed: int, json_file: Path | None, root: Path | None, preset: str, stops: int, repeats: int
) -> None:
    """Run it."""
    config = load_preset(preset)
    window = config.max_length
    model = ReactiveTransformer(config).to(machine.device, machine.dtype)
    with tempfile.TemporaryDirectory() as folder:
        tokens = shards_of(data_of(root), Path(folder), window, config.vocab_size)
        shares = padding(tokens, window)
        for section, ways in shares.items():
            print(f"{section:<14}" + "   ".join(f"{way} {share:.1%}" for way, share in ways.items()))
        wrong = resumes(tokens, window, stops)
        for name, count in wrong.items():
            print(f"resume         {name}: {stops - count} of {stops} stops go on with the same hashes")
        stages = _stages(tokens, window)
        difference = packed_difference(stages["packed, 2 windows"], model, 5)
        print(f"packed loss    differs from the unpacked one by at most {difference:.1e}")
        speeds = speed(stages, model, machine, repeats)
        for name, one in speeds.items():
            print(f"{name:<28} {one['tokens_per_second']:>14,.0f} real tokens/s")
        slowest = min(one["tokens_per_second"] for name, one in speeds.items() if name.startswith("loader"))
        fastest = max(one["tokens_per_second"] for name, one in speeds.items() if not name.startswith("loader"))
        print(f"the slowest loader is {slowest / fastest:,.0f} times as fast as the fastest step")
    results = {"real_share": shares, "resumed_differently": wrong, "packed_difference": difference, "speed": speeds}
    report("data_batches", machine, {"preset": preset, "root": root is not None, "stops": stops}, results, json_file)
    sys.exit(0 if not any(wrong.values()) and difference <= TOLERANCE else 1)


def _stages(tokens: Path, window: int) -> dict[str, JointStage]:
    """The pre-training stage over each kind of batch, all of about as many tokens."""
    ways = {"naive padding": (0, 16), "rows of like length": (0, 16), "packed, 2 windows": (2, 8)}
    stages = {}
    for name, (windows, rows) in ways.items():
        settings = JointPretrainingConfig(
            kind="joint_pretraining",
            epochs=1,
            global_batch_size=rows,
            packing=windows,
            optimizer=OptimizerConfig(learning_rate=1e-4),
            loss={"decoder_only": 0.0},  # type: ignore[arg-type]
        )
        sampler = BatchSampler(TokenShards(tokens, "texts", "train"), sampling(settings, 0, window))
        stages[name] = JointStage(settings, sampler)
    return stages


if __name__ == "__main__":
    main()

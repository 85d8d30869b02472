"""The engine's promises on real processes: split-invariant, resumable, exact on what is frozen and what is finite."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from rxt_platform.data.batches import derive_seed
from rxt_platform.data.rows import Conversation, conversation_to_row
from rxt_platform.data.shards import TokenShards
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.model.files import load_weights
from rxt_platform.model.parameters import component_of
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import phase_at
from rxt_platform.stages.build import build_stage, stage_rows
from rxt_platform.storage.directory import read_manifest, seal_directory, verify_directory
from rxt_platform.training.checkpoints import KIND, Pieces
from rxt_platform.training.optimizer import schedule
from tests.support import ONE_SOURCE, ROOT, STAGES, Jobs, environment, make_jobs

pytestmark = pytest.mark.dist


def test_two_workers_compute_what_one_does(straight_run: Jobs, new_jobs: Callable[..., Jobs]) -> None:
    """Per-step losses of all four stages, fp32, same global batch: largest difference 1e-5."""
    two = new_jobs()
    for stage in STAGES:
        done = two.run(stage, workers=2)
        assert done.returncode == 0, done.stderr[-2000:]
        one_history, two_history = straight_run.history(stage), two.history(stage)
        assert len(one_history) == len(two_history) >= 10
        for one_step, two_step in zip(one_history, two_history, strict=True):
            for name in ("objective", "loss"):
                assert one_step[name] == pytest.approx(two_step[name], abs=1e-5), (stage, one_step["step"], name)


def test_micro_batches_compute_what_one_batch_does(straight_run: Jobs, new_jobs: Callable[..., Jobs]) -> None:
    jobs = new_jobs("stages.pretraining.micro_batch_size=4")
    assert jobs.run("pretraining").returncode == 0
    for whole, parts in zip(straight_run.history("pretraining"), jobs.history("pretraining"), strict=True):
        assert whole["objective"] == pytest.approx(parts["objective"], abs=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_conversations_of_one_turn_train_beside_longer_ones(
    new_jobs: Callable[..., Jobs], tmp_path_factory: pytest.TempPathFactory, zero_stage: int
) -> None:
    """Forwards take rows of like length, so some see single turns only: no memory is written in them."""
    folder = tmp_path_factory.mktemp("talks")
    talks = [talk for turns in (2, 3) for talk in StoryWorld(0).conversations("train", 40, turns)]
    talks += [Conversation(talk.interactions[:1]) for talk in talks[:20]]
    for name, rows in (("train", talks), ("held", talks[-30:-10])):
        lines = (json.dumps(conversation_to_row(talk)) + "\n" for talk in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    source = f"{{kind: files, path: {folder}/train.jsonl, validation_path: {folder}/held.jsonl}}"
    settings = [
        *ONE_SOURCE,
        f"data.conversations={source}",
        "data.validation.duplicates=keep",
        "stages.memory_aware.curriculum=[]",
    ]
    settings += ["stages.memory_aware.micro_batch_size=2", "stages.memory_aware.global_batch_size=16"]
    one = new_jobs(*settings)
    two = make_jobs(tmp_path_factory.mktemp("two"), *settings, f"training.zero_stage={zero_stage}")
    for jobs, workers in ((one, 1), (two, 2)):
        jobs.jobs["memory_aware"] = jobs.jobs["memory_aware"].model_copy(update={"start": None})
        done = jobs.run("memory_aware", workers)
        assert done.returncode == 0, done.stderr[-2000:]
    for alone, shared in zip(one.history("memory_aware"), two.history("memory_aware"), strict=True):
        assert alone["objective"] == pytest.approx(shared["objective"], abs=1e-5), alone["step"]
        assert alone["gradient_norm"] == pytest.approx(shared["gradient_norm"], rel=1e-3), alone["step"]


@pytest.mark.parametrize(
    "settings",
    [
        ["zero_stage=0"],
        ["zero_stage=2"],
        ["zero_stage=3"],
        ["zero_stage=1", "offload=optimizer"],
        ["zero_stage=2", "offload=optimizer", "activation_checkpointing=true"],
        ["zero_stage=3", "offload=parameters", "activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_strategies_agree(straight_run: Jobs, new_jobs: Callable[..., Jobs], settings: list[str]) -> None:
    """The stage with frozen parts and phases, from the same model, however it is spread over two workers."""
    jobs = new_jobs(*(f"training.{setting}" for setting in settings))
    jobs.jobs["memory_aware"] = jobs.jobs["memory_aware"].model_copy(
        update={"start": straight_run.jobs["memory_aware"].start}
    )
    done = jobs.run("memory_aware", workers=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for one, other in zip(straight_run.history("memory_aware"), jobs.history("memory_aware"), strict=True):
        assert one["objective"] == pytest.approx(other["objective"], abs=1e-5), one["step"]
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3), one["step"]
    weights, others = (load_file(run.jobs["memory_aware"].output / "model.safetensors") for run in (straight_run, jobs))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_ends_with_the_same_weights(straight_run: Jobs, new_jobs: Callable[..., Jobs], stage: str) -> None:
    jobs = new_jobs()
    jobs.jobs[stage] = jobs.jobs[stage].model_copy(update={"start": straight_run.jobs[stage].start})
    jobs.run_and_kill(stage, step=5)
    done = jobs.run(stage)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = read_manifest(jobs.jobs[stage].output).metrics
    assert metrics["resumed_from_step"] >= 3
    assert metrics["tokens"] == read_manifest(straight_run.jobs[stage].output).metrics["tokens"] > 0
    assert jobs.weights_sha256(stage) == straight_run.weights_sha256(stage)
    history, straight = jobs.history(stage), straight_run.history(stage)
    assert [row["step"] for row in history] == [row["step"] for row in straight]
    assert [row["loss"] for row in history] == [row["loss"] for row in straight]


@pytest.mark.parametrize(
    ("last_step", "expected"),
    [
        (2, {"decoder", "memory_cross_attention", "head"}),
        (4, {"decoder", "memory_cross_attention", "head", "memory_attention"}),
        (6, {"decoder", "memory_cross_attention", "head", "memory_attention", "encoder", "embedding"}),
    ],
)
def test_gradual_unfreezing_moves_components_in_their_order(
    straight_run: Jobs, new_jobs: Callable[..., Jobs], last_step: int, expected: set[str]
) -> None:
    """N = 0.2 and K = 0.3 epochs of 10 steps; the run is cut after `last_step` by a schedule with nothing after it.

    Two runs that share their first steps differ only later: what has moved by then is read from the checkpoint.
    """
    jobs = new_jobs(f"training.checkpoints.every={last_step}", "training.checkpoints.keep=9")
    start = straight_run.jobs["memory_aware"].start
    jobs.jobs["memory_aware"] = jobs.jobs["memory_aware"].model_copy(update={"start": start})
    assert jobs.run("memory_aware").returncode == 0
    assert start is not None
    before = load_file(start / "model.safetensors")
    checkpoint = jobs.jobs["memory_aware"].work / f"checkpoints/step-{last_step:08d}"
    verify_directory(checkpoint, KIND)
    pieces = Pieces(checkpoint)
    moved = set()
    for name, size in pieces.sizes("weight").items():
        after = torch.empty(size)
        pieces.read("weight", name, 0, size, after)
        if not torch.equal(before[name].flatten(), after):
            moved.add(component_of(name))
    assert moved == expected
    frozen = {component_of(name) for name in before.keys() - pieces.sizes("weight").keys()}
    assert frozen <= {"frozen", "mlm_head"}  # the memory-aware loss does not read the MLM head


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_come_out_as_they_went_in(
    straight_run: Jobs, new_jobs: Callable[..., Jobs], precision: str
) -> None:
    jobs = new_jobs(f"training.precision={precision}")
    job = straight_run.jobs["memory_pretraining"]
    jobs.jobs["memory_pretraining"] = jobs.jobs["memory_pretraining"].model_copy(update={"start": job.start})
    done = jobs.run("memory_pretraining")
    assert done.returncode == 0, done.stderr[-2000:]
    assert job.start is not None
    before = load_file(job.start / "model.safetensors")
    after = load_file(jobs.jobs["memory_pretraining"].output / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (component_of(name) != "memory_attention"), name


def test_loss_that_is_not_finite_stops_all_ranks_and_names_the_rows(
    straight_run: Jobs, new_jobs: Callable[..., Jobs]
) -> None:
    jobs = new_jobs()
    start = straight_run.jobs["sft"].start
    assert start is not None
    poisoned = jobs.folder / "poisoned"
    shutil.copytree(start, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["decoder.head.bias"][0] = float("nan")
    save_file(weights, poisoned / "model.safetensors")
    (poisoned / "manifest.json").unlink()
    seal_directory(poisoned, jobs.folder / "sealed", "model")
    jobs.jobs["sft"] = jobs.jobs["sft"].model_copy(update={"start": jobs.folder / "sealed"})
    done = jobs.run("sft", workers=2)
    assert done.returncode != 0
    assert "error: step 1: the loss is nan: worker 0: rows story_world:" in done.stderr
    assert "; nothing was updated; lower the learning rate, look at the rows, or allow more than 0" in done.stderr
    assert "the batch's rows: story_world:" in done.stderr
    assert not jobs.jobs["sft"].output.exists()


@pytest.mark.parametrize(("zero_stage", "reductions"), [(0, 1), (1, 1), (2, 4)])
def test_gradients_are_reduced_no_more_often_than_needed(
    new_jobs: Callable[..., Jobs], zero_stage: int, reductions: int
) -> None:
    """Four forwards a step: plain data parallel and ZeRO-1 reduce once; ZeRO-2 keeps a share only, so after each."""
    settings = [f"training.zero_stage={zero_stage}", "training.log_every=100"]
    jobs = new_jobs(*settings, "stages.sft.micro_batch_size=2")
    jobs.jobs["sft"] = jobs.jobs["sft"].model_copy(update={"start": None})
    jobs.command("sft")
    out = jobs.folder / "counts.json"
    script = [str(ROOT / "tests/dist/counting.py"), str(jobs.folder / "sft.json"), str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *script],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights = load_file(jobs.jobs["sft"].output / "model.safetensors")
    trained = sum(tensor.numel() for name, tensor in weights.items() if component_of(name) != "memory_attention")
    steps = json.loads(out.read_text())
    assert len(steps) == 10
    for step in steps[1:]:
        assert step["elements"] == pytest.approx(reductions * trained, rel=0.02)  # and some metrics


def test_the_engine_computes_what_plain_torch_does(straight_run: Jobs) -> None:
    """The same stage, with its phases, as a loop that a reader can check: fp32, AdamW, clipping, one worker."""
    job = straight_run.jobs["memory_aware"]
    tokens = stage_rows(TokenShards(job.tokens, job.stage.section, "train"), job.stage)
    stage = build_stage(job.stage, tokens, derive_seed(job.seed, job.name), job.model.max_length, job.weights)
    model = ReactiveTransformer(job.model)
    assert job.start is not None
    load_weights(model, job.start)
    config = job.stage.optimizer
    named = [(name, each) for name, each in model.named_parameters() if component_of(name) != "frozen"]
    groups = [{"params": [each], "component": component_of(name)} for name, each in named]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=config.weight_decay)
    steps = stage.sampler.total_steps
    for step in range(steps):
        phase = phase_at(stage.phases(), step)
        for group in adam.param_groups:
            scale = config.learning_rate_scale.get(group["component"], 1.0)
            trains = group["component"] in phase.trains
            group["lr"] = schedule(config, step, steps) * scale if trains else 0.0
        report = stage.loss(model, stage.sampler.global_batch(step), phase)
        report.loss.backward()
        for _, each in named:  # a frozen one's moments and step count go on, as under ZeRO
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        torch.nn.utils.clip_grad_norm_([each for _, each in named], config.gradient_clip)
        adam.step()
        adam.zero_grad()
    trained = load_file(job.output / "model.safetensors")
    for name, each in model.named_parameters():
        torch.testing.assert_close(trained[name], each.detach(), atol=2e-6, rtol=1e-4, msg=name)

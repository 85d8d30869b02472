"""Checkpoints that are not what they should be: named, never loaded, never a silent fresh start."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rxt_platform.storage.directory import MANIFEST
from rxt_platform.training.checkpoints import checkpoints_in, folder_name
from tests.dist.checkpoints import (
    STAGE,
    altered,
    checkpoints_of,
    finish,
    interrupted,
    refused,
    reseal,
    resumed_from,
)
from tests.support import Jobs

pytestmark = pytest.mark.dist


def test_damaged_ones_are_named_and_the_newest_whole_one_is_used(every_step: Jobs, tmp_path: Path) -> None:
    jobs = interrupted(every_step, tmp_path, list(range(3, 10)))
    at = {step: checkpoints_of(jobs) / folder_name(step) for step in range(3, 10)}
    shard = "rank-00000-00000.safetensors"
    altered(at[9] / shard, lambda content: content[:-100])
    altered(at[8] / shard, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    (at[7] / MANIFEST).unlink()
    (at[6] / "buffers.safetensors").unlink()
    altered(at[5] / "state.json", lambda content: content.replace(b'"step": 5', b'"step": 4'))
    (at[4] / "extra").write_text("")
    log = finish(jobs)
    size = (at[3] / shard).stat().st_size
    for reason in (
        f"{at[9] / shard}: {size - 100} bytes, the manifest says {size}",
        f"{at[8] / shard}: sha256 ",
        f"{at[7]}: no {MANIFEST}: not a complete artifact",
        f"{at[6]}: files missing: ['buffers.safetensors']",
        f"{at[5] / 'state.json'}: sha256 ",
        f"{at[4]}: files missing: [], not in the manifest: ['extra']",
    ):
        assert f"skipping a damaged checkpoint: {reason}" in log
    assert resumed_from(jobs) == 3
    assert jobs.weights_sha256(STAGE) == every_step.weights_sha256(STAGE)


def test_only_damaged_ones_are_an_error_not_a_fresh_start(every_step: Jobs, tmp_path: Path) -> None:
    jobs = interrupted(every_step, tmp_path, [3, 6])
    three, six = checkpoints_in(checkpoints_of(jobs))
    (three / MANIFEST).unlink()
    (six / "state.json").unlink()
    told = refused(jobs)
    assert "no usable checkpoint: " in told
    assert f"{three}: no {MANIFEST}" in told
    assert f"{six}: files missing: ['state.json']" in told
    assert f"Delete {three.parent} to start this stage again" in told


class Payload:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(every_step: Jobs, tmp_path: Path) -> None:
    """Even when whoever put it there made a manifest for it."""
    jobs = interrupted(every_step, tmp_path, [3])
    (checkpoint,) = checkpoints_in(checkpoints_of(jobs))
    shard = checkpoint / "rank-00000-00000.safetensors"
    shard.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    reseal(checkpoint)
    assert f"{shard}: not a file of a checkpoint" in refused(jobs, workers=2)
    assert not (tmp_path / "executed").exists()


def test_another_runs_checkpoint_is_refused_and_the_difference_named(every_step: Jobs, tmp_path: Path) -> None:
    jobs = interrupted(every_step, tmp_path, [3])
    job = jobs.jobs[STAGE]
    spec = json.loads(json.dumps(job.provenance))
    spec["spec"]["stage"]["optimizer"]["learning_rate"] = 0.5
    jobs.jobs[STAGE] = job.model_copy(update={"identity": "another", "provenance": spec})
    told = refused(jobs, workers=2)
    at = checkpoints_of(jobs)
    assert f"{at / folder_name(3)}: made by another run (spec.stage.optimizer.learning_rate: 0.001 → 0.5)" in told
    assert f"go back to those settings, or delete {at} to start this stage again" in told


def larger_moments(checkpoint: Path) -> str:
    path = checkpoint / "rank-00000-00000.safetensors"
    tensors = load_file(path)
    key = "exp_avg_sq/0/decoder.head.bias"
    size = len(tensors[key])
    save_file({**tensors, key: torch.cat([tensors[key], torch.ones(3)])}, path)
    return f"{checkpoint}: of another model: elements of exp_avg_sq of decoder.head.bias: {size + 3} → {size}"


def other_moments(checkpoint: Path) -> str:
    path = checkpoint / "rank-00000-00000.safetensors"
    tensors = load_file(path)
    tensors["exp_avg_sq/0/decoder.head.bias"] *= 1.01
    save_file(tensors, path)
    return f"{checkpoint}: exp_avg_sq does not add up after loading: "


def no_buffers(checkpoint: Path) -> str:
    save_file({}, checkpoint / "buffers.safetensors")
    return f"{checkpoint}/buffers.safetensors: of another model: decoder.layers.0."


@pytest.mark.parametrize("change", [larger_moments, other_moments, no_buffers])
def test_another_models_checkpoint_is_refused(every_step: Jobs, tmp_path: Path, change: Callable[[Path], str]) -> None:
    """All with a manifest that fits: what is in the files does not."""
    jobs = interrupted(every_step, tmp_path, [3])
    (checkpoint,) = checkpoints_in(checkpoints_of(jobs))
    told = change(checkpoint)
    reseal(checkpoint)
    assert told in refused(jobs)

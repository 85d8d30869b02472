"""Every published system has a recipe that is valid, can be planned, and starts: all its stages train a few steps.

On the story world, the large models at reduced depth or width. The real data sets need the network.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rxt_platform.config.loading import load_preset, load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.orchestration.commands import plan_rows
from rxt_platform.storage.directory import read_manifest
from tests.support import ROOT, make_jobs_of

pytestmark = pytest.mark.dist

SMALL_BETA = {
    "hidden_size": 64,
    "layers": 3,
    "vocab_size": 512,
    "max_length": 128,
    "decoder.experts.number": 12,
    "decoder.experts.size": 32,
    "decoder.experts.shared_size": 32,
    "decoder.feed_forward_size": 128,
    "encoder.feed_forward_size": 128,
    "memory.slots": 16,
}
RECIPES: dict[str, dict[str, Any]] = {
    "nano": {},
    "micro": {"layers": 3},
    "mini": {"layers": 2},
    "synthetic": {"layers": 2},
    "micro_v1": {"layers": 3},
    "beta": SMALL_BETA,
}


def started(name: str, storage: Path) -> RunConfig:
    """The recipe with few rows of the story world, on one CPU; all else is as published or ours."""
    path = ROOT / f"pipelines/configs/{name}.yaml"
    whole = load_run(path, [])
    packed = any(getattr(stage, "packing", 0) for stage in whole.stages.values())
    settings = [
        f"data.{section}={{kind: story_world, train_rows: {rows}, validation_rows: 4}}"
        for section, rows in (("texts", 64 if packed else 16), ("interactions", 16), ("conversations", 16))
    ]
    settings += [f"model.{key}={value}" for key, value in RECIPES[name].items()]
    settings += [f"storage={storage}", "resources.workers=1", "resources.use_gpu=false"]
    settings += ["training.log_every=1", "training.evaluate_every=null"]
    for stage in whole.stages:
        settings += [f"stages.{stage}.epochs=1.5", f"stages.{stage}.global_batch_size=8"]
    settings.append("stages.memory_aware.curriculum=[{turns: 2, epochs: 0.5}]")
    return load_run(path, settings)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_and_all_its_stages_train(name: str, tmp_path: Path) -> None:
    config = started(name, tmp_path)
    rows = plan_rows(config)
    assert [row["step"] for row in rows] == ["corpus", "tokenizer", "tokens", *config.stages, "evaluation"]
    assert {row["state"] for row in rows} == {"will run"}
    jobs = make_jobs_of(config, tmp_path)
    for stage in config.stages:
        done = jobs.run(stage)
        assert done.returncode == 0, f"{stage}: {done.stderr[-2000:]}"
        metrics = read_manifest(jobs.jobs[stage].output).metrics
        assert metrics["steps"] >= 3
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in jobs.history(stage)), stage
    assert json.loads((jobs.jobs["memory_aware"].output / "config.json").read_text())["architectures"] == ["RxTAlpha"]


def test_a_recipe_s_preset_is_the_whole_published_model() -> None:
    presets = {"micro_v1": "alpha-micro-v1", "beta": "beta"}
    for name in RECIPES:
        config = load_run(ROOT / f"pipelines/configs/{name}.yaml", [])
        assert config.model == load_preset(presets.get(name, f"alpha-{name}")), name


def test_beta_can_be_built_and_writes_its_memory_on_the_meta_device() -> None:
    """At full size: what takes no memory shows shapes only. (Its experts' routing needs values.)"""
    config = load_run(ROOT / "pipelines/configs/beta.yaml", []).model
    with torch.device("meta"):
        model = ReactiveTransformer(config)
        memory = torch.zeros(config.layers, 2, config.memory.slots, config.hidden_size)
        ids, mask = torch.zeros(2, 512, dtype=torch.long), torch.ones(2, 512, dtype=torch.bool)
        written = model.write(memory, ids, mask)
        written.sum().backward()
    assert written.shape == (21, 2, 4096, 512)
    assert all(parameter.grad is not None for parameter in model.memory_attention.parameters())

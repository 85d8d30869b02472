"""The real files that users of this platform train on, where their folder is beside the project."""

import json
from pathlib import Path

import pytest

from rxt_platform.config.data import DataConfig
from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.data.corpus import BAD_ROWS, build_corpus
from rxt_platform.orchestration.plan import build_plan
from rxt_platform.orchestration.prepare import FERTILITY, prepare
from rxt_platform.storage.directory import read_manifest
from tests.support import ROOT, STAGES, Jobs, make_jobs_of, no_ray

DATA = ROOT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real-data folder at {DATA}"),
]


def recipe(storage: Path, *overrides: str) -> RunConfig:
    """The shipped recipe on the real files."""
    config = ROOT / "pipelines/configs/tinystories.yaml"
    return load_run(config, [f"storage={storage}", f"data.root={DATA}", *overrides])


@pytest.mark.parametrize("vocabulary", [5000, 7500])
def test_every_row_of_the_real_files_is_read(tmp_path: Path, vocabulary: int) -> None:
    """2,316 whole stories and one that was cut off; 1,194 and 154 conversations; every text comes back as it was."""
    config = recipe(tmp_path, f"model.vocab_size={vocabulary}")
    plan = build_plan(config)
    prepare(config, plan, no_ray)
    counts = read_manifest(plan[0].artifact).metrics
    assert counts["texts_train"] + counts["texts_validation"] == 2316
    assert counts["bad_rows"] == 1
    (bad,) = map(json.loads, (plan[0].artifact / BAD_ROWS).read_text().splitlines())
    assert (bad["file"], bad["row"], bad["column"]) == ("tinystories_train_2mib.txt", 2317, "text")
    assert bad["reason"].startswith("cut off")
    assert (counts["conversations_train"], counts["conversations_validation"]) == (1194, 154)
    fertility = json.loads((plan[1].artifact / FERTILITY).read_text())
    for section, most in (("texts", 1.35), ("interactions", 1.55), ("conversations", 1.55)):
        assert 1.0 < fertility[section]["tokens_per_word"] < most
        assert fertility[section]["unknown"] == fertility[section]["changed_by_round_trip"] == 0


def test_the_published_layout_s_example_rows_are_all_used(tmp_path: Path) -> None:
    files = {"kind": "files", "path": str(DATA / "rxt_examples/mrl_*.jsonl"), "validation_share": 0.1}
    single = {"kind": "files", "path": str(DATA / "rxt_examples/sft_stories.jsonl"), "validation_share": 0.1}
    config = DataConfig.model_validate({"interactions": single, "conversations": files})
    counts = build_corpus(config, tmp_path)
    assert counts["conversations_train"] + counts["conversations_validation"] == 87
    assert counts["interactions_train"] + counts["interactions_validation"] == 82 - counts["near_duplicates"]
    assert counts["bad_rows"] == 0


@pytest.mark.dist
def test_recipe_trains_on_the_real_files(tmp_path: Path) -> None:
    """All four stages, a few steps each."""
    few = [f"stages.{name}.epochs=0.05" for name in STAGES]
    small = ["model.layers=2", "model.hidden_size=64", "training.log_every=1"]
    small += [f"stages.memory_aware.{name}=0" for name in ("unfreeze_memory_attention", "unfreeze_encoder")]
    small += ["stages.memory_aware.curriculum=[]"]
    jobs: Jobs = make_jobs_of(recipe(tmp_path, *few, *small), tmp_path)
    for stage in STAGES:
        done = jobs.run(stage)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = read_manifest(jobs.jobs[stage].output).metrics
        assert metrics["loss_after"] < metrics["loss_before"], stage

"""The real files that users of this platform train on, where their folder is beside the project."""

from pathlib import Path

import pytest

from rxt_platform.config.loading import load_run
from rxt_platform.config.run import RunConfig
from rxt_platform.orchestration.plan import build_plan
from rxt_platform.orchestration.steps import prepare
from rxt_platform.storage.directory import read_manifest
from tests.support import ROOT, STAGES, Jobs, make_jobs_of

DATA = ROOT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real-data folder at {DATA}"),
]


def recipe(storage: Path, *overrides: str) -> RunConfig:
    """The shipped recipe on the real files."""
    config = ROOT / "pipelines/configs/tinystories.yaml"
    return load_run(config, [f"storage={storage}", f"data.root={DATA}", *overrides])


def test_every_row_of_the_real_files_is_read(tmp_path: Path) -> None:
    """2,316 whole stories and one that was cut off; 1,194 and 154 conversations."""
    config = recipe(tmp_path)
    plan = build_plan(config)
    prepare(config, plan)
    counts = read_manifest(plan[0].artifact).metrics
    assert counts["texts_train"] + counts["texts_validation"] == 2316
    assert counts["dropped_unfinished_documents"] == 1
    assert (counts["conversations_train"], counts["conversations_validation"]) == (1194, 154)


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

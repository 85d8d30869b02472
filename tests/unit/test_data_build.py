"""Promises of `rxt data build`: what it builds is what the run uses."""

from pathlib import Path

import pytest

from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.shards import TokenShards
from rxt_platform.errors import DataError
from rxt_platform.inspection import histogram
from rxt_platform.orchestration import data_build
from rxt_platform.orchestration.plan import build_plan
from rxt_platform.stages.build import sampling, stage_rows
from rxt_platform.storage.locks import only_holder
from rxt_platform.training.engine import forward_rows
from tests.support import SMALL, small_run
from tests.unit.data_commands import QUICKSTART, Capture, figures, ran, refused


def test_what_is_built_is_what_the_run_reuses(capsys: Capture, tmp_path: Path) -> None:
    arguments = [QUICKSTART, *SMALL, f"storage={tmp_path}"]
    first, again = figures(capsys, "build", *arguments), figures(capsys, "build", *arguments)
    assert {one["status"] for one in first["artifacts"].values()} == {"made"}
    assert {one["status"] for one in again["artifacts"].values()} == {"reused"}
    assert {name: one for name, one in first.items() if name != "artifacts"} == {
        name: one for name, one in again.items() if name != "artifacts"
    }
    steps = build_plan(small_run(tmp_path))[:3]
    assert [first["artifacts"][step.name]["path"] for step in steps] == [str(step.artifact) for step in steps]
    assert all(step.finished() for step in steps)
    assert first["tokens"]["texts_train"]["rows"] == 160


def test_the_share_of_real_tokens_is_that_of_the_stages_own_batches(capsys: Capture, tmp_path: Path) -> None:
    packed = ["stages.pretraining.packing=1", "resources.workers=2", "stages.sft.micro_batch_size=4"]
    built = figures(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path}", *packed)["batches"]
    config = small_run(tmp_path, *packed)
    tokens = build_plan(config)[2].artifact
    for name, one in built.items():
        stage = config.stages[name]
        rows = stage_rows(TokenShards(tokens, stage.section, "train"), stage)
        sampler = BatchSampler(rows, sampling(stage, 0, config.model.max_length))
        assert one["steps"] == sampler.total_steps <= 50, "so that every step is measured"
        if name != "memory_aware":  # which takes turns in groups, each to its own length
            micro = 4 if name == "sft" else forward_rows(stage, sampler, 2, config.training, "cpu")
            batches = [sampler.global_batch(step) for step in range(sampler.total_steps)]
            parts = [part for batch in batches for rank in range(2) for part in batch.shares(rank, 2, micro)]
            real = sum(part.tokens for part in parts) / sum(len(part.rows) * sum(part.turn_lengths) for part in parts)
            assert one["real_share"] == pytest.approx(real)
        assert one["naive_share"] <= one["real_share"] <= 1
    assert built["pretraining"]["real_share"] > 0.85


def test_build_shows_rows_tokens_fertility_batches_and_places(capsys: Capture, tmp_path: Path) -> None:
    picture = tmp_path / "tokens.png"
    text = ran(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path / 'runs'}", "--histogram", picture)
    for words in ("conversations  validation", "tokens a word", "memory_aware        conversations", "real tokens"):
        assert words in text
    for step in build_plan(small_run(tmp_path / "runs"))[:3]:
        assert str(step.artifact) in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_tokens_sets_training_beside_held_out(capsys: Capture, tmp_path: Path) -> None:
    built = figures(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path}")
    panels = histogram.panels_of_tokens(built["tokens"])
    assert [panel.title for panel in panels] == ["texts", "interactions", "conversations"]
    for panel in panels:
        assert [series.label for series in panel.series] == ["training", "held out"]
        counts = [built["tokens"][f"{panel.title}_{split}"]["turns"] for split in ("train", "validation")]
        assert [sum(series.counts) for series in panel.series] == counts
        assert panel.series[0].width * 64 == built["tokens"][f"{panel.title}_train"]["max_length"]


def test_two_drivers_do_not_build_the_same_run(capsys: Capture, tmp_path: Path) -> None:
    with only_holder(tmp_path / "work/run.quickstart.lock"):
        _, error = refused(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path}")
    assert "in use by process" in error
    assert not list((tmp_path / "artifacts").glob("*"))


def test_build_leaves_a_ray_that_it_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself is stood in for: no corpus of a test is worth several tasks."""
    said: list[str] = []

    def connect(_: object) -> bool:
        said.append("connected")
        return True

    monkeypatch.setattr("rxt_platform.orchestration.prepare.needs_workers", lambda _: True)
    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.connect", connect)
    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.disconnect", lambda: said.append("left"))

    def each(*_: object) -> list[object]:
        raise DataError("a task failed")

    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.each", each)
    with pytest.raises(DataError, match="a task failed"):
        data_build.build_data(small_run(tmp_path))
    assert said == ["connected", "left"]

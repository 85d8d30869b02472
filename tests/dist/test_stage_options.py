"""Each way of training that a stage offers computes the same on two workers under ZeRO-3 as on one without."""

from pathlib import Path

import pytest

from tests.support import Jobs, make_jobs

pytestmark = pytest.mark.dist

JOINT = "{mask_random: 0.1, mask_kept: 0.1, memory_noise: 0.1, memory_dropout: 0.2, decoder_only: 0.5"
OPTIONS = {
    "all joint options": ("sft", ["stages.sft.loss=" + JOINT + ", freeze_memory_path: true}"]),
    "encoder alone": ("pretraining", ["stages.pretraining.trains=encoder", "stages.pretraining.loss={}"]),
    "decoder alone": ("sft", ["stages.sft.trains=decoder", "stages.sft.loss={}"]),
    "memory's change": ("memory_pretraining", ["stages.memory_pretraining.memory_change_weight=0.1"]),
    "resets and a short window": (
        "memory_aware",
        [
            "stages.memory_aware.reset_probability=0.3",
            "stages.memory_aware.memory_change_weight=0.1",
            "stages.memory_aware.bptt_window=2",
        ],
    ),
}


def trained(folder: Path, stage: str, workers: int, *overrides: str) -> Jobs:
    jobs = make_jobs(folder, *overrides)
    jobs.jobs[stage] = jobs.jobs[stage].model_copy(update={"start": None})
    done = jobs.run(stage, workers)
    assert done.returncode == 0, done.stderr[-2000:]
    return jobs


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_the_same_on_any_number_of_workers(option: str, tmp_path: Path) -> None:
    stage, overrides = OPTIONS[option]
    one = trained(tmp_path / "one", stage, 1, *overrides, "training.zero_stage=0")
    two = trained(tmp_path / "two", stage, 2, *overrides, "training.zero_stage=3")
    alone, shared = one.history(stage), two.history(stage)
    assert len(alone) == len(shared) >= 10
    for first, second in zip(alone, shared, strict=True):
        assert first["objective"] == pytest.approx(second["objective"], abs=1e-5), first["step"]
        assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-3), first["step"]

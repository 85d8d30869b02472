"""Promises of the steps before training: nothing is made from damage, by two at once, or beside leftovers."""

import fcntl
from pathlib import Path

import pytest

from rxt_platform.config.run import RunConfig
from rxt_platform.errors import ArtifactError, BusyError, ConfigError
from rxt_platform.orchestration.plan import Step, build_plan
from rxt_platform.orchestration.prepare import prepare
from tests.support import no_ray, small_run

STEPS = ["corpus", "tokenizer", "tokens"]


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunConfig, list[Step]]:
    """A small run of which nothing is made."""
    config = small_run(tmp_path)
    plan = build_plan(config)
    plan[0].artifact.parent.mkdir(parents=True)
    return config, plan


def made(run: tuple[RunConfig, list[Step]]) -> list[str]:
    """The names of the steps that had to be made."""
    return [one.step.name for one in prepare(*run, no_ray) if one.made]


def test_steps_are_made_once_and_then_reused(run: tuple[RunConfig, list[Step]]) -> None:
    assert made(run) == STEPS
    assert made(run) == []


@pytest.mark.parametrize(("missing", "damaged"), [(2, 0), (2, 1), (1, 0)])
def test_nothing_is_made_from_a_damaged_input(run: tuple[RunConfig, list[Step]], missing: int, damaged: int) -> None:
    prepare(*run, no_ray)
    plan = run[1]
    for path in plan[missing].artifact.iterdir():
        path.unlink()
    plan[missing].artifact.rmdir()
    file = sorted(plan[damaged].artifact.glob("*.parquet" if damaged == 0 else "tokenizer.json"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="the file was altered"):
        prepare(*run, no_ray)
    assert not plan[missing].artifact.exists()


def test_what_a_killed_attempt_left_is_removed(run: tuple[RunConfig, list[Step]]) -> None:
    leftovers = [step.artifact.with_name(f".{step.artifact.name}.deadbeef.tmp") for step in run[1][:3]]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "half").write_text("of it")
    prepare(*run, no_ray)
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_step_that_another_run_makes_is_not_made_twice(run: tuple[RunConfig, list[Step]]) -> None:
    step = run[1][2]
    lock = step.work.with_name(step.work.name + ".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match=r"tokens-.*in use by"):
            prepare(*run, no_ray)
    assert made(run) == ["tokens"]


def test_a_batch_larger_than_its_packs_is_refused(tmp_path: Path) -> None:
    config = small_run(tmp_path, "stages.pretraining.packing=2", "stages.pretraining.global_batch_size=64")
    plan = build_plan(config)
    plan[0].artifact.parent.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"global_batch_size 64 is more than the \d+ packed rows of texts"):
        prepare(config, plan, no_ray)


def test_a_batch_larger_than_its_rows_is_refused_with_tokens_of_another_run_too(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    plan = build_plan(config)
    plan[0].artifact.parent.mkdir(parents=True)
    prepare(config, plan, no_ray)
    larger = small_run(tmp_path, "stages.sft.global_batch_size=176")
    with pytest.raises(ConfigError, match=r"stages.sft.global_batch_size 176 is more than the 160 training rows"):
        prepare(larger, build_plan(larger), no_ray)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.memory_aware.unfreeze_encoder=0.79"], "its last lesson or phase would begin after step 10"),
        (["stages.sft.optimizer.learning_rate_scale={memory_attention: 3}"], "the stage never trains it"),
        (
            ["baseline={window: 128}", "data.conversations.0.turns=[8]"],
            r"baseline.window 128: story_world:\d+ has \d+ tokens in all its turns",
        ),
    ],
)
def test_what_could_not_be_trained_with_these_rows_is_said_before_any_job(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    config = small_run(tmp_path, *overrides, "stages.memory_aware.unfreeze_memory_attention=0.2")
    plan = build_plan(config)
    plan[0].artifact.parent.mkdir(parents=True)
    with pytest.raises(ConfigError, match=said):
        prepare(config, plan, no_ray)

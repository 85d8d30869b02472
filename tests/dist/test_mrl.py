"""Reinforcement learning on real processes: the same on any number of workers and after any kill."""

import re
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rxt_platform.storage.directory import read_manifest
from rxt_platform.training.checkpoints import newest_complete
from rxt_platform.training.job import StageJob
from tests.dist.small_mrl import CRITIC, STAGE, mrl_jobs
from tests.support import Jobs, make_jobs_of

pytestmark = pytest.mark.dist

WAYS = {
    "group": [],
    "several updates of a collection, KL": [
        "stages.mrl.objective={kind: policy, by_deviation: true, kl_weight: 0.1}",
        "stages.mrl.global_batch_size=4",
        "stages.mrl.minibatches=2",
        "stages.mrl.update_epochs=2",
    ],
    "impo, a used memory": [*CRITIC, "stages.mrl.carry_over=0.5", "stages.mrl.critic_warmup=0.3"],
    "gae": [
        CRITIC[0],
        "stages.mrl.objective={kind: policy, advantage: gae, discount: 0.5}",
        "stages.mrl.answers=1",
        "stages.mrl.memory=teacher_forced",
        "stages.mrl.unfreeze_encoder=0.2",
        "stages.mrl.unfreeze_all=0.2",
    ],
    "dmpo": ["stages.mrl.objective={kind: dmpo, anchor_weight: 0.1}", "stages.mrl.strategy=long_range"],
}


@pytest.fixture(scope="module")
def base(straight_run: Jobs) -> Path:
    """The model of the supervised stages."""
    return straight_run.jobs["memory_aware"].output


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_under_zero_3_compute_what_one_does(tmp_path: Path, base: Path, way: str) -> None:
    """Rewards, advantages (by their loss) and losses of every update; each objective, critic and schedule."""
    one = mrl_jobs(tmp_path / "one", base, *WAYS[way], "training.zero_stage=0")
    two = mrl_jobs(tmp_path / "two", base, *WAYS[way], "training.zero_stage=3")
    for jobs, workers in ((one, 1), (two, 2)):
        done = jobs.run(STAGE, workers)
        assert done.returncode == 0, done.stderr[-2000:]
    alone, shared = one.history(STAGE), two.history(STAGE)
    assert len(alone) == len(shared) >= 6
    for first, second in zip(alone, shared, strict=True):
        assert first["reward"] == pytest.approx(second["reward"], abs=1e-5), first["step"]
        assert first["objective"] == pytest.approx(second["objective"], abs=1e-5), first["step"]
        assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=2e-3), first["step"]
        if "kl" in first:
            assert first["kl"] == pytest.approx(second["kl"], abs=1e-5)
        if "critic_correlation" in first:
            assert first["critic_correlation"] == pytest.approx(second["critic_correlation"], abs=1e-3)
    metrics = [read_manifest(jobs.jobs[STAGE].output).metrics for jobs in (one, two)]
    for name in ("reward_before", "reward_after", "recall_after"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-4), name
    if "kl" in alone[0]:
        assert alone[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert alone[1]["kl"] > 1e-6
        assert alone[0]["log_ratio"] < 1e-5
    assert any(row["reward_deviation"] > 0.1 for row in alone), "answers that differ in their worth"


def test_killed_run_ends_with_the_same_weights_and_the_same_episodes(tmp_path: Path, base: Path) -> None:
    """Checkpoints are written between collections. The seed twice; and killed among the updates of a collection."""
    way = WAYS["several updates of a collection, KL"]
    straight, again, killed = (mrl_jobs(tmp_path / name, base, *way) for name in ("straight", "again", "killed"))
    for done in (straight.run(STAGE), again.run_command(STAGE)):
        assert done.returncode == 0, done.stderr[-2000:]
    assert again.weights_sha256(STAGE) == straight.weights_sha256(STAGE)
    killed.run_and_kill(STAGE, step=10)
    done = killed.run_command(STAGE)
    assert done.returncode == 0, done.stderr[-2000:]
    resumed = read_manifest(killed.jobs[STAGE].output).metrics["resumed_from_step"]
    assert resumed >= 4
    assert resumed % 4 == 0
    assert killed.weights_sha256(STAGE) == straight.weights_sha256(STAGE)
    for row, other in zip(killed.history(STAGE), straight.history(STAGE), strict=True):
        for name in ("reward", "objective", "kl"):
            assert row[name] == other[name], (row["step"], name)


def test_the_critic_s_own_stage_gives_mrl_a_calibrated_one(tmp_path: Path, base: Path) -> None:
    """It leaves the policy as it was, and its critic is where the next stage starts."""
    stage = (
        "{kind: critic_pretraining, sources: [1], steps: 4, epochs: 2, global_batch_size: 8, answers: 2, held_out: 8, "
        "critic: {window: 48}, max_answer_tokens: 12, optimizer: {learning_rate: 3e-3}}"
    )
    jobs = mrl_jobs(tmp_path, base, f"stages.critic={stage}", *CRITIC)
    order = {"critic": jobs.config.stages["critic"], "mrl": jobs.config.stages["mrl"]}
    order["critic"] = order["critic"].model_copy(update={"start_from": order["mrl"].start_from})
    order["mrl"] = order["mrl"].model_copy(update={"start_from": None})
    jobs = make_jobs_of(jobs.config.model_copy(update={"stages": order}), tmp_path)
    for name in order:
        done = jobs.run(name)
        assert done.returncode == 0, done.stderr[-2000:]
    made = jobs.jobs["critic"].output
    before, after = (load_file(path / "model.safetensors") for path in (base, made))
    assert all((before[name] == after[name]).all() for name in before)
    metrics = read_manifest(made).metrics
    assert metrics["critic_error_after"] < 0.7 * metrics["critic_error_before"]
    assert (made / "critic/config.json").is_file()
    last = jobs.jobs["mrl"].output
    first, second = (load_file(path / "critic/model.safetensors") for path in (made, last))
    assert any((first[name] != second[name]).any() for name in first)
    assert jobs.history("mrl")[0]["critic_loss"] < jobs.history("critic")[0]["critic_loss"]


def test_more_workers_than_held_out_conversations(tmp_path: Path, base: Path) -> None:
    """Some have none to hold."""
    few = ["stages.mrl.held_out=2", "stages.mrl.epochs=0.4"]
    one, four = mrl_jobs(tmp_path / "one", base, *few), mrl_jobs(tmp_path / "four", base, *few)
    for jobs, workers in ((one, 1), (four, 4)):
        done = jobs.run(STAGE, workers)
        assert done.returncode == 0, done.stderr[-2000:]
    alone, shared = (read_manifest(jobs.jobs[STAGE].output).metrics for jobs in (one, four))
    for name in ("reward_before", "greedy_reward_before"):
        assert shared[name] == pytest.approx(alone[name], abs=1e-5)


def test_a_stop_in_the_middle_of_a_collection_ends_after_it(tmp_path: Path, base: Path) -> None:
    jobs = mrl_jobs(tmp_path, base, *WAYS["several updates of a collection, KL"])
    job: StageJob = jobs.jobs[STAGE]
    with jobs.forked(STAGE) as process:
        while not jobs.history(STAGE):
            assert process.poll() is None, "ended too early"
            time.sleep(0.002)
        (job.work / "stop").touch()
        done = process.wait(120)
    assert done.returncode == 3, done.stderr[-2000:]
    stopped = re.search(r"stopped as asked after step (\d+) of 24", done.stderr)
    assert stopped
    assert int(stopped[1]) % 4 == 0, "a collection is four updates"
    done = jobs.run(STAGE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_manifest(job.output).metrics["resumed_from_step"] == int(stopped[1])


def test_a_reward_that_can_t_be_had_stops_all_workers_and_nothing_is_made_up(tmp_path: Path, base: Path) -> None:
    """On one of two workers, after some updates: both end with the same error, and a checkpoint is there."""
    jobs = mrl_jobs(tmp_path, base, "training.checkpoints.every=1")
    done = jobs.run(STAGE, 2, "dist/rewarding.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank}: worker 1: the critic is away; on all ranks: True" in done.stdout
    assert not jobs.jobs[STAGE].output.exists()
    assert newest_complete(jobs.jobs[STAGE].work / "checkpoints"), "what was done is not lost"

"""Faults of workers, nodes and drivers of a Ray Train job: it resumes, or ends with one error that says whose fault."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from rxt_platform.errors import TrainingError
from rxt_platform.orchestration import ray_jobs
from rxt_platform.training.job import StageJob
from tests.chaos.faulty import infect
from tests.chaos.freezing import freeze, hold, thaw, wait_for
from tests.support import BIN, Jobs, environment, make_jobs

pytestmark = pytest.mark.chaos

STAGE = "sft"
NewJobs = Callable[..., Jobs]


def node_of(worker: psutil.Process, nodes: list[Any]) -> Any:
    """The node whose raylet has started a worker."""
    above = {parent.pid for parent in worker.parents()}
    return next(node for node in nodes if node.all_processes["raylet"][0].process.pid in above)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and three nodes of one; this process is the driver."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)  # as an own Ray, earlier here, left it
    for name, value in ray_jobs._DRIVER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [made.add_node(num_cpus=1) for _ in range(3)]
    own = {"env_vars": {"RAY_ADDRESS": made.address}}  # as `ray_jobs.connect` does: see there
    ray.init(address=made.address, log_to_driver=False, runtime_env=own)
    yield made, nodes
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def straight_pair(straight_run: Jobs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the stage's weights by two workers, undisturbed and without Ray."""
    jobs = make_jobs(tmp_path_factory.mktemp("pair"))
    jobs.jobs[STAGE] = jobs.jobs[STAGE].model_copy(update={"start": straight_run.jobs[STAGE].start})
    assert jobs.run(STAGE, workers=2).returncode == 0
    return jobs.weights_sha256(STAGE)


def sft_job(new_jobs: NewJobs, straight_run: Jobs, *overrides: str) -> tuple[Jobs, StageJob]:
    """The second stage, slow enough to be hit in the middle."""
    jobs = new_jobs("training.hang_seconds=15", *overrides)
    job = jobs.jobs[STAGE].model_copy(update={"start": straight_run.jobs[STAGE].start})
    jobs.jobs[STAGE] = job
    return jobs, job


def with_workers_held(job: StageJob, act: Callable[[list[psutil.Process]], None]) -> threading.Thread:
    """Does something with the workers, which are held still from the first checkpoint on."""

    def wait() -> None:
        workers = freeze(job.work)
        act(workers)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def raising_worker(config: dict[str, Any]) -> dict[str, Any]:
    """A Ray Train worker whose rank 1 fails in step 5, each time."""
    infect("raise", rank=1, step=5)
    return ray_jobs._train_worker(config)


def test_stopped_worker_is_replaced(new_jobs: NewJobs, straight_run: Jobs, cluster: Any, straight_pair: str) -> None:
    """SIGSTOP: the others' collective fails after `hang_seconds`, Ray replaces all, the result is the same."""
    jobs, job = sft_job(new_jobs, straight_run)
    resources = jobs.config.resources
    stopped: list[psutil.Process] = []

    def stop(workers: list[psutil.Process]) -> None:
        thaw(workers[:1])
        stopped.append(workers[1])

    thread = with_workers_held(job, stop)
    started = time.monotonic()
    ray_jobs.train(job, resources)
    thread.join(timeout=5)
    assert stopped
    assert time.monotonic() - started < 400
    failures = [
        json.loads(line) for path in (job.work / "workers").glob("failures-*") for line in path.read_text().splitlines()
    ]
    assert [one["kind"] for one in failures] == ["collective failed"]
    assert jobs.weights_sha256(STAGE) == straight_pair
    wait_for(
        lambda: not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE, "the stopped one's end"
    )


def test_killed_node_is_survived(new_jobs: NewJobs, straight_run: Jobs, cluster: Any, straight_pair: str) -> None:
    """A raylet and its worker are killed at once: the rest of the cluster goes on from the newest checkpoint."""
    made, nodes = cluster
    jobs, job = sft_job(new_jobs, straight_run)

    def kill(workers: list[psutil.Process]) -> None:
        made.remove_node(node_of(workers[1], nodes), allow_graceful=False)
        workers[1].kill()
        thaw(workers[:1])

    thread = with_workers_held(job, kill)
    metrics = ray_jobs.train(job, jobs.config.resources)
    thread.join(timeout=5)
    assert metrics["resumed_from_step"] >= 3
    assert jobs.weights_sha256(STAGE) == straight_pair


def test_exception_on_one_worker_is_one_error_on_the_driver(
    new_jobs: NewJobs, straight_run: Jobs, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again as often as `max_failures` says, then the driver names the worker, the step and the cause."""
    jobs, job = sft_job(new_jobs, straight_run)
    resources = jobs.config.resources.model_copy(update={"max_failures": 1})
    monkeypatch.setattr(ray_jobs, "_train_worker", raising_worker)
    started = time.monotonic()
    with pytest.raises(
        TrainingError, match=r"worker 1 \(process \d+ on .*\), step 5, forward: ValueError: an injected"
    ):
        ray_jobs.train(job, resources)
    assert time.monotonic() - started < 300


def test_node_that_is_taken_away_is_left_with_a_checkpoint(
    new_jobs: NewJobs, straight_run: Jobs, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drained node (spot instance): a checkpoint between the regular ones, and the job goes on elsewhere from it.

    The workers are held while the command runs, and from that checkpoint to the node's end, so that both come before
    the workers' end on any machine.
    """
    made, nodes = cluster
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    settings = ["stages.sft.epochs=40", "training.checkpoints.every=400", "training.hang_seconds=90"]
    jobs, job = sft_job(new_jobs, straight_run, *settings)

    def drain() -> None:
        wait_for(lambda: len(jobs.history(STAGE)) >= 20, "step 20", 240)
        workers = hold(job.work)
        busy = node_of(workers[0], nodes)
        command = [str(BIN / "ray"), "drain-node", "--address", made.address, "--node-id", busy.node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds"]
        try:
            subprocess.run([*command, *why, "300"], env=environment(), check=True, capture_output=True, timeout=60)
        finally:
            thaw(workers)
        workers = freeze(job.work)
        made.remove_node(busy, allow_graceful=False)
        workers[0].kill()
        thaw(workers[1:])

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    metrics = ray_jobs.train(job, jobs.config.resources)
    thread.join(timeout=5)
    assert metrics["resumed_from_step"] > 0
    assert metrics["resumed_from_step"] % 400

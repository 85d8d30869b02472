"""Steps on Ray: training as a `TorchTrainer` job, evaluation as a task. The only file here that talks to Ray."""

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from rxt_platform import errors
from rxt_platform.config.run import ResourcesConfig
from rxt_platform.config.serving import ServiceConfig
from rxt_platform.errors import ConfigError, RxtError, TrainingError
from rxt_platform.orchestration.stopping import Stopper
from rxt_platform.rl.critic import RewardService
from rxt_platform.training.job import STOP, WORKERS, StageJob, run_stage
from rxt_platform.training.measures import Metrics
from rxt_platform.training.watch import read_failures, root_cause, silent_worker

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_TOLD_BY_WORKERS = 15.0  # seconds

# Set before ray is imported: a quick health check ends a finished training group in one second instead of five.
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


def connect(resources: ResourcesConfig, service: ServiceConfig | None = None) -> bool:
    """Join the cluster of RAY_ADDRESS, or start one on this machine with the CPUs that workers and `service` need.

    Returns whether this call connected, so that whoever did also disconnects.
    """
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        # On loopback no token is needed, and an unset mode would write one into the user's home. A cluster that is
        # joined says itself what it asks for.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Of a Ray of its own, no node is taken away: without the actor that would look for it, more CPU is left.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "runtime_env": {"env_vars": _this_cluster()},
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        _check_resources(resources, service)
        return True
    cpus = max(os.cpu_count() or 1, math.ceil(_cpus(resources, service)))
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    _check_resources(resources, service)
    return True


def _this_cluster() -> dict[str, str]:
    """For what runs on Ray: where to ask about actors.

    Unset, Ray asks the cluster that was started last on the machine. Ray Train's cleaner then doesn't find its own
    controller there, takes it for dead, and removes the workers of a job that is well.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:0"}  # a Ray of its own is started without such a server
    return {} if address == "auto" else {"RAY_ADDRESS": address}  # auto: the one that was started last, here too


def _cpus(resources: ResourcesConfig, service: ServiceConfig | None) -> float:
    """That workers and replicas need together."""
    replicas = 0.0 if service is None else service.replicas * service.cpus_per_replica
    return resources.workers * resources.cpus_per_worker + replicas


def _check_resources(resources: ResourcesConfig, service: ServiceConfig | None) -> None:
    """Ray would wait for ever for resources that the cluster does not have."""
    import ray

    needed = {"CPU": _cpus(resources, service)}
    if resources.use_gpu:
        needed["GPU"] = resources.workers
    here = ray.cluster_resources()
    for name, count in needed.items():
        if here.get(name, 0) < count:
            ray.shutdown()
            raise ConfigError(
                f"resources: {resources.workers} workers {'' if service is None else 'and the critic_service '}need "
                f"{count:g} {name}, the cluster has {here.get(name, 0):g}: lower resources.workers, or add nodes"
            )


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    import ray

    ray.shutdown()


def train(
    job: StageJob, resources: ResourcesConfig, stopper: Stopper | None = None, service: RewardService | None = None
) -> Metrics:
    """Run a stage as a Ray Train job; lost workers are replaced and resume from the newest checkpoint.

    `service` goes to the workers, who ask it for MRL's rewards and values.

    Raises TrainingError with the cause when the job fails for good, StoppedError when a signal asked it to stop.
    """
    job = job.model_copy(update={"invocation": uuid.uuid4().hex[:8], "invoked": time.time()})
    stop = job.work / STOP
    stop.unlink(missing_ok=True)
    job.work.mkdir(parents=True, exist_ok=True)
    # Ray asks every worker how it is; one that says nothing (stopped, swapped out) is taken for lost, but only after
    # the workers that wait for it have had the time to say so by name.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(job.training.hang_seconds + _TOLD_BY_WORKERS)
    running: Future[dict[str, Any]] = Future()

    def fit() -> None:
        try:
            running.set_result(_fit(job, resources, service))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            running.set_exception(error)

    # Not in this thread, where Ray would handle Ctrl-C itself, without a checkpoint; as a daemon, so that a second
    # Ctrl-C ends this process whatever the workers do.
    threading.Thread(target=fit, name="fit", daemon=True).start()
    with (stopper or Stopper()).gently(stop.touch):
        while not running.done():
            wait([running], timeout=0.5)  # signals are handled between two waits
    outcome = running.result()
    if "error" in outcome:
        kind: type[RxtError] = getattr(errors, outcome["kind"])
        raise kind(f"{job.output.name}: {outcome['error']}")
    return dict(outcome["metrics"])


def _fit(job: StageJob, resources: ResourcesConfig, service: RewardService | None) -> dict[str, Any]:
    """What the workers returned: metrics, or an error and its kind."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job.model_dump_json(), "service": service},
        torch_config=TorchConfig(timeout_s=int(job.training.hang_seconds)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": 1} if resources.use_gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            # A name that is used again would make Ray resume by itself; our own checkpoints do that.
            name=f"{job.output.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.work / "ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=resources.max_failures
            ),
            worker_runtime_env={"env_vars": _worker_environment(job)},
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        workers = job.work / WORKERS
        cause = root_cause(read_failures(workers, job.invocation)) or silent_worker(workers) or _last_line(error)
        raise TrainingError(f"{job.output.name}: {cause}") from error
    if result.return_value is None:
        raise TrainingError(f"{job.output.name}: the training job ended without a result")
    outcome: dict[str, Any] = result.return_value
    return outcome


def call(function: Callable[..., Result], *arguments: Any, cpus: int) -> Result:
    """Run a function as one Ray task and wait for it."""
    import ray

    environment = {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false"}
    task = ray.remote(function).options(num_cpus=cpus, max_retries=1, runtime_env={"env_vars": environment})
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, RxtError) else error
        raise cause from None


def each(function: Callable[..., Result], items: Sequence[Any], shared: Sequence[Any]) -> list[Result]:
    """`function(item, *shared)` for every item as Ray tasks of one CPU each, results in the items' order."""
    import ray

    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    task = ray.remote(function).options(num_cpus=1, max_retries=2, runtime_env={"env_vars": environment})
    waiting = [task.remote(item, *shared) for item in items]
    try:
        return list(ray.get(waiting))
    except BaseException as error:  # Ctrl-C too: no task may go on writing into a folder that is removed
        for other in waiting:
            ray.cancel(other, force=True)
        ray.wait(waiting, num_returns=len(waiting), timeout=30)
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, RxtError):
            raise error.cause from None
        if isinstance(error, ray.exceptions.RayError):
            lines = str(error).strip().splitlines()
            raise TrainingError(f"a task of {function.__name__} was lost: {lines[-1]}") from error
        raise


def _worker_environment(job: StageJob) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(job.cpus),
        "DS_ACCELERATOR": "cuda" if job.use_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker does: the stage's job.

    Its metrics go to the run's storage, from where the driver takes them: `ray.train.report` waits for the controller,
    which looks only every half second (0.46 s a report where reports follow each other, benchmarks/LOG.md).
    """
    import ray.train

    preempted = saved = False

    def look_ahead(step: int, metrics: Metrics) -> None:
        nonlocal preempted
        preempted = ray.train.get_preemption_info() is not None  # all workers must ask equally often

    def save_now() -> bool:
        """Once, when a node is about to be taken away; Ray then starts the workers anew on others."""
        nonlocal saved
        first, saved = preempted and not saved, saved or preempted
        return first

    try:
        job = StageJob.model_validate_json(config["job"])
        return {"metrics": run_stage(job, look_ahead, checkpoint_requested=save_now, service=config["service"])}
    except RxtError as error:
        if not error.on_all_ranks and ray.train.get_context().get_world_size() > 1:
            raise  # the other workers wait for this one: Ray must end them
        logger.exception("the stage stopped")
        return {"error": str(error), "kind": type(error).__name__}


def _last_line(error: BaseException) -> str:
    """The innermost message of a failed job, in one line."""
    failures = getattr(error, "worker_failures", None)
    inner: BaseException = next(iter(failures.values())) if failures else error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = str(inner).strip().splitlines()
    return lines[-1] if lines else type(inner).__name__

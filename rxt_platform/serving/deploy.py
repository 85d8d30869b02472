"""Start and end the service on the Ray that this process is connected to."""

import logging
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rxt_platform.config.serving import ServiceConfig, ServingConfig
from rxt_platform.errors import ConfigError, RewardError
from rxt_platform.rl import versions
from rxt_platform.serving.auth import digest
from rxt_platform.serving.replica import CriticService
from rxt_platform.serving.schema import APP
from rxt_platform.serving.worker import Worker, read_critic

logger = logging.getLogger(__name__)

_SPARE = 8  # requests beyond a replica's own queue, which it refuses itself
_POLL_S = 0.2
_GRACE_S = 10.0
# The mode that it turns on listens on all interfaces, whatever host was asked for.
_NO_HA_PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


@dataclass(frozen=True)
class Deployment:
    """A running service: its name for handles, and its address if it has an HTTP side."""

    app: str
    address: str | None
    owns_serve: bool


def deploy(
    config: ServingConfig, *, http: bool, token: str | None = None, name: str = APP, deadline_s: float = 120.0
) -> Deployment:
    """Start the service and wait until it answers; without `http` it can be reached by handle only.

    What can be wrong with model, embedding, versions, CPUs and port is looked for before anything starts: ConfigError
    or ArtifactError. Raises RewardError that says what it waited for if the service is not ready in time; nothing is
    left of it then.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of its progress this process tells itself
    before = serve.status()
    owns = not before.applications and not before.proxies
    _check(config, http, token, name in before.applications, owns)
    serve.start(
        proxy_location="HeadOnly" if http else "Disabled",
        http_options={
            "host": config.service.host,
            "port": config.service.port,
            "request_timeout_s": config.service.request_timeout_s + 5,  # the replica's own answer comes first
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        controller_options={"runtime_env": {"env_vars": _NO_HA_PROXY}},
    )
    made = Deployment(name, f"http://{config.service.host}:{config.service.port}" if http else None, owns)
    try:
        target = serve.RunTarget(_application(config, token), name=name, route_prefix="/" if http else None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait(made, deadline_s)
    except BaseException:
        undeploy(made)
        raise
    return made


def remove_leftover(name: str) -> None:
    """End an application that a killed driver left behind. Only for who alone may use that name."""
    from ray import serve

    if name in serve.status().applications:
        logger.warning("ending the service %s, which was left behind", name)
        serve.delete(name)


def undeploy(deployment: Deployment, serve_too: bool = True) -> None:
    """End the service after the requests that it computes; and Serve, if it was started for this service alone.

    Serve may be left to a Ray that ends right after.
    """
    from ray import serve

    serve.delete(deployment.app)
    if serve_too and deployment.owns_serve and not serve.status().applications:
        serve.shutdown()


def _check(config: ServingConfig, http: bool, token: str | None, taken: bool, owns: bool) -> None:
    """Raises ConfigError or ArtifactError for what would only fail, or wait for ever, once it is started."""
    import ray

    service = config.service
    if http and token is None:
        raise ConfigError("the HTTP side needs a token: see rxt_platform.serving.auth.read_token")
    if taken:
        raise ConfigError("an application of that name is deployed already: undeploy it, or choose another name")
    if config.model is None and config.versions is None and config.reward_model is None:
        logger.info("no model: rewards only")
    _seed_versions(config)
    Worker(config)  # what is wrong with a model, a replica could only say in its log
    needed, there = service.replicas * service.cpus_per_replica, ray.cluster_resources().get("CPU", 0.0)
    if needed > there:
        raise ConfigError(
            f"{service.replicas} replicas of {service.cpus_per_replica:g} CPUs need {needed:g}, the cluster has "
            f"{there:g}: lower replicas or cpus_per_replica, or add nodes"
        )
    if http and owns:
        _check_port(service)


def _check_port(service: ServiceConfig) -> None:
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((service.host, service.port))
        except OSError as error:
            raise ConfigError(f"{service.host}:{service.port}: {error.strerror}: choose another port") from None


def _seed_versions(config: ServingConfig) -> None:
    """A model that is given beside an empty versions folder becomes its version 0."""
    if config.model is None or config.versions is None:
        return
    root, critic = Path(config.versions), read_critic(Path(config.model))
    there = versions.available(root)
    if critic is not None and (not there or there[0] == 0):
        versions.publish(root, 0, critic)  # if it is there, checks that it is this one


def _application(config: ServingConfig, token: str | None) -> Any:
    """The Serve application. Its own bound, for callers that come in crowds, is a little above the replicas'."""
    from ray import serve

    service = config.service
    scaling: dict[str, Any] = {"num_replicas": service.replicas}
    if service.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": service.replicas,
                "max_replicas": service.max_replicas,
                "target_ongoing_requests": 2,
                "upscale_delay_s": 5,
            }
        }
    inside = 1 + service.max_queued_requests + _SPARE
    made = serve.deployment(
        name="CriticService",
        ray_actor_options={
            "num_cpus": service.cpus_per_replica,
            "runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        },
        max_ongoing_requests=inside,
        max_queued_requests=inside * service.most_replicas,
        backpressure_config={"retry_after_s": 1},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=min(_GRACE_S, service.request_timeout_s),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **scaling,
    )(serve.ingress()(CriticService))
    return made.bind(config, digest(token) if token is not None else None)


def _wait(made: Deployment, deadline_s: float) -> None:
    """Until all replicas run and, with an HTTP side, it answers. Raises RewardError with what is still missing."""
    deadline = time.monotonic() + deadline_s
    while True:
        ready, state = _state(made)
        if ready:
            return
        if time.monotonic() > deadline:
            raise RewardError(f"the service {made.app!r} was not ready within {deadline_s:g} s: {state}")
        time.sleep(_POLL_S)


def _state(made: Deployment) -> tuple[bool, str]:
    from ray import serve

    application = serve.status().applications.get(made.app)
    if application is None:
        return False, "Serve has not taken it up yet"
    details = [application.message, *(one.message for one in application.deployments.values())]
    told = "; ".join(line for line in details if line)
    if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise RewardError(f"the service {made.app!r} cannot start: {told.strip()[-800:]}")
    if application.status != "RUNNING":
        return False, f"it is {str(application.status.value).lower()}: {told}"
    if made.address is None:
        return True, ""
    try:
        with urllib.request.urlopen(f"{made.address}/healthz", timeout=5) as answer:
            return answer.status == 200, f"{made.address}/healthz answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return False, f"{made.address}/healthz: {error}; was Serve started here before, with another host or port?"

"""`rxt serve`: answer others' requests until stopped. Thin: what is served is a room of its own."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rxt_platform.errors import ConfigError

if TYPE_CHECKING:
    from rxt_platform.config.serving import ServingConfig

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.group()
def serve() -> None:
    """Serve a model to other programs."""


@serve.command()
@click.argument("model", required=False)
@click.option("--versions", metavar="DIR", help="Values by the versions that a trainer publishes in this folder.")
@click.option("--config", metavar="FILE.yaml", help="Sections `service` (limits, ...) and `rewards`; options win.")
@click.option("--host", help="Where to listen.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 2**16 - 1), help="[default: 8000]")
@click.option("--expose", is_flag=True, default=None, help="Allow a --host that other machines can reach.")
@click.option("--replicas", type=click.IntRange(min=1), help="[default: 1]")
@click.option("--max-replicas", type=click.IntRange(min=1), help="Start more under load, up to so many.")
@click.option("--cpus", type=click.FloatRange(min=0, min_open=True), help="Of each replica.  [default: 1]")
@click.option(
    "--meaning",
    type=click.Choice(["hashed", "tokens", "encoder"]),
    help="What the rewards' cosine compares.  [default: hashed; tokens with --reward-model]",
)
@click.option("--reward-model", metavar="DIR", help="Take the rewards' token embedding or encoder from this model.")
@click.option("--token-file", metavar="FILE", help="The token that requests must carry, instead of RXT_SERVE_TOKEN.")
def critic(
    model: str | None,
    versions: str | None,
    config: str | None,
    token_file: str | None,
    meaning: str | None,
    reward_model: str | None,
    cpus: float | None,
    **service: Any,
) -> None:
    """Rewards of answers and values of states over HTTP, until Ctrl-C or SIGTERM.

    MODEL is an encoder with a value head; of a Reactive Transformer there are only rewards. With --versions it becomes
    version 0 if the folder is empty, and may be left out. Joins the cluster of RAY_ADDRESS, or starts Ray here.
    """
    from rxt_platform.serving.auth import read_token

    if model is None and versions is None and config is None:
        raise ConfigError("nothing to serve: give a MODEL, --versions, or --config")
    options = {
        "model": model,
        "versions": versions,
        "meaning": meaning or ("tokens" if reward_model else None),
        "reward_model": reward_model,
        "service": {**service, "cpus_per_replica": cpus},
    }
    run_service(load_serving(config, options), read_token(Path(token_file) if token_file else None))


def load_serving(path: str | None, options: dict[str, Any]) -> "ServingConfig":
    """A YAML file with the options that are not None put over it. Raises ConfigError that names the key and the fix."""
    import yaml
    from pydantic import ValidationError

    from rxt_platform.config.loading import describe
    from rxt_platform.config.serving import ServingConfig

    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("service", {}), dict):
            raise ConfigError(f"{path}: not a mapping with sections such as `service` and `rewards`")
    service = {key: value for key, value in options["service"].items() if value is not None}
    given = {key: value for key, value in options.items() if value is not None}
    merged = {**raw, **given, "service": {**raw.get("service", {}), **service}}
    try:
        return ServingConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{path or 'options'}: {describe(error, ServingConfig, merged)}") from None


def run_service(config: "ServingConfig", token: str) -> None:
    """Serve until a signal, then end the service, and Ray if it was started here."""
    import os

    from rxt_platform.config.run import ResourcesConfig
    from rxt_platform.orchestration import ray_jobs
    from rxt_platform.serving.deploy import deploy, undeploy

    cpus = max(1, math.ceil(config.service.replicas * config.service.cpus_per_replica))
    own_ray = not os.environ.get("RAY_ADDRESS")
    with _until_a_signal() as listen:
        try:
            ray_jobs.connect(ResourcesConfig(workers=cpus))
            listen()  # ray.init put its own handlers in place
            made = deploy(config, http=True, token=token)
            try:
                click.echo(f"serving on {made.address} (how: {made.address}/docs); Ctrl-C ends it")
                while True:
                    time.sleep(1)
            finally:
                undeploy(made, serve_too=not own_ray)
        finally:
            ray_jobs.disconnect()


@contextmanager
def _until_a_signal() -> Iterator[Any]:
    """The first SIGTERM or Ctrl-C leaves the block through its clean-up, without an error; the second interrupts it."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def stop(number: int, frame: Any) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.default_int_handler)
        raise _Stop

    def listen() -> None:
        for number in _SIGNALS:
            signal.signal(number, stop)

    listen()
    try:
        yield listen
    except _Stop:
        click.echo("stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop(BaseException):
    """Asked to stop."""

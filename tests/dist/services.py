"""Servers that tests start as a user does."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from tests.support import BIN, environment


def free_port() -> int:
    """A port below those that Ray gives to its workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port > 20_000:
            return port


@contextmanager
def service(command: list[str], *ready: str, seconds: float = 90) -> Iterator[None]:
    """A server process in a group of its own, waited for at URLs, and ended with everything that it started."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + seconds
        for url in ready:
            while not _answers(url):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < deadline, f"waited {seconds} s for {url}"
                time.sleep(0.5)
        yield
    finally:
        process.terminate()  # only this one, which ends the others
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Head(NamedTuple):
    """A Ray cluster's addresses."""

    address: str
    dashboard: str


@contextmanager
def ray_head() -> Iterator[Head]:
    """A Ray cluster of one node with its dashboard, started as a user does."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats"),
        *("--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)),
    ]
    url = f"http://127.0.0.1:{dashboard}"
    with service(command, f"{url}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
        yield Head(f"127.0.0.1:{port}", url)


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False

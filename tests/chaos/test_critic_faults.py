"""Faults of the reward and critic service: a replica killed or frozen, twice the load; all end bounded and right."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
import pytest

from rxt_platform.config.run import ResourcesConfig
from rxt_platform.config.serving import ServiceConfig, ServingConfig
from rxt_platform.errors import RewardError
from rxt_platform.orchestration import ray_jobs
from rxt_platform.rl import versions
from rxt_platform.serving.client import CriticClient, HandleClient, HttpClient
from rxt_platform.serving.deploy import Deployment, deploy, undeploy
from tests.chaos.freezing import wait_for
from tests.dist.services import free_port
from tests.dist.test_critic_service import critic, replicas, values_of
from tests.unit.helpers import rows_of

pytestmark = pytest.mark.chaos

TOKEN = "a-token-of-a-test-0123456789"
QUEUED = 3
CROWD = 80
ROWS = rows_of(*(1 + 7 * n % 60 for n in range(256)), vocab=300)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    for version in (0, 1):
        versions.publish(folder, version, critic(version))
    return folder


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[Deployment]:
    """Two replicas."""
    ray_jobs.connect(ResourcesConfig(workers=2))
    limits = ServiceConfig(port=free_port(), replicas=2, cpus_per_replica=0.5, max_queued_requests=QUEUED)
    made = deploy(ServingConfig(service=limits, versions=str(root)), http=True, token=TOKEN, deadline_s=180)
    yield made
    undeploy(made)
    ray_jobs.disconnect()


def address(service: Deployment) -> str:
    assert service.address is not None
    return service.address


class Load:
    """Clients that ask on and on, each checking what comes back against the model of the version it asked for."""

    def __init__(self, service: Deployment, number: int) -> None:
        rows = ROWS[:64]
        self._expected = {version: np.array(values_of(critic(version), rows)) for version in (0, 1)}
        self._rows, self._stop = rows, threading.Event()
        self.right, self.wrong = 0, 0
        self.errors: list[RewardError] = []
        self.longest = 0.0
        self._threads = [threading.Thread(target=self._ask, args=(service, n), daemon=True) for n in range(number)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, service: Deployment, number: int) -> None:
        client: CriticClient
        client = HandleClient(service.app) if number % 2 else HttpClient(address(service), TOKEN)
        version = number // 2 % 2
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                found = np.array(client.values(self._rows, version))
            except RewardError as error:
                self.errors.append(error)
                continue
            self.longest = max(self.longest, time.monotonic() - started)
            if np.abs(found - self._expected[version]).max() < 1e-5:
                self.right += 1
            else:
                self.wrong += 1


def test_a_replica_killed_under_load_costs_no_answer(service: Deployment) -> None:
    """Clients see neither an error nor a wrong value, and a new replica comes."""
    before = replicas()
    assert len(before) == 2
    with Load(service, 4) as load:
        wait_for(lambda: load.right > 20, "answers")
        os.kill(before[0].pid, signal.SIGKILL)
        answered = load.right
        wait_for(lambda: load.right > answered + 20, "answers of the other one")
        wait_for(lambda: len({one.pid for one in replicas()} - {before[0].pid}) == 2, "a new replica")
        answered = load.right
        wait_for(lambda: load.right > answered + 20, "answers")
    assert load.errors == []
    assert load.wrong == 0
    assert load.longest < 30


def test_a_frozen_service_is_an_error_at_the_client_s_deadline(service: Deployment) -> None:
    """With one replica frozen the other answers; with both, a call ends when its own deadline passes."""
    one, other = (process.pid for process in replicas())
    clients: list[CriticClient] = [
        HandleClient(service.app, deadline_s=4, attempt_s=1.5),
        HttpClient(address(service), TOKEN, deadline_s=4, attempt_s=1.5),
    ]
    patient = HandleClient(service.app, deadline_s=30, attempt_s=1.5)
    expected = pytest.approx(values_of(critic(1), ROWS[:4]), abs=1e-5)
    for client in [*clients, patient]:
        assert client.values(ROWS[:4], 1) == expected
    try:
        os.kill(one, signal.SIGSTOP)
        for _ in range(3):
            assert patient.values(ROWS[:4], 1) == expected
        os.kill(other, signal.SIGSTOP)
        for client in clients:
            started = time.monotonic()
            with pytest.raises(RewardError, match=r"no value for 4 rows by version 1 after .*given up after 4 s"):
                client.values(ROWS[:4], 1)
            assert time.monotonic() - started < 8
    finally:
        for pid in (one, other):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)
    assert patient.values(ROWS[:4], 1) == expected


def test_a_crowd_is_refused_not_queued(service: Deployment) -> None:
    """Many at once: 503 for most, and who is accepted does not wait as long as all of them would take."""
    wait_for(lambda: len(replicas()) == 2, "two replicas")
    body = json.dumps({"version": 1, "input_ids": ROWS}).encode()
    expected = np.array(values_of(critic(1), ROWS))
    capacity, answers = asyncio.run(_crowd(address(service), body, CROWD))
    longest = max(seconds for seconds, status, _ in answers if status == 200)
    statuses = [status for _, status, _ in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(503) > CROWD / 2
    assert longest < CROWD / capacity / 2 + 1, f"at {capacity:.1f} answers a second"
    for _, status, answer in answers:
        if status == 200:
            assert np.abs(np.array(answer["values"]) - expected).max() < 1e-5
        else:
            assert answer["error"] == "busy"
    assert HandleClient(service.app).values(ROWS[:4], 1) == pytest.approx(expected[:4].tolist(), abs=1e-5)


async def _crowd(address: str, body: bytes, number: int) -> tuple[float, list[tuple[float, int, Any]]]:
    """Requests a second of a closed loop of four, and of so many at once the seconds, status and content of each."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(
        base_url=address, headers=headers, timeout=120, limits=limits, trust_env=False
    ) as client:

        async def ask() -> tuple[float, int, Any]:
            started = time.monotonic()
            answer = await client.post("/v1/value", content=body)
            told = answer.json() if "json" in answer.headers["content-type"] else {"error": "busy"}  # Serve's own 503
            return time.monotonic() - started, answer.status_code, told

        async def closed(until: float) -> int:
            done = 0
            while time.monotonic() < until:
                done += (await ask())[1] == 200
            return done

        started = time.monotonic()
        done = await asyncio.gather(*(closed(started + 2.5) for _ in range(4)))
        capacity = sum(done) / (time.monotonic() - started)
        return capacity, await asyncio.gather(*(ask() for _ in range(number)))

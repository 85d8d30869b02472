"""What the reward and critic service does a second, and under trouble: overload, a killed replica, new weights.

    python benchmarks/critic_service.py [--seconds 5]

The `tiny` preset's encoder with a value head, random weights, rows of 16 to 128 tokens. A closed loop
has two clients for each replica. Clients are threads of this process and share the machine with the replicas.
Each value tells the version that it is by, so that a wrong or a mixed answer would show.
"""

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import httpx2 as httpx
import numpy as np
import psutil
import torch
from timing import Machine, machine_options, report

from rxt_platform import RxTEncoder
from rxt_platform.config.loading import load_preset
from rxt_platform.config.model import HeadConfig
from rxt_platform.config.run import ResourcesConfig
from rxt_platform.config.serving import ServiceConfig, ServingConfig
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import RewardError
from rxt_platform.orchestration import ray_jobs
from rxt_platform.rl import versions
from rxt_platform.serving.client import CriticClient, HandleClient, HttpClient
from rxt_platform.serving.deploy import Deployment, deploy, undeploy
from rxt_platform.serving.worker import values_of

TOKEN = "a-token-of-a-benchmark-0123456789"
APART = 100.0  # a version's values lie between its number times this and 10 more
QUEUED = 4
CLIENTS = 6  # of the closed loop that says what two replicas can do
Rows = list[list[int]]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def critic(version: int) -> RxTEncoder:
    """Weights of a version; the values tell its number."""
    torch.manual_seed(version)
    tokenizer = RxtTokenizer.train(["What has Tom? Tom has a red hat."], 300)
    model = RxTEncoder(load_preset("tiny"), HeadConfig(kind="value"), tokenizer).eval()
    model.head.shift.data.fill_(APART * version)
    return model


def make_rows(count: int, seed: int) -> Rows:
    """Random rows of 16 to 128 tokens."""
    drawn = random.Random(seed)
    vocab = load_preset("tiny").vocab_size
    return [[drawn.randrange(11, vocab) for _ in range(drawn.randint(16, 128))] for _ in range(count)]


def replicas() -> set[int]:
    """Process ids of those that compute."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ServeReplica:critic:" in part for part in process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


class Load:
    """Clients in threads, each asking for `rows` again and again by the version that `version()` says."""

    def __init__(self, make: Callable[[], CriticClient], number: int, rows: Rows, version: Callable[[], int]) -> None:
        self.seconds: list[float] = []
        self.by_version: Counter[int] = Counter()
        self.wrong = self.mixed = self.errors = 0
        self._make, self._rows, self._version = make, rows, version
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._expected: dict[int, np.ndarray] = {}
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(number)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(180)

    def expect(self, version: int) -> None:
        """Compute here what the values by a version must be."""
        self._expected[version] = np.array(values_of(critic(version), self._rows, 2048, lambda: None))

    def _ask(self) -> None:
        client = self._make()
        while not self._stop.is_set():
            version = self._version()
            started = time.perf_counter()
            try:
                found = np.array(client.values(self._rows, version))
            except RewardError:
                with self._lock:
                    self.errors += 1
                continue
            seconds = time.perf_counter() - started
            by = np.floor_divide(found, APART).astype(int)
            wrong = version in self._expected and np.abs(found - self._expected[version]).max() > 1e-3
            with self._lock:
                self.seconds.append(seconds)
                self.by_version[version] += 1
                self.mixed += bool((by != version).any())
                self.wrong += bool(wrong)


def throughput(make: Callable[[], CriticClient], clients: int, rows: Rows, seconds: float) -> dict[str, float]:
    """Rows a second and latencies of a closed loop."""
    make().values(rows, 0)
    load = Load(make, clients, rows, lambda: 0)
    load.expect(0)
    started = time.perf_counter()
    with load:
        time.sleep(seconds)
    elapsed = time.perf_counter() - started
    if load.wrong or load.errors:
        raise click.ClickException(f"{load.wrong} wrong answers, {load.errors} errors in a quiet loop")
    return {
        "rows_per_s": len(load.seconds) * len(rows) / elapsed,
        "p50_ms": 1000 * statistics.median(load.seconds),
        "p99_ms": 1000 * float(np.quantile(load.seconds, 0.99)),
        "requests": len(load.seconds),
    }


def killed(made: Deployment, rows: Rows) -> dict[str, float]:
    """A replica gets SIGKILL while four clients ask, two by handle and two by HTTP."""
    kinds = iter([HandleClient, HttpClient] * 2)
    load = Load(lambda: client_of(next(kinds), made), 4, rows, lambda: 0)
    load.expect(0)
    before = replicas()
    with load:
        wait_for(lambda: len(load.seconds) > 20)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        started = time.perf_counter()
        wait_for(lambda: len(replicas() - {victim}) == len(before))
        recovered = time.perf_counter() - started
        answers = len(load.seconds)
        wait_for(lambda: len(load.seconds) > answers + 20)
    return {
        "wrong": load.wrong,
        "errors": load.errors,
        "seconds_to_recover": recovered,
        "longest_call_s": max(load.seconds),
        "answers": len(load.seconds),
    }


def updated(made: Deployment, root: Path, rows: Rows, number: int) -> dict[str, Any]:
    """New weights are published under load; clients ask for the newest and the one before."""
    newest = [0]
    load = Load(lambda: client_of(HandleClient, made), 4, rows, lambda: max(0, newest[0] - (random.random() < 0.3)))
    load.expect(0)
    made_ahead = [critic(version) for version in range(1, number + 1)]
    publishing = []
    with load:
        for version, model in enumerate(made_ahead, start=1):
            time.sleep(1.0)
            load.expect(version)
            started = time.perf_counter()
            versions.publish(root, version, model)
            publishing.append(time.perf_counter() - started)
            newest[0] = version
        time.sleep(1.0)
    return {
        "wrong": load.wrong,
        "mixed": load.mixed,
        "errors": load.errors,
        "by_version": {str(version): count for version, count in sorted(load.by_version.items())},
        "publish_s": statistics.median(publishing),
        "longest_call_s": max(load.seconds),
    }


async def overload(address: str, rows: Rows, seconds: float) -> dict[str, float]:
    """An open loop at twice what a closed one of six clients reaches, by HTTP, without trying again."""
    body = json.dumps({"version": 0, "input_ids": rows}).encode()
    options: dict[str, Any] = {"base_url": address, "timeout": 60, "limits": httpx.Limits(max_connections=500)}
    async with httpx.AsyncClient(**options, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:

        async def ask() -> tuple[float, int]:
            started = time.perf_counter()
            answer = await client.post("/v1/value", content=body)
            return time.perf_counter() - started, answer.status_code

        async def closed(until: float) -> list[float]:
            taken = []
            while time.perf_counter() < until:
                elapsed, status = await ask()
                if status == 200:
                    taken.append(elapsed)
            return taken

        started = time.perf_counter()
        loops = await asyncio.gather(*(closed(started + seconds) for _ in range(CLIENTS)))
        quiet = [taken for loop in loops for taken in loop]
        capacity = len(quiet) / (time.perf_counter() - started)
        asked = []
        started = time.perf_counter()
        for n in range(int(2 * capacity * seconds)):
            await asyncio.sleep(max(0.0, started + n / (2 * capacity) - time.perf_counter()))
            asked.append(asyncio.create_task(ask()))
        answers = await asyncio.gather(*asked)
        elapsed = time.perf_counter() - started
    accepted = [taken for taken, status in answers if status == 200]
    statuses = Counter(status for _, status in answers)
    if other := set(statuses) - {200, 503}:
        raise click.ClickException(f"statuses {other} under overload")
    return {
        "capacity_per_s": capacity,
        "share_503": statuses[503] / len(answers),
        "p99_quiet_ms": 1000 * float(np.quantile(quiet, 0.99)),
        "p50_accepted_ms": 1000 * statistics.median(accepted),
        "p99_accepted_ms": 1000 * float(np.quantile(accepted, 0.99)),
        "accepted_per_s": len(accepted) / elapsed,
    }


def client_of(kind: type[CriticClient], made: Deployment) -> CriticClient:
    """A client of its own for each thread."""
    if kind is HandleClient:
        return HandleClient(made.app)
    assert made.address is not None
    return HttpClient(made.address, TOKEN)


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise click.ClickException(f"waited {seconds} s in vain")
        time.sleep(0.01)


@click.command()
@machine_options
@click.option("--seconds", default=5.0, show_default=True, help="of each closed loop")
@click.option("--sizes", default="1,64,512", show_default=True, help="rows a request")
@click.option("--new-versions", default=5, show_default=True, help="published under load, one a second")
def main(machine: Machine, seed: int, json_file: Path | None, seconds: float, sizes: str, new_versions: int) -> None:
    """Measure one replica, then two, then two in trouble."""
    counts = [int(size) for size in sizes.split(",")]
    rows = make_rows(max(*counts, 64), seed)
    results: dict[str, Any] = {"in_process": in_process(rows, counts), "service": {}}
    ray_jobs.connect(ResourcesConfig(workers=2))
    try:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name) / "versions"
            versions.publish(root, 0, critic(0))
            for number in (1, 2):
                limits = ServiceConfig(port=free_port(), replicas=number, max_queued_requests=QUEUED)
                config = ServingConfig(service=limits, versions=str(root))
                made = deploy(config, http=True, token=TOKEN, deadline_s=300)
                for kind in (HandleClient, HttpClient):
                    for count in counts:
                        found = throughput(lambda k=kind, m=made: client_of(k, m), 2 * number, rows[:count], seconds)  # type: ignore[misc]
                        results["service"][f"{number} {kind.__name__} {count}"] = found
                if number == 2:
                    assert made.address is not None
                    results["overload"] = asyncio.run(overload(made.address, rows[:64], seconds))
                    results["update"] = updated(made, root, rows[:64], new_versions)
                    results["kill"] = killed(made, rows[:64])
                undeploy(made)
    finally:
        ray_jobs.disconnect()
    show(results)
    report("critic_service", machine, {"seconds": seconds, "sizes": counts}, results, json_file)


def in_process(rows: Rows, counts: Sequence[int]) -> dict[str, float]:
    """Rows a second of the same computing without a service."""
    model = critic(0)
    found = {}
    for count in counts:
        values_of(model, rows[:count], 2048, lambda: None)
        times = []
        until = time.perf_counter() + 1
        while time.perf_counter() < until:
            started = time.perf_counter()
            values_of(model, rows[:count], 2048, lambda: None)
            times.append(time.perf_counter() - started)
        found[str(count)] = count / statistics.median(times)
    return found


def show(results: dict[str, Any]) -> None:
    """The tables."""
    print("| replicas | by | rows a request | rows/s | p50 ms | p99 ms |\n|---|---|---|---|---|---|")
    for count, rate in results["in_process"].items():
        print(f"| none | in process | {count} | {rate:,.0f} | | |")
    for name, one in results["service"].items():
        number, kind, count = name.split()
        by = "handle" if kind == HandleClient.__name__ else "HTTP"
        print(f"| {number} | {by} | {count} | {one['rows_per_s']:,.0f} | {one['p50_ms']:.1f} | {one['p99_ms']:.1f} |")
    over, update, kill = results["overload"], results["update"], results["kill"]
    accepted = f"{over['accepted_per_s']:.0f}/s, p50 {over['p50_accepted_ms']:.0f} ms"
    facts = {
        "closed loop of six clients, HTTP": f"{over['capacity_per_s']:.0f}/s, p99 {over['p99_quiet_ms']:.0f} ms",
        "open loop at twice that, accepted": f"{accepted}, p99 {over['p99_accepted_ms']:.0f} ms",
        "share of 503": f"{over['share_503']:.0%}",
        "new weights: answers by version": ", ".join(f"{v}: {n}" for v, n in update["by_version"].items()),
        "mixed, wrong, failed answers": f"{update['mixed']}, {update['wrong']}, {update['errors']}",
        "publishing; longest call": f"{update['publish_s']:.2f} s; {update['longest_call_s']:.2f} s",
        "replica killed: wrong, failed of all answers": f"{kill['wrong']}, {kill['errors']} of {kill['answers']}",
        "new replica after; longest call": f"{kill['seconds_to_recover']:.1f} s; {kill['longest_call_s']:.2f} s",
    }
    print("\n| under trouble: 2 replicas, 64 rows a request | |\n|---|---|")
    for name, fact in facts.items():
        print(f"| {name} | {fact} |")


if __name__ == "__main__":
    main()

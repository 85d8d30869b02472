"""The reward and critic service on a real Ray Serve: the same numbers as in process, exact versions, refusals, no rest.

Slow because Serve and its replicas start once (20 s and more on a busy machine), and `rxt serve critic` once more.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from rxt_platform import RxTEncoder
from rxt_platform.config.model import HeadConfig
from rxt_platform.config.rewards import RewardConfig
from rxt_platform.config.run import ResourcesConfig
from rxt_platform.config.serving import ServiceConfig, ServingConfig
from rxt_platform.errors import ArtifactError, ConfigError, RewardError
from rxt_platform.orchestration import ray_jobs
from rxt_platform.rl import versions
from rxt_platform.rl.rewards import HashedEmbedding, ScoredTurn, score_conversations
from rxt_platform.serving.client import CriticClient, HandleClient, HttpClient
from rxt_platform.serving.deploy import Deployment, deploy, undeploy
from tests.dist.services import free_port
from tests.support import BIN, ROOT, environment
from tests.unit.helpers import padded, rows_of, tiny_config, word_tokenizer

pytestmark = pytest.mark.dist

CONFIG = tiny_config(vocab_size=300, max_length=64)
TOKEN = "a-token-of-a-test-0123456789"
REWARDS = RewardConfig(scale=7.0)
ROWS = rows_of(*(1 + 7 * n % 60 for n in range(200)), vocab=300)


def critic(version: int) -> RxTEncoder:
    """An encoder whose values tell its version: they lie between it and one more."""
    with torch.random.fork_rng():
        torch.manual_seed(version)
        model = RxTEncoder(CONFIG, HeadConfig(kind="value", scale=1.0), word_tokenizer()).eval()
    model.head.shift.data.fill_(float(version))
    return model


def values_of(model: RxTEncoder, rows: Sequence[Sequence[int]]) -> list[float]:
    with torch.inference_mode():
        return model(*padded(rows))[:, 0].tolist()


def replicas(app: str = "critic") -> list[psutil.Process]:
    """The processes that compute."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(f"ServeReplica:{app}:" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    versions.publish(folder, 0, critic(0))
    return folder


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[Deployment]:
    """Two replicas by handle and HTTP on a Ray of two CPUs, half of one each."""
    ray_jobs.connect(ResourcesConfig(workers=2))
    limits = ServiceConfig(
        port=free_port(), replicas=2, cpus_per_replica=0.5, max_body_bytes=200_000, max_rows=128, max_queued_requests=2
    )
    made = deploy(
        ServingConfig(service=limits, rewards=REWARDS, versions=str(root)), http=True, token=TOKEN, deadline_s=180
    )
    yield made
    undeploy(made)
    assert replicas() == []
    ray_jobs.disconnect()


def client_of(kind: str, service: Deployment, **options: float) -> CriticClient:
    return HandleClient(service.app, **options) if kind == "handle" else HttpClient(_at(service), TOKEN, **options)


def _at(service: Deployment) -> str:
    assert service.address is not None
    return service.address


def post(service: Deployment, path: str, body: bytes, token: str | None = TOKEN) -> tuple[int, dict[str, Any], Any]:
    """Status, body and headers of a plain HTTP request."""
    request = urllib.request.Request(f"{service.address}{path}", data=body)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


# ---- the same numbers


@pytest.mark.parametrize("kind", ["handle", "http"])
def test_rewards_are_those_of_the_same_process(kind: str, service: Deployment) -> None:
    said = ["Tom has a red hat.", "What has Tom?", "Lily likes cake.", "plays near the lake"]
    talks = [
        [
            ScoredTurn(
                said[n % 4],
                said[(n + 1) % 4],
                said[(n + turn) % 4],
                None if not turn else said[turn % 4],
                spans=(None, ("red hat",), ())[n % 3],
                mode=("standard", "long_range", "topic_change")[n % 5 % 3] if turn else "standard",
            )
            for turn in range(n % 4 + 1)
        ]
        for n in range(100)
    ]
    assert sum(map(len, talks)) > 128, "more than one request"
    found = client_of(kind, service).score(talks)
    expected = score_conversations(talks, REWARDS, HashedEmbedding())
    assert [len(row) for row in found] == [len(talk) - 1 for talk in talks]
    for ours, theirs in zip(chain(*found), chain(*expected), strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), abs=1e-9)
    assert {one.recall for one in chain(*found)} == {None, 0.0, 1.0}


@pytest.mark.parametrize("kind", ["handle", "http"])
def test_values_are_those_of_the_model(kind: str, service: Deployment) -> None:
    found = client_of(kind, service).values(ROWS, 0)
    assert found == pytest.approx(values_of(critic(0), ROWS), abs=1e-5)


def test_a_client_works_in_a_ray_worker_too(service: Deployment) -> None:
    client = HandleClient(service.app)
    client.values(ROWS[:1], 0)  # it is in use when it is sent

    def ask(client: HandleClient, rows: list[list[int]]) -> list[float]:
        return client.values(rows, 0)

    found = ray.get(ray.remote(ask).options(num_cpus=0.5).remote(client, ROWS[:9]))
    assert found == pytest.approx(values_of(critic(0), ROWS[:9]), abs=1e-5)


# ---- versions


def test_a_new_version_is_answered_by_all_replicas_without_restart(service: Deployment, root: Path) -> None:
    """Asked for in a crowd while it is published: exactly the version asked for, in every row of every answer."""
    before = {process.pid for process in replicas()}
    assert len(before) == 2
    client = HandleClient(service.app)
    with pytest.raises(RewardError, match=r"409 no_such_version: no version 1, there are \[0\]"):
        client.values(ROWS[:1], 1)
    expected = {version: values_of(critic(version), ROWS[:8]) for version in range(3)}

    def ask(number: int) -> tuple[int, list[float]]:
        version = number % (2 if number < 40 else 3)
        made: CriticClient = client if number % 4 else HttpClient(_at(service), TOKEN)
        return version, made.values(ROWS[:8], version)

    versions.publish(root, 1, critic(1))
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(40)]
        versions.publish(root, 2, critic(2))
        asked += [pool.submit(ask, number) for number in range(40, 80)]
        answers = [one.result() for one in asked]
    for version, values in answers:
        assert values == pytest.approx(expected[version], abs=1e-5)
    assert {version for version, _ in answers} == {0, 1, 2}
    assert {process.pid for process in replicas()} == before
    status, newest, _ = post(service, "/v1/value", b'{"version": null, "texts": ["Tom"]}')
    assert (status, newest["version"]) == (200, 2)


# ---- refusals


@pytest.mark.parametrize(
    ("status", "code", "body", "token"),
    [
        (401, "unauthorized", b'{"texts": ["Tom"]}', None),
        (401, "unauthorized", b'{"texts": ["Tom"]}', f"{TOKEN}x"),
        (409, "no_such_version", b'{"version": 99, "texts": ["Tom"]}', TOKEN),
        (413, "too_large", b'{"texts": ["' + b"a" * 300_000 + b'"]}', TOKEN),
        (413, "too_large", json.dumps({"texts": ["a"] * 129}).encode(), TOKEN),
        (422, "too_deep", b"[" * 100_000, TOKEN),
        (422, "not_json", b'{"input_ids": [[NaN]]}', TOKEN),
        (422, "invalid", b'{"input_ids": [[20], [20, 300]]}', TOKEN),
        (422, "invalid", b'{"input_ids": [[20], []]}', TOKEN),
    ],
)
def test_a_refusal_has_a_status_and_a_body(
    status: int, code: str, body: bytes, token: str | None, service: Deployment
) -> None:
    found, answer, _ = post(service, "/v1/value", body, token)
    assert (found, answer["error"]) == (status, code)
    assert answer["message"]


def test_a_crowd_is_refused_and_those_who_come_again_are_answered(service: Deployment) -> None:
    """Two replicas hold three requests each; the rest hears 503 with the time to wait."""
    rows = ROWS[:128]
    body = json.dumps({"version": 0, "input_ids": rows}).encode()
    expected = values_of(critic(0), rows)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: post(service, "/v1/value", body), range(48)))
    assert {status for status, _, _ in answers} == {200, 503}
    for status, answer, headers in answers:
        if status == 200:
            assert answer["values"] == pytest.approx(expected, abs=1e-5)
        else:
            assert answer["error"] == "busy"
            assert int(headers["Retry-After"]) >= 1
    client = HttpClient(_at(service), TOKEN)
    with ThreadPoolExecutor(12) as pool:
        for found in pool.map(lambda _: client.values(rows, 0), range(24)):
            assert found == pytest.approx(expected, abs=1e-5)


# ---- deploying


def test_what_can_t_be_deployed_is_said_before_anything_starts(service: Deployment, tmp_path: Path, root: Path) -> None:
    def try_it(http: bool = False, name: str = "another", **config: Any) -> None:
        deploy(ServingConfig.model_validate(config), http=http, name=name)

    with pytest.raises(ConfigError, match="needs a token"):
        try_it(http=True)
    with pytest.raises(ConfigError, match="deployed already"):
        try_it(name="critic")
    with pytest.raises(ConfigError, match="3 replicas of 1 CPUs need 3, the cluster has 2"):
        try_it(service={"replicas": 3})
    with pytest.raises(ArtifactError, match="no such model directory"):
        try_it(model=str(tmp_path / "missing"))
    critic(5).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="version 0 is there already with another"):
        try_it(model=str(tmp_path / "other"), versions=str(root))
    with pytest.raises(RewardError, match=r"application 'another'.*does not exist"):
        HandleClient("another").values(ROWS, 0)


def test_a_service_that_does_not_get_ready_ends_at_the_deadline(service: Deployment) -> None:
    started = time.monotonic()
    large = ServingConfig(service=ServiceConfig(cpus_per_replica=1.5, request_timeout_s=1))
    with pytest.raises(RewardError, match="'waiting' was not ready within 3 s: it is deploying"):
        deploy(large, http=False, name="waiting", deadline_s=3)
    assert time.monotonic() - started < 90
    assert replicas("waiting") == []
    assert HandleClient(service.app).values(ROWS[:1], 0), "the other one goes on"


# ---- as users do it

README = (ROOT / "README.md").read_text()
(CURL,) = (block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "/v1/value" in block)
(PYTHON,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "HttpClient" in block)


def test_the_examples_run_as_they_stand(service: Deployment) -> None:
    env = {**environment(), "RXT_SERVE_TOKEN": TOKEN}

    def run(command: list[str]) -> str:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=240).stdout

    here = _at(service)
    answer = json.loads(run(["bash", "-c", CURL.replace("http://127.0.0.1:8000", here)]))
    assert answer["version"] == 0
    assert len(answer["values"]) == 2
    printed = run([sys.executable, "-c", PYTHON.replace("http://127.0.0.1:8000", here)])
    assert printed.startswith("Reward(total=")
    assert printed.splitlines()[1].startswith("[0.")


def test_the_command_serves_until_sigterm_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "token").write_text(TOKEN)
    command = [
        *(str(BIN / "rxt"), "serve", "critic", "--versions", str(root), "--port", str(port)),
        *("--token-file", str(tmp_path / "token"), "--cpus", "0.5"),
    ]
    env = {key: value for key, value in environment().items() if key not in ("RAY_ADDRESS", "RXT_SERVE_TOKEN")}
    shared_before = _shared_memory()
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: set[psutil.Process] = set()
    try:
        here = Deployment("critic", f"http://127.0.0.1:{port}", owns_serve=True)
        deadline = time.monotonic() + 300
        while not _healthy(here):
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert HttpClient(_at(here), TOKEN).values(ROWS[:5], 0) == pytest.approx(
            values_of(critic(0), ROWS[:5]), abs=1e-5
        )
        listening = {
            one.laddr for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr[1] == port
        }
        assert {address[0] for address in listening} == {"127.0.0.1"}
        started = set(psutil.Process(process.pid).children(recursive=True))
        assert any("ServeReplica" in " ".join(one.cmdline()) for one in started)
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"serving on http://127.0.0.1:{port}" in output
    assert output.endswith("stopped\n")
    assert TOKEN not in output
    _, alive = psutil.wait_procs(started, timeout=10)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    assert _shared_memory() <= shared_before


def _shared_memory() -> set[str]:
    """Its objects, without those of tensors and semaphores, which other tests' processes come and go with."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("torch_", "sem."))}


def _healthy(service: Deployment) -> bool:
    try:
        with urllib.request.urlopen(f"{service.address}/healthz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False

"""Promises of the service's clients: what may pass is tried again, what stays is an error, nothing is made up."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from rxt_platform import RxTEncoder
from rxt_platform.config.model import HeadConfig
from rxt_platform.errors import ArtifactError, RewardError
from rxt_platform.rl import versions
from rxt_platform.rl.rewards import Reward, ScoredTurn
from rxt_platform.serving import client as clients
from rxt_platform.serving.client import HttpClient
from tests.unit.helpers import tiny_config, word_tokenizer

TOKEN = "a-token-of-a-test-0123456789"
PLACE = "http://service:1"
Answer = Callable[[str, dict[str, Any]], httpx.Response]


def limits(rows: int = 1000, body: int = 10**6) -> dict[str, Any]:
    return {"limits": {"max_rows": rows, "max_body_bytes": body}}


def ok(body: Any) -> httpx.Response:
    return httpx.Response(200, json=body)


def refusal(status: int, code: str = "code", **more: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": code, "message": "the reason", **more})


class Recorded:
    """A client of a made-up service, and the requests that it got."""

    def __init__(self, answer: Answer, info: dict[str, Any] | None = None, **options: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []

        def handle(request: httpx.Request) -> httpx.Response:
            self.headers.append(request.headers)
            what = request.url.path.removeprefix("/v1/")
            if what == "info":
                return ok(info or limits())
            body = json.loads(request.read())
            self.requests.append(body)
            return answer(what, body)

        options = {"deadline_s": 5.0, **options}
        self.client = HttpClient(PLACE, TOKEN, transport=httpx.MockTransport(handle), **options)


def valued(_: str, body: dict[str, Any]) -> httpx.Response:
    return ok({"version": body["version"], "values": [float(sum(row)) for row in body["input_ids"]]})


def in_turn(*answers: Any) -> Answer:
    """One answer after the other; an exception is raised, a function called, the last one stays."""
    waiting = list(answers)

    def answer(what: str, body: dict[str, Any]) -> httpx.Response:
        one = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(one, Exception):
            raise one
        found: httpx.Response = one(what, body) if callable(one) else one
        return found

    return answer


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The backoffs that were drawn from, instead of waiting."""
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    monkeypatch.setattr(clients.random, "uniform", uniform)
    return drawn


# ---- what comes back


def test_values_come_back_in_order_with_the_token_sent() -> None:
    made = Recorded(valued)
    assert made.client.values([[1, 2], (3,), [4]], 7) == [3.0, 3.0, 4.0]
    assert made.requests == [{"version": 7, "input_ids": [[1, 2], [3], [4]]}]
    assert {headers["authorization"] for headers in made.headers} == {f"Bearer {TOKEN}"}


def test_many_rows_are_asked_in_requests_under_the_limits() -> None:
    rows = [[number] * (1 + number % 5) for number in range(100)]
    expected = [float(sum(row)) for row in rows]
    made = Recorded(valued, limits(rows=32))
    assert made.client.values(rows, 0) == expected
    assert [len(request["input_ids"]) for request in made.requests] == [32, 32, 32, 4]
    made = Recorded(valued, limits(body=1300))
    assert made.client.values(rows, 0) == expected
    assert len(made.requests) > 3
    assert all(len(json.dumps(request, separators=(",", ":"))) < 1300 for request in made.requests)


def test_nothing_is_asked_for_nothing() -> None:
    made = Recorded(valued)
    assert made.client.values([], 0) == []
    assert made.client.score([]) == []
    assert made.headers == []


REWARD = Reward(**dict.fromkeys(clients._PARTS, 0.5))
PARTS = vars(REWARD)
TALKS = [
    [ScoredTurn("q", "r", "g", None), ScoredTurn("q", "r", "g", "s"), ScoredTurn("q", "r", "é", "s")],
    [ScoredTurn("q", "r", "g", None)],
    [ScoredTurn("q", "r", "g", None), ScoredTurn("q", "r", "g", "s")],
]


def scored(_: str, body: dict[str, Any]) -> httpx.Response:
    rewards = [[PARTS] * (len(episode) - 1) for episode in body["episodes"]]
    return ok({"version": "abc", "rewards": rewards})


def test_rewards_come_back_for_each_follow_up() -> None:
    made = Recorded(scored, limits(rows=4))
    assert made.client.score(TALKS) == [[REWARD, REWARD], [], [REWARD]]
    assert [len(request["episodes"]) for request in made.requests] == [2, 1]
    turn = made.requests[0]["episodes"][0][2]
    assert {"query": "q", "reference": "r", "generated": "é", "saved": "s"}.items() <= turn.items()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"version": 3, "values": [1.0, 2.0]}, "values of version 3, asked for 2"),
        ({"values": [1.0, 2.0]}, "values of version None"),
        ({"version": True, "values": [1.0, 2.0]}, "values of version True"),
        ({"version": 2.0, "values": [1.0, 2.0]}, "values of version 2.0"),
        ({"version": 2, "values": [1.0]}, "1 values for 2 rows"),
        ({"version": 2, "values": [1.0, 2.0, 3.0]}, "3 values for 2 rows"),
        ({"version": 2}, "NoneType values for 2 rows"),
        ({"version": 2, "values": [1.0, None]}, "row 1 has the value None"),
        ({"version": 2, "values": [1.0, True]}, "row 1 has the value True"),
        ({"version": 2, "values": [1.0, "2"]}, "row 1 has the value '2'"),
        (b'{"version": 2, "values": [1.0, 1e999]}', "row 1 has the value inf"),
        (b'{"version": 2, "values": [1.0, NaN]}', "HTTP 200"),
        (b"<html>", "HTTP 200: <html>"),
        (b"[" * 100_000, "HTTP 200"),
        ([1.0, 2.0], "HTTP 200"),
    ],
)
def test_a_value_that_is_none_is_never_used(answer: Any, reason: str) -> None:
    response = httpx.Response(200, content=answer) if isinstance(answer, bytes) else ok(answer)
    made = Recorded(in_turn(response))
    with pytest.raises(RewardError, match="no value for 2 rows by version 2 after 2 attempts: ") as error:
        made.client.values([[1], [2]], 2)
    assert reason in str(error.value)
    assert str(error.value).startswith(PLACE)
    assert len(made.requests) == 1, "a wrong answer is not asked for again"


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([], "other than the 1 episodes"),
        ([[PARTS]], "episode 0: not one reward for each"),
        ([[PARTS, {**PARTS, "bleu": None}]], "episode 0, follow-up 1: bleu is None"),
        ([[PARTS, {**PARTS, "cosine": "1"}]], "follow-up 1: cosine is '1'"),
        ([[PARTS, {"total": 1.0}]], "follow-up 1: not a reward"),
        ([[PARTS, 0.5]], "follow-up 1: not a reward"),
        (None, "other than the 1 episodes"),
    ],
)
def test_a_reward_that_is_none_is_never_used(rewards: Any, reason: str) -> None:
    made = Recorded(in_turn(ok({"version": "abc", "rewards": rewards})))
    with pytest.raises(RewardError, match="no score for 3 turns after 2 attempts") as error:
        made.client.score(TALKS[:1])
    assert reason in str(error.value)


def test_rewards_of_two_configurations_are_never_mixed() -> None:
    def changing(what: str, body: dict[str, Any]) -> httpx.Response:
        answer = json.loads(scored(what, body).content)
        return ok({**answer, "version": f"abc{len(made.requests)}"})

    made = Recorded(changing, limits(rows=3))
    with pytest.raises(RewardError, match="rewards of version 'abc2' after 'abc1'"):
        made.client.score(TALKS)


# ---- what may pass, and what stays


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("gone"),
        refusal(503, "busy", retry_after_s=0.01),
        refusal(504, "deadline"),
        httpx.Response(503, text="busy", headers={"Retry-After": "0"}),
        httpx.Response(408, text="Request 1 timed out"),
        httpx.Response(500, text="Internal Server Error"),
    ],
)
def test_what_may_pass_is_tried_again(failure: Any, waits: list[tuple[float, float]]) -> None:
    made = Recorded(in_turn(failure, failure, valued))
    assert made.client.values([[1, 2]], 0) == [3.0]
    assert len(made.requests) == 3
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (refusal(401, "unauthorized"), "401 unauthorized: the reason"),
        (refusal(409, "no_such_version"), "409 no_such_version: the reason"),
        (refusal(413, "too_large"), "413 too_large: the reason"),
        (refusal(422, "invalid"), "422 invalid: the reason"),
        (refusal(500, "internal"), "500 internal: the reason"),
        (httpx.Response(404, text="Path not found"), "HTTP 404: Path not found"),
        (httpx.Response(302, headers={"Location": "http://elsewhere/"}), "HTTP 302"),
    ],
)
def test_what_stays_is_an_error_at_once(failure: Any, reason: str, waits: list[tuple[float, float]]) -> None:
    made = Recorded(in_turn(failure))
    with pytest.raises(RewardError, match="after 2 attempts") as error:  # the first one asked for the limits
        made.client.values([[1]], 0)
    assert reason in str(error.value)
    assert len(made.requests) == 1
    assert waits == []
    assert TOKEN not in str(error.value)


def test_backoff_doubles_with_full_jitter_up_to_a_bound(waits: list[tuple[float, float]]) -> None:
    made = Recorded(in_turn(*[refusal(503)] * 9, refusal(503, retry_after_s=2.0), valued))
    made.client.values([[1]], 0)
    assert [low for low, _ in waits] == [0.0] * 10
    assert [high for _, high in waits] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5])
    waits.clear()
    made = Recorded(in_turn(refusal(503, retry_after_s=2.0), refusal(503, retry_after_s=1e9), valued))
    made.client.values([[1]], 0)
    assert [high for _, high in waits] == [2.0, 5.0], "the service's own word counts, within the bound"


def test_a_call_ends_at_its_deadline_and_says_why() -> None:
    made = Recorded(in_turn(refusal(503, "busy")), deadline_s=0.7)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"after \d+ attempts: given up after 0.7 s; the last reason: 503 busy"):
        made.client.values([[1]], 0)
    assert time.monotonic() - started < 4
    assert len(made.requests) >= 2


# ---- publishing


def test_what_is_published_is_there_before_it_is_asked_for_and_old_versions_go(tmp_path: Path) -> None:
    made = HttpClient(PLACE, TOKEN, versions=tmp_path)
    for version in range(10):
        made.publish(version, encoder(version))
    assert versions.available(tmp_path) == list(range(2, 10))
    made.publish(9, encoder(9))
    with pytest.raises(ArtifactError, match="version 9 is there already"):
        made.publish(9, encoder(1))
    made.publish(1, encoder(1))  # a trainer that resumed from an early checkpoint
    assert versions.available(tmp_path) == list(range(1, 10))
    with pytest.raises(RewardError, match="no versions folder"):
        HttpClient(PLACE, TOKEN).publish(0, encoder(0))


def encoder(seed: int) -> RxTEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RxTEncoder(tiny_config(vocab_size=300), HeadConfig(kind="value"), word_tokenizer())


# ---- a real socket


class Handler(BaseHTTPRequestHandler):
    """Answers limits, and then behaves as the server was told."""

    def do_GET(self) -> None:
        self._say(200, json.dumps(limits()).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.behave(self, body)  # type: ignore[attr-defined]

    def _say(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """On a free port of this machine."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def client_of(server: ThreadingHTTPServer, **options: float) -> HttpClient:
    return HttpClient(f"http://127.0.0.1:{server.server_port}", TOKEN, **options)


def test_a_server_that_drips_is_given_up_at_the_attempt_s_deadline(server: ThreadingHTTPServer) -> None:
    def drip(handler: Handler, _: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            time.sleep(0.1)
            handler.wfile.write(b" ")

    server.behave = drip  # type: ignore[attr-defined]
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"given up after 1 s; the last reason: (no whole answer within|ReadTimeout)"):
        client_of(server, deadline_s=1.0, attempt_s=0.4).values([[1]], 0)
    assert time.monotonic() - started < 6


def test_a_connection_that_is_cut_is_tried_again(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def cut_first(handler: Handler, body: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 1:
            handler.connection.close()
            return
        handler._say(200, json.dumps({"version": body["version"], "values": [1.5]}).encode())

    server.behave = cut_first  # type: ignore[attr-defined]
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the token must not go to a proxy of the environment
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert client_of(server, deadline_s=10.0).values([[1]], 4) == [1.5]
    assert len(calls) == 2


def test_nobody_there_is_an_error_that_names_the_address(server: ThreadingHTTPServer) -> None:
    made = client_of(server, deadline_s=0.5)
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=rf"http://127.0.0.1:{server.server_port}: no value .*ConnectError"):
        made.values([[1]], 0)

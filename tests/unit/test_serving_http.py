"""Promises of the service as a request sees it, without Ray: who may ask, what is refused and how, what is answered."""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from rxt_platform import RxTEncoder
from rxt_platform.config.model import HeadConfig
from rxt_platform.config.rewards import RewardConfig
from rxt_platform.config.serving import ServiceConfig, ServingConfig
from rxt_platform.data.tokenizer import BOS, EOS
from rxt_platform.model.files import save_model
from rxt_platform.rl import versions
from rxt_platform.rl.rewards import HashedEmbedding, ScoredTurn, score_conversations
from rxt_platform.serving import schema
from rxt_platform.serving.auth import digest
from rxt_platform.serving.replica import CriticService
from tests.unit.helpers import padded, rows_of, tiny_config, tiny_model, word_tokenizer

CONFIG = tiny_config(vocab_size=300, max_length=32)
TOKEN = "a-token-of-a-test-0123456789"
LIMITS = ServiceConfig(max_body_bytes=20_000, max_rows=40, max_text_length=2_000, batch_tokens=100)
ROWS = rows_of(7, 12, 1, 30, 3, 7, vocab=300)


def critic(version: int = 0) -> RxTEncoder:
    """An encoder whose values tell its version: they lie between it and one more."""
    with torch.random.fork_rng():
        torch.manual_seed(version)
        model = RxTEncoder(CONFIG, HeadConfig(kind="value", scale=1.0), word_tokenizer()).eval()
    model.head.shift.data.fill_(float(version))
    return model


def values_of(model: RxTEncoder, rows: list[list[int]]) -> list[float]:
    with torch.inference_mode():
        return model(*padded(rows))[:, 0].tolist()


class Service:
    """The service's HTTP side, in this process."""

    def __init__(self, config: ServingConfig) -> None:
        self.replica = CriticService(config, digest(TOKEN))
        self.app = self.replica.__serve_build_asgi_app__()

    def ask(
        self, path: str, body: Any = None, token: str | None = TOKEN, method: str | None = None, **options: Any
    ) -> httpx.Response:
        """One request; a body that is no bytes and no stream is sent as JSON."""
        return asyncio.run(self.ask_soon(path, body, token, method, **options))

    async def ask_soon(
        self, path: str, body: Any = None, token: str | None = TOKEN, method: str | None = None, **options: Any
    ) -> httpx.Response:
        content = body if isinstance(body, bytes | None) or hasattr(body, "__aiter__") else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(
                method or ("GET" if body is None else "POST"), path, content=content, **{"headers": headers, **options}
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with versions 0 and 2."""
    folder = tmp_path_factory.mktemp("versions")
    for version in (0, 2):
        versions.publish(folder, version, critic(version))
    return folder


@pytest.fixture(scope="module")
def service(root: Path) -> Service:
    return Service(ServingConfig(service=LIMITS, versions=str(root)))


def episodes() -> list[list[dict[str, Any]]]:
    first = {"query": "Tom has a red hat.", "reference": "Nice hat!", "generated": "Nice hat!"}
    second = {"query": "What has Tom?", "reference": "A red hat.", "generated": "A hat, a red one."}
    third = {"query": "And Lily?", "reference": "Cake.", "generated": "Lily likes cake."}
    return [
        [first, {**second, "saved": "Tom has a red hat. Nice hat!"}, {**third, "saved": "What has Tom? A red hat."}],
        [first],
        [first, {**second, "saved": "Tom has a red hat. Nice hat!"}],
    ]


# ---- answers


def test_values_are_the_model_s_by_the_version_asked_for(service: Service) -> None:
    for version in (0, 2):
        answer = service.ask("/v1/value", {"version": version, "input_ids": ROWS}).json()
        assert answer["version"] == version
        assert answer["values"] == pytest.approx(values_of(critic(version), ROWS), abs=1e-5)
        assert all(version < value < version + 1 for value in answer["values"])


def test_without_a_version_the_newest_one_answers(root: Path, tmp_path: Path) -> None:
    served = Service(ServingConfig(versions=str(tmp_path)))
    none = served.ask("/v1/value", {"input_ids": ROWS})
    assert none.status_code == 409
    assert "no version has been published" in none.json()["message"]
    for version in (3, 4):
        versions.publish(tmp_path, version, critic(version))
        answer = served.ask("/v1/value", {"version": None, "input_ids": ROWS[:1]}).json()
        assert answer == {"version": version, "values": pytest.approx(values_of(critic(version), ROWS[:1]), abs=1e-5)}


def test_texts_are_tokenised_by_the_critic_s_own_tokenizer(service: Service) -> None:
    texts = ["Tom has a red hat.", "Hat?", ""]
    rows = [[BOS, *word_tokenizer().encode(text), EOS] for text in texts]
    answer = service.ask("/v1/value", {"version": 0, "texts": texts}).json()
    assert answer["values"] == service.ask("/v1/value", {"version": 0, "input_ids": rows}).json()["values"]


def test_rewards_are_those_of_the_same_turns_in_process(service: Service) -> None:
    answer = service.ask("/v1/score", {"episodes": episodes()}).json()
    turns = [[schema.Turn(**turn).scored() for turn in episode] for episode in episodes()]
    expected = score_conversations(turns, RewardConfig(), HashedEmbedding())
    assert [[dataclasses.asdict(one) for one in row] for row in expected] == answer["rewards"]
    assert [len(row) for row in answer["rewards"]] == [2, 0, 1]
    assert len(answer["version"]) == 12


def test_the_version_of_rewards_changes_with_their_configuration(service: Service, tmp_path: Path) -> None:
    other = Service(ServingConfig(rewards=RewardConfig(scale=5.0)))
    ours, theirs = (one.ask("/v1/score", {"episodes": episodes()}).json() for one in (service, other))
    assert ours["version"] != theirs["version"]
    assert ours["rewards"][0][0]["total"] == pytest.approx(2 * theirs["rewards"][0][0]["total"])


def test_a_model_directory_is_version_0(tmp_path: Path) -> None:
    critic(5).save_pretrained(tmp_path / "critic")
    served = Service(ServingConfig(model=str(tmp_path / "critic")))
    for version in (0, None):
        answer = served.ask("/v1/value", {"version": version, "input_ids": ROWS}).json()
        assert answer == {"version": 0, "values": pytest.approx(values_of(critic(5), ROWS), abs=1e-5)}
    refused = served.ask("/v1/value", {"version": 1, "input_ids": ROWS})
    assert (refused.status_code, refused.json()["versions"]) == (409, [0])


def test_a_model_without_a_value_head_gives_rewards_only(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, tiny_model(CONFIG).state_dict(), word_tokenizer())
    served = Service(ServingConfig(model=str(tmp_path)))
    assert served.ask("/v1/score", {"episodes": episodes()}).status_code == 200
    refused = served.ask("/v1/value", {"texts": ["Tom"]})
    assert (refused.status_code, refused.json()["error"]) == (409, "no_critic")
    assert "no value head" in refused.json()["message"]


def test_info_says_what_there_is(service: Service, root: Path) -> None:
    service.ask("/v1/value", {"version": 2, "input_ids": ROWS})
    info = service.ask("/v1/info").json()
    assert info["versions"] == [0, 2]
    assert (info["model"], info["vocab_size"], info["window"]) == (str(root), 300, 32)
    assert info["limits"]["max_rows"] == 40
    assert schema.Info.model_validate(info)


# ---- versions


def test_only_so_many_versions_stay_in_memory(tmp_path: Path) -> None:
    for version in range(4):
        versions.publish(tmp_path, version, critic(version))
    served = Service(ServingConfig(service=ServiceConfig(versions_in_memory=2), versions=str(tmp_path)))
    for version in (0, 1, 0, 2):
        served.ask("/v1/value", {"version": version, "input_ids": ROWS})
    assert list(served.replica._worker.critics._held) == [0, 2]
    versions.prune(tmp_path, 1)
    assert served.ask("/v1/value", {"version": 2, "input_ids": ROWS}).json()["version"] == 2, "still in memory"
    refused = served.ask("/v1/value", {"version": 1, "input_ids": ROWS})
    assert (refused.status_code, refused.json()["versions"]) == (409, [3])


def test_a_damaged_version_is_refused_by_name(tmp_path: Path) -> None:
    for version in (0, 1):
        versions.publish(tmp_path, version, critic(version))
    weights = tmp_path / "v000001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    served = Service(ServingConfig(versions=str(tmp_path)))
    refused = served.ask("/v1/value", {"version": 1, "input_ids": ROWS})
    assert (refused.status_code, refused.json()["versions"]) == (409, [0])
    assert "model.safetensors: sha256" in refused.json()["message"]
    assert served.ask("/v1/value", {"version": 0, "input_ids": ROWS}).status_code == 200


def test_weights_that_give_no_finite_values_are_refused(tmp_path: Path) -> None:
    broken = critic(0)
    broken.head.shift.data.fill_(float("nan"))
    versions.publish(tmp_path, 0, broken)
    refused = Service(ServingConfig(versions=str(tmp_path))).ask("/v1/value", {"input_ids": ROWS})
    assert (refused.status_code, refused.json()["error"]) == (500, "not_finite")


# ---- who may ask


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xe9"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/info", "/v1/score", "/v1/value"])
def test_without_the_token_nothing_is_answered(headers: dict[str, str], path: str, service: Service) -> None:
    encoded = {key: value.encode("latin-1") for key, value in headers.items()}
    body = None if path == "/v1/info" else {"input_ids": ROWS}
    refused = service.ask(path, body, headers=encoded)
    assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in refused.text


def test_a_replica_without_a_token_answers_nobody() -> None:
    app = CriticService(ServingConfig(), None)
    served = Service(ServingConfig())
    served.app = app.__serve_build_asgi_app__()
    for token in (TOKEN, "", "None"):
        assert served.ask("/v1/info", token=token).status_code == 401


def test_health_and_docs_need_no_token(service: Service) -> None:
    assert service.ask("/healthz", token=None).json() == {"status": "ok"}
    assert "/openapi.json" in service.ask("/docs", token=None).text


# ---- what is refused


def refused(service: Service, path: str, body: Any) -> tuple[int, str, str]:
    answer = service.ask(path, body)
    found = answer.json()
    return answer.status_code, found["error"], found["message"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input_ids": [[20], []]}, 422, "input_ids.1: an empty row"),
        ({"input_ids": []}, 422, "no rows"),
        ({"texts": []}, 422, "no rows"),
        ({"input_ids": [[20, 21], [20, 300, 21]]}, 422, "input_ids.1.1: token id 300; the critic knows 0 to 299"),
        ({"input_ids": [[-1]]}, 422, "input_ids.0.0: token id -1"),
        ({"input_ids": [[20] * 33]}, 422, "input_ids.0: 33 tokens; the critic's window holds 32"),
        ({"texts": ["Tom", "hat " * 40]}, 422, "input_ids.1: "),
        ({"input_ids": [[20]] * 41}, 413, "41 rows in a request; at most 40"),
        ({"texts": ["a" * 2_001]}, 413, "texts.0: a text of 2001 characters; at most 2000"),
        ({"input_ids": [[20.5]]}, 422, "input_ids.0.0: "),
        ({"input_ids": [[True]]}, 422, "input_ids.0.0: "),
        ({"input_ids": [["20"]]}, 422, "input_ids.0.0: "),
        ({"input_ids": [[10**30]]}, 422, "input_ids.0.0"),
        ({"input_ids": [20]}, 422, "input_ids.0: "),
        ({"input_ids": [[20]], "texts": ["a"]}, 422, "one of them"),
        ({}, 422, "one of them"),
        ({"input_ids": [[20]], "version": -1}, 422, "version: "),
        ({"input_ids": [[20]], "version": "2"}, 422, "version: "),
        ({"input_ids": [[20]], "model": "x"}, 422, "model: Extra inputs"),
        ([1, 2], 422, "valid dictionary"),
        ({"input_ids": [[20]], "version": 1}, 409, "no version 1, there are [0, 2]"),
        (b'{"input_ids": [[NaN]]}', 422, "no JSON"),
        (b'{"input_ids": [[Infinity]]}', 422, "no JSON"),
        (b'{"input_ids": [[1e999]]}', 422, "input_ids.0.0: "),
        (b'{"input_ids": [[20]', 422, "no JSON"),
        (b'{"texts": ["\\ud800"]}', 422, "no JSON"),
        (b"\xff\xfe", 422, "no JSON"),
        (b"", 422, "no JSON"),
        (b"[" * 15_000, 422, "15000 deep; at most 8"),
        (b'{"texts": ["' + b"a" * 20_000 + b'"]}', 413, "more than 20000 bytes"),
    ],
)
def test_what_can_t_be_valued_is_refused_by_name(body: Any, status: int, message: str, service: Service) -> None:
    found = refused(service, "/v1/value", body)
    assert found[0] == status
    assert message in found[2]
    assert len(found[2]) < 300, "a large request is not said again"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"saved": None}, 422, "episodes.0.1.saved: a follow-up needs the saved interaction"),
        ({"generated": 5}, 422, "episodes.0.1.generated: "),
        ({"mode": "sideways"}, 422, "episodes.0.1.mode: "),
        ({"spans": "Rex"}, 422, "episodes.0.1.spans: "),
        ({"truth": "x"}, 422, "episodes.0.1.truth: "),
        ({"query": "a" * 2_001}, 413, "episodes.0.1: a text of 2001 characters"),
    ],
)
def test_a_turn_that_can_t_be_scored_is_refused_by_name(
    change: dict[str, Any], status: int, message: str, service: Service
) -> None:
    made = episodes()
    made[0][1].update(change)
    found = refused(service, "/v1/score", {"episodes": made})
    assert found[0] == status
    assert message in found[2]


def test_too_many_turns_and_empty_episodes_are_refused(service: Service) -> None:
    first = episodes()[1]
    assert refused(service, "/v1/score", {"episodes": [first] * 41})[:2] == (413, "too_large")
    assert refused(service, "/v1/score", {"episodes": [first, []]})[2] == "episodes.1: an episode without a turn"
    assert refused(service, "/v1/score", {"episodes": []})[0] == 422


def test_a_body_that_only_shows_its_size_while_it_comes_is_cut_off(service: Service) -> None:
    async def stream() -> Any:
        for _ in range(1_000):
            sent.append(1)
            yield b"[" * 1_000

    for declared, read in (({}, range(20, 25)), ({"Content-Length": "1000000"}, range(1))):
        sent: list[int] = []
        headers = {"Authorization": f"Bearer {TOKEN}", **declared}
        answer = service.ask("/v1/value", stream(), headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
        assert len(sent) in read


def test_other_routes_and_methods_are_json_too(service: Service) -> None:
    for path, method, status in (("/v1/values", "POST", 404), ("/v1/value", "GET", 405), ("/", "GET", 404)):
        answer = service.ask(path, method=method)
        assert (answer.status_code, answer.json()["error"]) == (status, "no_route")


# ---- load


@pytest.fixture
def slow(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[..., Service], threading.Event]]:
    """Makes services whose computing waits for an event."""
    go = threading.Event()
    compute = "rxt_platform.serving.worker.values_of"

    def wait(*_: Any) -> list[float]:
        go.wait(10)
        return [0.0]

    monkeypatch.setattr(compute, wait)
    yield lambda **limits: Service(ServingConfig(service=ServiceConfig(**limits), versions=str(root))), go
    go.set()


def test_beyond_its_queue_a_request_is_refused_at_once(slow: tuple[Callable[..., Service], threading.Event]) -> None:
    make, go = slow
    service = make(max_queued_requests=2)
    body = {"version": 0, "input_ids": [[20]]}

    async def crowd() -> list[httpx.Response]:
        accepted = [asyncio.create_task(service.ask_soon("/v1/value", body)) for _ in range(3)]
        await asyncio.sleep(0.2)
        started = time.monotonic()
        more = [await service.ask_soon("/v1/value", body) for _ in range(2)]
        assert (await service.ask_soon("/healthz", token=None)).status_code == 200
        assert (await service.ask_soon("/v1/info")).status_code == 200
        assert time.monotonic() - started < 5, "refusals, health and info don't wait for the computing"
        go.set()
        return [*await asyncio.gather(*accepted), *more]

    answers = asyncio.run(crowd())
    assert [answer.status_code for answer in answers] == [200, 200, 200, 503, 503]
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert answers[-1].json()["error"] == "busy"
    assert answers[-1].json()["retry_after_s"] > 0
    assert service.ask("/v1/value", body).status_code == 200


def test_a_deadline_ends_waiting_and_computing(slow: tuple[Callable[..., Service], threading.Event]) -> None:
    make, go = slow
    service = make(request_timeout_s=0.3)
    body = {"version": 0, "input_ids": [[20]]}

    async def two() -> list[httpx.Response]:
        return list(await asyncio.gather(*(service.ask_soon("/v1/value", body) for _ in range(2))))

    started = time.monotonic()
    answers = asyncio.run(two())
    assert time.monotonic() - started < 5
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(504, "deadline")] * 2
    service.replica.check_health()
    time.sleep(0.9)
    with pytest.raises(RuntimeError, match="has been computing"):
        service.replica.check_health()
    go.set()
    time.sleep(0.1)
    service.replica.check_health()
    assert service.ask("/v1/value", body).status_code == 200, "what is late leaves no place taken"


def test_a_long_computation_stops_at_its_deadline(root: Path) -> None:
    limits = ServiceConfig(max_rows=10_000, batch_tokens=32, request_timeout_s=0.2)
    service = Service(ServingConfig(service=limits, versions=str(root)))
    service.ask("/v1/value", {"version": 0, "input_ids": ROWS})
    started = time.monotonic()
    assert service.ask("/v1/value", {"version": 0, "input_ids": [ROWS[3]] * 5_000}).status_code == 504
    assert time.monotonic() - started < 2
    time.sleep(0.2)
    assert service.replica._lane._inside == 0, "the thread is free again"


def test_a_fault_of_the_service_is_told_apart_from_a_bad_request(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("secret detail")

    monkeypatch.setattr("rxt_platform.serving.worker.values_of", broken)
    served = Service(ServingConfig(versions=str(root)))
    answer = served.ask("/v1/value", {"version": 0, "input_ids": ROWS})
    assert (answer.status_code, answer.json()["error"]) == (500, "internal")
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text
    assert TOKEN not in caplog.text


# ---- by handle


def test_a_handle_gets_the_same_answers_and_refusals(service: Service) -> None:
    async def both() -> list[dict[str, Any]]:
        ask = service.replica
        return [
            await ask.value({"version": 2, "input_ids": ROWS}),
            await ask.value({"version": 1, "input_ids": ROWS}),
            await ask.value({"input_ids": [[20, 300]]}),
            await ask.score({"episodes": episodes()}),
            await ask.info({}),
        ]

    value, missing, wrong, rewards, info = asyncio.run(both())
    assert value == service.ask("/v1/value", {"version": 2, "input_ids": ROWS}).json()
    assert (missing["refused"]["status"], missing["refused"]["versions"]) == (409, [0, 2])
    assert "input_ids.0.1: token id 300" in wrong["refused"]["message"]
    assert rewards == service.ask("/v1/score", {"episodes": episodes()}).json()
    assert info["limits"]["max_rows"] == 40


# ---- the schema


def test_the_schema_has_examples_that_are_answered(service: Service) -> None:
    made = service.ask("/openapi.json", token=None).json()
    text = json.dumps(made)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in made["components"]["schemas"], name
    for path in ("/v1/score", "/v1/value"):
        post = made["paths"][path]["post"]
        assert post["security"] == [{"token": []}]
        assert {"401", "409", "413", "422", "503", "504"} <= post["responses"].keys()
        example = post["requestBody"]["content"]["application/json"]["example"]
        assert service.ask(path, example).status_code == 200


def test_a_turn_mirrors_what_the_reward_takes() -> None:
    turn = ScoredTurn("q", "r", "g", "s")
    mirrored = schema.Turn(query="q", reference="r", generated="g", saved="s")
    assert mirrored.scored() == turn
    assert set(schema.Turn.model_fields) == {field.name for field in dataclasses.fields(ScoredTurn)}

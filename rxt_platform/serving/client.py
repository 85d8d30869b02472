"""Clients of the service: rewards and values by handle from inside a Ray cluster, or by HTTP from anywhere.

They try again only what may pass (a lost connection, a replica that died, a service that is busy), with exponential
backoff and full jitter, up to a deadline for the whole call. What comes back is checked: its number of rows, that
all numbers are finite, and the version. Anything else is a RewardError: no reward or value is ever made up.
"""

import dataclasses
import json
import logging
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

from rxt_platform.errors import RewardError
from rxt_platform.model.encoder_model import RxTEncoder
from rxt_platform.rl import versions
from rxt_platform.rl.rewards import Reward, ScoredTurn
from rxt_platform.serving.schema import APP, REFUSED

logger = logging.getLogger(__name__)

_PASSING = frozenset({408, 429, 502, 503, 504})
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0
_LARGEST_ANSWER = 2**26  # bytes
_PARTS = {field.name for field in dataclasses.fields(Reward)}
_MAY_BE_NONE = ("total", "recall")
_KEPT_VERSIONS = 8


class Passing(Exception):
    """An attempt failed for a reason that may pass."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Final(Exception):
    """An attempt failed for a reason that stays."""


class CriticClient(ABC):
    """A RewardService (`rl.critic`): gives rewards and values; publishes versions. Threads may share it."""

    def __init__(self, place: str, deadline_s: float, attempt_s: float, folder: Path | None) -> None:
        self._place, self._deadline_s, self._attempt_s, self._folder = place, deadline_s, attempt_s, folder
        self._limits: dict[str, float] | None = None

    def score(self, conversations: Sequence[Sequence[ScoredTurn]]) -> list[list[Reward]]:
        """The reward of every follow-up (all turns but the first) of each conversation, all by one version.

        Raises RewardError when they can't be had.
        """
        call = _Call(self, "score", f"{sum(map(len, conversations))} turns")
        episodes = [[_turn(turn) for turn in turns] for turns in conversations]
        rewards: list[list[Reward]] = []
        version: str | None = None
        for chunk in self._chunks(episodes, len, call):
            answer = call.ask({"episodes": chunk})
            if not isinstance(answer.get("version"), str) or version not in (None, answer["version"]):
                raise call.broken(f"rewards of version {answer.get('version')!r} after {version!r}")
            version = answer["version"]
            rewards += _read_rewards(answer, chunk, call)
        return rewards

    def values(self, states: Sequence[Sequence[int]], version: int) -> list[float]:
        """V of each state's token ids, by exactly that version. Raises RewardError when they can't be had."""
        call = _Call(self, "value", f"{len(states)} rows by version {version}")
        values: list[float] = []
        for chunk in self._chunks([list(row) for row in states], lambda _: 1, call):
            answer = call.ask({"version": version, "input_ids": chunk})
            if type(answer.get("version")) is not int or answer["version"] != version:
                raise call.broken(f"values of version {answer.get('version')!r}, asked for {version}")
            values += _read_values(answer, len(chunk), call)
        return values

    def publish(self, version: int, critic: RxTEncoder) -> None:
        """Make a version's weights known to the service before they are asked for; old ones are deleted.

        The same weights may be published again. Raises ArtifactError for others under the same number.
        """
        if self._folder is None:
            raise RewardError(f"{self._place}: this client has no versions folder to publish in: give it `versions`")
        versions.publish(self._folder, version, critic)
        if versions.available(self._folder)[-1] == version:  # else a resumed trainer comes to where it was
            versions.prune(self._folder, _KEPT_VERSIONS)

    def info(self) -> dict[str, Any]:
        """What the service has and allows. Raises RewardError when it can't be had."""
        return _Call(self, "info", "limits").ask({})

    @abstractmethod
    def send(self, what: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One attempt. Raises Passing or Final."""

    @abstractmethod
    def size(self, item: Any) -> int:
        """Bytes that a row or an episode takes in a request."""

    def _chunks(self, items: list[Any], rows: Callable[[Any], int], call: "_Call") -> Iterator[list[Any]]:
        """Items in order, in requests that keep the service's limits."""
        if not items:
            return
        if self._limits is None:
            self._limits = call.ask({}, "info")["limits"]
        most_rows, most_bytes = self._limits["max_rows"], self._limits["max_body_bytes"] - 1000
        chunk: list[Any] = []
        total_rows = total_bytes = 0
        for item in items:
            more_rows, more_bytes = rows(item), self.size(item)
            if chunk and (total_rows + more_rows > most_rows or total_bytes + more_bytes > most_bytes):
                yield chunk
                chunk, total_rows, total_bytes = [], 0, 0
            chunk.append(item)
            total_rows += more_rows
            total_bytes += more_bytes
        yield chunk


class HandleClient(CriticClient):
    """By handle, from any process of the Ray cluster on which the service is deployed."""

    def __init__(
        self, app: str = APP, *, versions: Path | None = None, deadline_s: float = 120.0, attempt_s: float = 40.0
    ) -> None:
        """`deadline_s` of a whole call, `attempt_s` of one attempt: longer than the service's request_timeout_s.

        `versions` is the folder that the service takes its versions from, for `publish`.
        """
        super().__init__(f"application {app!r}", deadline_s, attempt_s, versions)
        self._app = app
        self._handle: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """To another process goes the name: the handle is of this one."""
        return {**self.__dict__, "_handle": None}

    def send(self, what: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One attempt. Raises Passing or Final."""
        from ray import exceptions, serve
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        try:
            if self._handle is None:
                self._handle = serve.get_app_handle(self._app)
            response = getattr(self._handle, what).remote(request)
            try:
                answer: dict[str, Any] = response.result(timeout_s=timeout_s)
            except TimeoutError:
                response.cancel()
                raise Passing(f"no answer within {timeout_s:.1f} s") from None
        except (BackPressureError, DeploymentUnavailableError, exceptions.RayActorError) as error:
            raise Passing(_line(error)) from None
        except (RayServeException, exceptions.RayTaskError) as error:  # no such application; an error in the replica
            raise Final(_line(error)) from None
        except exceptions.RayError as error:
            raise Passing(_line(error)) from None
        if isinstance(answer, dict) and REFUSED in answer:
            _raise_refused(answer[REFUSED].get("status", 500), answer[REFUSED])
        return answer

    def size(self, item: Any) -> int:
        """No limit of bytes holds here."""
        return 0


class HttpClient(CriticClient):
    """By HTTP, with the service's token."""

    def __init__(
        self,
        address: str,
        token: str,
        *,
        versions: Path | None = None,
        deadline_s: float = 120.0,
        attempt_s: float = 40.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """As `HandleClient`; `versions` as this machine sees the folder."""
        super().__init__(address, deadline_s, attempt_s, versions)
        # No proxy and no .netrc of the environment: the token goes to this address only.
        self._http = httpx.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            trust_env=False,
            transport=transport,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, what: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One attempt. Raises Passing or Final."""
        until = time.monotonic() + timeout_s
        method = "GET" if what == "info" else "POST"
        content = json.dumps(request, separators=(",", ":"), ensure_ascii=False).encode() if request else None
        try:
            with self._http.stream(method, f"/v1/{what}", content=content, timeout=timeout_s) as response:
                body = b""
                for part in response.iter_bytes():
                    body += part
                    if len(body) > _LARGEST_ANSWER:
                        raise Final(f"an answer of more than {_LARGEST_ANSWER} bytes")
                    if time.monotonic() > until:  # httpx bounds each read, not their sum
                        raise Passing(f"no whole answer within {timeout_s:.1f} s")
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Passing(f"{type(error).__name__}: {error}") from None
        except httpx.InvalidURL as error:
            raise Final(f"not an address: {error}") from None
        return _read_answer(response, body)

    def size(self, item: Any) -> int:
        """Bytes of its JSON."""
        return len(json.dumps(item, separators=(",", ":"), ensure_ascii=False).encode()) + 1


class _Call:
    """One call of a client: its attempts and its deadline."""

    def __init__(self, client: CriticClient, what: str, amount: str) -> None:
        self._client, self._what, self._amount = client, what, amount
        self._deadline = time.monotonic() + client._deadline_s
        self._attempts = 0

    def ask(self, request: dict[str, Any], what: str | None = None) -> dict[str, Any]:
        """The service's answer. Raises RewardError when it refuses for good, or at the deadline."""
        client = self._client
        for attempt in range(1_000_000):
            self._attempts += 1
            left = self._deadline - time.monotonic()
            try:
                answer = client.send(what or self._what, request, max(0.001, min(left, client._attempt_s)))
            except Final as error:
                raise self.broken(str(error)) from None
            except Passing as error:
                longest = min(_LONGEST_BACKOFF_S, max(_FIRST_BACKOFF_S * 2.0 ** min(attempt, 10), error.retry_after_s))
                wait = random.uniform(0, longest)
                if time.monotonic() + wait > self._deadline:
                    raise self.broken(f"given up after {client._deadline_s:g} s; the last reason: {error}") from None
                logger.info("%s: %s: %s; again in %.1f s", client._place, self._what, error, wait)
                time.sleep(wait)
            else:
                if not isinstance(answer, dict):
                    raise self.broken(f"an answer that is {type(answer).__name__}")
                return answer
        raise AssertionError("unreachable")

    def broken(self, reason: str) -> RewardError:
        """The error that says where, what for, how often and why."""
        times = "attempt" if self._attempts == 1 else "attempts"
        return RewardError(
            f"{self._client._place}: no {self._what} for {self._amount} after {self._attempts} {times}: {reason}"
        )


def _line(error: BaseException) -> str:
    """What Ray says, in one line: of a traceback the last one."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[-1] if "Traceback" in str(error) else lines[0]
    return f"{type(error).__name__}: {text}"


def _turn(turn: ScoredTurn) -> dict[str, Any]:
    """As JSON has it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(turn).items()}


def _read_answer(response: httpx.Response, body: bytes) -> dict[str, Any]:
    status = response.status_code
    try:
        answer = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        answer = None
    if status == 200 and isinstance(answer, dict):
        return answer
    if isinstance(answer, dict) and "error" in answer:
        _raise_refused(status, answer)
    text = f"HTTP {status}: {body[:200].decode(errors='replace')}"
    if status in _PASSING or status == 500:  # Serve's own 500: it lost the replica
        raise Passing(text, _retry_after(response))
    raise Final(text)


def _raise_refused(status: int, refused: dict[str, Any]) -> None:
    """What the service itself says no to."""
    reason = f"{status} {refused.get('error')}: {refused.get('message')}"
    if status in _PASSING:
        wait = refused.get("retry_after_s")
        raise Passing(reason, wait if isinstance(wait, int | float) and math.isfinite(wait) else 0.0)
    raise Final(reason)


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in an answer")


def _read_values(answer: dict[str, Any], count: int, call: _Call) -> list[float]:
    values = answer.get("values")
    if not isinstance(values, list) or len(values) != count:
        found = len(values) if isinstance(values, list) else type(values).__name__
        raise call.broken(f"{found} values for {count} rows")
    for row, value in enumerate(values):
        if not _is_number(value):
            raise call.broken(f"row {row} has the value {value!r}")
    return [float(value) for value in values]


def _read_rewards(answer: dict[str, Any], episodes: list[Any], call: _Call) -> list[list[Reward]]:
    rewards = answer.get("rewards")
    if not isinstance(rewards, list) or len(rewards) != len(episodes):
        raise call.broken(f"rewards of other than the {len(episodes)} episodes asked for")
    read = []
    for number, (found, episode) in enumerate(zip(rewards, episodes, strict=True)):
        if not isinstance(found, list) or len(found) != max(0, len(episode) - 1):
            raise call.broken(f"episode {number}: not one reward for each of its {len(episode) - 1} follow-ups")
        for follow_up, parts in enumerate(found):
            if not isinstance(parts, dict) or parts.keys() != _PARTS:
                raise call.broken(f"episode {number}, follow-up {follow_up}: not a reward: {str(parts)[:200]}")
            for name, value in parts.items():
                if not _is_number(value) and not (value is None and name in _MAY_BE_NONE):
                    raise call.broken(f"episode {number}, follow-up {follow_up}: {name} is {value!r}")
        read.append([Reward(**parts) for parts in found])
    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""A replica of the service: what Ray Serve starts. Its methods are called by handle; HTTP comes through the app."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI

from rxt_platform.config.serving import ServingConfig
from rxt_platform.serving.body import read_json
from rxt_platform.serving.http import build_app
from rxt_platform.serving.lane import Lane
from rxt_platform.serving.schema import REFUSED, Refusal, ScoreRequest, ValueRequest, parse
from rxt_platform.serving.worker import OnTime, Worker
from rxt_platform.training.distributed import use_cpus


class CriticService:
    """Rewards and values, by handle (plain dicts) and by HTTP; both ways share queue, limits and computing thread."""

    def __init__(self, config: ServingConfig, token_sha256: str | None) -> None:
        use_cpus(max(1, int(config.service.cpus_per_replica)))
        self._limits, self._token_sha256 = config.service, token_sha256
        self._worker = Worker(config)
        self._lane = Lane(config.service.max_queued_requests, config.service.request_timeout_s)
        self._answers: dict[str, Callable[[Any, OnTime], dict[str, Any]]] = {
            "score": lambda raw, on_time: self._worker.score(parse(ScoreRequest, raw), on_time),
            "value": lambda raw, on_time: self._worker.value(parse(ValueRequest, raw), on_time),
        }

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP side."""
        return build_app(self._answer_body, self._limits, self._token_sha256)

    async def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """A ScoreRequest's answer, or {"refused": {...}}."""
        return await self._answer_handle("score", request)

    async def value(self, request: dict[str, Any]) -> dict[str, Any]:
        """A ValueRequest's answer, or {"refused": {...}}."""
        return await self._answer_handle("value", request)

    async def info(self, _: dict[str, Any]) -> dict[str, Any]:
        """What the service has and allows."""
        return self._worker.info()

    def check_health(self) -> None:
        """Ray asks from time to time, and replaces a replica that raises."""
        self._lane.check()

    async def _answer_handle(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = await self._lane.run(partial(self._answers[what], request))
        except Refusal as refusal:
            return {REFUSED: {"status": refusal.status, **refusal.body()}}
        return answer

    async def _answer_body(self, what: str, body: bytes) -> dict[str, Any]:
        if what == "info":
            return self._worker.info()
        job = self._answers[what]
        depth = self._limits.max_json_depth
        answer: dict[str, Any] = await self._lane.run(lambda on_time: job(read_json(body, depth), on_time))
        return answer

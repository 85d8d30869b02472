"""The HTTP side: token, size and content of a request are checked, in that order, before anything is computed."""

import importlib.metadata
import math
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from rxt_platform.config.serving import ServiceConfig
from rxt_platform.serving import schema
from rxt_platform.serving.auth import is_allowed
from rxt_platform.serving.schema import Refusal

Answer = Callable[[str, bytes], Awaitable[dict[str, Any]]]  # of "score", "value" or "info" to a body

_ABOUT = """Rewards of answers in conversations, and values of the states before them.

`Authorization: Bearer TOKEN` goes with every request to `/v1`. A 503 means busy: try again after `Retry-After`.
"""
_REFUSALS = {
    401: "no token, or a wrong one",
    409: "that version of the critic is not here; the body names those that are",
    413: "too large: bytes, rows or turns",
    422: "not a request: the message names the place",
    503: "busy",
    504: "not computed by the deadline",
}
_REF = "#/components/schemas/{model}"


def build_app(answer: Answer, limits: ServiceConfig, token_sha256: str | None) -> FastAPI:
    """The application over what answers. Without a token's hash nothing but `/healthz` and the docs is answered."""
    app = FastAPI(
        title="rxt_platform critic",
        version=importlib.metadata.version("rxt-platform"),
        description=_ABOUT,
        exception_handlers={Refusal: _refused, HTTPException: _no_route},
    )

    async def admit(request: Request) -> bytes:
        if not is_allowed(request.headers.get("authorization"), token_sha256):
            raise Refusal(
                401, "unauthorized", "this needs the header `Authorization: Bearer TOKEN` with the right token"
            )
        return await _read_body(request, limits.max_body_bytes)

    @app.get("/healthz", summary="Whether the service answers; needs no token")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/info", response_model=schema.Info, responses=_responses(401))
    async def info(request: Request) -> Response:
        """What the service has and allows."""
        await admit(request)
        return JSONResponse(await answer("info", b""))

    @app.post(
        "/v1/score",
        response_model=schema.ScoreAnswer,
        responses=_responses(*_REFUSALS),
        openapi_extra=_body(schema.ScoreRequest),
    )
    async def score(request: Request) -> Response:
        """The reward of every follow-up of each episode, with its parts."""
        return JSONResponse(await answer("score", await admit(request)))

    @app.post(
        "/v1/value",
        response_model=schema.ValueAnswer,
        responses=_responses(*_REFUSALS),
        openapi_extra=_body(schema.ValueRequest),
    )
    async def value(request: Request) -> Response:
        """The value of each state, by exactly the version that was asked for."""
        return JSONResponse(await answer("value", await admit(request)))

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _read_body(request: Request, limit: int) -> bytes:
    """The body; refuses (413) a larger one as soon as it shows."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "too_large", f"a body of more than {limit} bytes: send several requests", limit=limit)


async def _refused(_: Request, refusal: Any) -> Response:
    headers = {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    return JSONResponse(refusal.body(), refusal.status, headers)


async def _no_route(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; there are /healthz, /v1/info, /v1/score, /v1/value"
    return JSONResponse({"error": "no_route", "message": message}, error.status_code, error.headers)


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _REFUSALS[status], "model": schema.Refused} for status in statuses}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """The request in the schema: it is read by hand, so that limits hold before anything is parsed."""
    content = {"schema": {"$ref": _REF.format(model=model.__name__)}, "example": schema.EXAMPLES[model]}
    return {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "security": [{"token": []}],
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, requests = models_json_schema([(model, "validation") for model in schema.EXAMPLES], ref_template=_REF)
        components = made.setdefault("components", {})
        components.setdefault("schemas", {}).update(requests["$defs"])
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["paths"]["/v1/info"]["get"]["security"] = [{"token": []}]
        app.openapi_schema = made
    return app.openapi_schema

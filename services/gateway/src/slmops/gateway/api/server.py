"""The local HTTP API: OpenAI's chat completions, health and metrics. Prompts and answers are never logged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.contracts.errors import InferenceFailed, NotFound, SlmopsError
from slmops.gateway.api.access import Access, guarded
from slmops.gateway.api.body import UNSUPPORTED, RequestBody
from slmops.gateway.api.chat import ChatRequest
from slmops.gateway.api.completion import CompletionRequest
from slmops.gateway.api.refusals import (
    error_body,
    error_response,
    http_error,
    internal_error,
    invalid_request,
    refusal,
    too_large_answer,
)
from slmops.gateway.api.replies import Reply
from slmops.gateway.api.request_ids import RequestIds
from slmops.gateway.serving.inference import Done, Release, Token, TokenLogprob
from slmops.gateway.serving.metrics import GenAiMetrics
from slmops.gateway.serving.releases import Serving

Items = AsyncGenerator[tuple[Release, Token | Done], None]


@dataclass(frozen=True, slots=True)
class ApiLimits:
    max_body_bytes: int = 2**20


def create_api(
    serving: Serving,
    *,
    registry: CollectorRegistry | None = None,
    limits: ApiLimits | None = None,
    access: Access | None = None,
) -> ASGIApp:
    """Returns the API's application behind the checks of `access`.

    `/metrics` shows `registry`, to which the GenAI metrics are added.
    """
    registry = registry or CollectorRegistry()
    metered = GenAiMetrics(registry), limits or ApiLimits()

    async def models(request: Request) -> Response:
        card = _card(serving)
        return JSONResponse({"object": "list", "data": [card] if card else []})

    async def model(request: Request) -> Response:
        try:
            _check_served(serving, request.path_params["name"])
        except NotFound as error:
            return refusal(error)
        card = _card(serving)
        return JSONResponse(card) if card else refusal(NotFound("this gateway does not serve a model yet"))

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(request: Request) -> Response:
        return JSONResponse({"ready": serving.ready}, status_code=200 if serving.ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _Generation(ChatRequest, serving, *metered), methods=["POST"]),
            Route("/v1/completions", _Generation(CompletionRequest, serving, *metered), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: http_error, Exception: internal_error},
    )
    return RequestIds(guarded(app, access or Access()))


def _card(serving: Serving) -> dict[str, Any] | None:
    """Describes the model that is served, with its limits under the names that vLLM and Groq use.

    `tool_call_format` is null for a model that does not know tools.
    """
    release, limits = serving.release, serving.limits
    if release is None or limits is None:
        return None
    known = {"id": release.model, "object": "model", "created": 0, "owned_by": "slmops"}
    told = {"max_model_len": limits.context, "max_completion_tokens": limits.answer}
    return {**known, **told, "tool_call_format": serving.tool_format}


def _check_served(serving: Serving, model: str | None) -> None:
    """Raises `NotFound` if `model`, with or without its version, is not the served one."""
    release = serving.release
    if model and release and model not in (release.model, f"{release.model}:{release.version}"):
        raise NotFound("this gateway does not serve that model", fix=f"Ask for {release.model!r}.")


class _Generation:
    """An endpoint that generates an answer to requests of one form."""

    def __init__(self, form: type[RequestBody], serving: Serving, metrics: GenAiMetrics, limits: ApiLimits) -> None:
        self._form, self._serving, self._metrics, self._limits = form, serving, metrics, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, limit_bytes = Request(scope, receive), self._limits.max_body_bytes
        try:
            body = await _body(request, limit_bytes)
        except ClientDisconnect:
            return
        if body is None:
            message = f"the body is larger than {limit_bytes} bytes"
            response: Response | None = error_response(413, message, "body_too_large")
        else:
            response = await _unless_disconnected(request, self._respond(body))
        if response:
            await response(scope, receive, send)

    async def _respond(self, body: bytes) -> Response:
        try:
            asked = self._form.model_validate_json(body)
        except ValidationError as error:
            return invalid_request(error)
        started, limits = time.monotonic(), self._serving.limits
        if limits and (too_large := asked.beyond(limits)):
            return too_large_answer(*too_large, limits)
        if limits and asked.needs_tools and self._serving.tool_format is None:
            message = "the chat template of this model does not know 'tools'"
            return error_response(400, message, UNSUPPORTED, param="tools")
        items = self._measured(self._serving.generate(asked.inference(limits)), started)
        try:
            _check_served(self._serving, asked.model)
            release, first = await anext(items)  # a failure up to here still becomes an HTTP status
            reply = asked.reply(release)
            if not asked.stream:
                return JSONResponse(await _whole(reply, _chain(first, items)))
        except SlmopsError as error:
            await items.aclose()
            return refusal(error)
        return _EventStream(_events(reply, first, items, asked.include_usage))

    async def _measured(self, items: Items, started: float) -> Items:
        """Yields the same items and records the outcome and the duration in the metrics."""
        model = self._serving.release.model if self._serving.release else ""
        try:
            async with aclosing(items):
                async for release, item in items:
                    if isinstance(item, Done):
                        took = timedelta(seconds=time.monotonic() - started)
                        self._metrics.answered(self._form.operation, release.model, item, took)
                    yield release, item
        except SlmopsError as error:
            self._metrics.failed(self._form.operation, model, error.code, timedelta(seconds=time.monotonic() - started))
            raise


class _EventStream(StreamingResponse):
    """Server-sent events. Generation stops as soon as the client disconnects."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _whole(reply: Reply, items: AsyncGenerator[Token | Done, None]) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed to the client."""
    logprobs: list[TokenLogprob] = []
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Done):
                return reply.whole(item, logprobs)
            logprobs += item.logprobs
    raise InferenceFailed("the runner's answer stopped before it was complete")


async def _events(reply: Reply, first: Token | Done, items: Items, include_usage: bool) -> AsyncGenerator[str, None]:
    for body in reply.opening():
        yield _event(body)
    try:
        async with aclosing(items):
            async for item in _chain(first, items):
                if isinstance(item, Token):
                    yield _event(reply.token(item))
                    continue
                yield _event(reply.end(item))
                if include_usage:
                    yield _event(reply.usage(item))
    except SlmopsError as error:
        yield _event(error_body(error.what, error.code))  # too late for an HTTP status
    yield "data: [DONE]\n\n"


async def _chain(first: Token | Done, items: Items) -> AsyncGenerator[Token | Done, None]:
    async with aclosing(items):
        yield first
        async for _, item in items:
            yield item


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response | None:
    """Returns the result of `work`, or cancels it and returns None if the client disconnects first."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([task], timeout=0.25))[0]:
            if await request.is_disconnected():
                return None
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def _body(request: Request, limit_bytes: int) -> bytes | None:
    """Returns the body, or None if it is larger. Counts the bytes, because Content-Length may be missing or wrong."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            return None
    return bytes(body)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

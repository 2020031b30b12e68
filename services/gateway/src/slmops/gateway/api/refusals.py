"""Errors as HTTP responses in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from slmops.contracts.errors import InternalError, NotFound, NotReady, PromptRefused, SlmopsError
from slmops.gateway.api.body import UNSUPPORTED
from slmops.gateway.serving.inference import TokenLimits

_SHOWN_CHARACTERS = 100
"""Of a parameter's name, which the client chose."""


def error_body(message: str, code: str, kind: str = "server_error", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(message, code, kind, param), status_code=status, headers=headers)


def invalid_request(error: ValidationError) -> JSONResponse:
    """Names the first parameter that is not valid. Contains no value of the request."""
    first = error.errors(include_input=False, include_url=False)[0]
    param = str(first.get("ctx", {}).get("param", _path(first["loc"])))[:_SHOWN_CHARACTERS] or None
    if first["type"] == "extra_forbidden":
        return error_response(400, f"Unrecognized request argument supplied: {param}", "unknown_parameter", param=param)
    if first["type"] == UNSUPPORTED:
        return error_response(400, first["msg"], UNSUPPORTED, param=param)
    message = f"{param}: {first['msg']}" if param else first["msg"]
    return error_response(400, message, "invalid_request", param=param)


def too_large_answer(param: str, asked: int, limits: TokenLimits) -> JSONResponse:
    message = (
        f"{param} is too large: {asked}. This model supports at most {limits.answer} completion tokens, "
        f"whereas you provided {asked}."
    )
    return error_response(400, message, "invalid_value", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    """Returns a location as OpenAI writes it: `messages[0].content`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def refusal(error: SlmopsError) -> JSONResponse:
    message = f"{error.what}. {error.fix}" if error.fix else error.what
    if isinstance(error, NotReady):
        retry_after = {"Retry-After": str(math.ceil(error.delay.total_seconds()))}
        return error_response(503, message, error.code, headers=retry_after)
    status = 400 if isinstance(error, PromptRefused) else 404 if isinstance(error, NotFound) else 500
    return error_response(status, message, error.code)


async def http_error(request: Request, error: Exception) -> Response:
    """Answers a request for an unknown path or method."""
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
    return error_response(status, detail, "no_such_route")


async def internal_error(request: Request, error: Exception) -> Response:
    return error_response(500, "unexpected error; see the gateway's log", InternalError.code)

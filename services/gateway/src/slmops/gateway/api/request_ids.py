"""Gives every response an id, by which a client and an operator can speak of the same request."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "x-request-id"
_CHOSEN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""Ids that a client may choose: nothing that could change a log or a page that shows it."""


class RequestIds:
    """Sets `x-request-id` on every response: the client's, if it sent a valid one, otherwise a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        chosen = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = chosen if _CHOSEN.fullmatch(chosen) else f"req_{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)

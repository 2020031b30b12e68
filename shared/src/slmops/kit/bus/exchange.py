"""The form of a request and its answer on the bus: the requester's patience, and answers that need several messages.

A request says how long its requester waits. The service starts nothing that nobody waits for any more, stops what takes
longer, and passes what is left of the time to the services that it asks itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import Final, NamedTuple

from nats.aio.client import Client as Connection
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.api import Header

from slmops.contracts.errors import MessageTooLarge

REQUEST_TIMEOUT: Final = timedelta(seconds=30)
PATIENCE_HEADER: Final = "slmops-patience-s"
"""Seconds for which the requester waits. Not a point in time, because clocks differ."""
PARTS_HEADER: Final = "slmops-parts"
"""In a request: the requester accepts an answer in this many messages. In an answer: their number."""
MAX_PARTS: Final = 64
HEADER_ROOM_BYTES: Final = 4096
"""The server counts headers to the size of a message; if it is too large, the server closes the connection."""
_NO_RESPONDERS: Final = "503"

deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""Time of the event loop at which the requester of the command that this task carries out gives up."""


class Answer(NamedTuple):
    data: bytes
    headers: Mapping[str, str]


def patience(headers: Mapping[str, str]) -> timedelta:
    """Returns how long a requester waits. Anybody may send any text, so anything else counts as the default."""
    try:
        seconds = float(headers.get(PATIENCE_HEADER, ""))
        return timedelta(seconds=seconds) if 0 < seconds < 86400 else REQUEST_TIMEOUT
    except ValueError:
        return REQUEST_TIMEOUT


def remaining(timeout: timedelta) -> timedelta:
    """Returns `timeout`, or what is left until the deadline of the command that this task carries out."""
    until = deadline.get()
    if until is None:
        return timeout
    return min(timeout, timedelta(seconds=max(0.0, until - asyncio.get_running_loop().time())))


def parts_of(payload: bytes, limit_bytes: int, accepted: int, where: str) -> list[bytes]:
    """Splits an answer into messages. Raises `MessageTooLarge` for more than `accepted`."""
    size = limit_bytes - HEADER_ROOM_BYTES
    parts = [payload[start : start + size] for start in range(0, len(payload), size)] or [b""]
    if len(parts) > max(1, min(accepted, MAX_PARTS)):
        raise MessageTooLarge(
            f"the answer has {len(payload)} bytes, which is too large for the bus",
            where=where,
            fix="Request less at once: a smaller --limit, or a filter.",
        )
    return parts


async def exchange(
    connection: Connection, subject: str, payload: bytes, timeout: timedelta, headers: Mapping[str, str]
) -> Answer:
    """Sends a request and returns the whole answer.

    Raises `MessageTooLarge` before anything is sent, `TimeoutError`, and the errors of nats-py.
    """
    if len(payload) > connection.max_payload - HEADER_ROOM_BYTES:
        raise MessageTooLarge(
            f"the request has {len(payload)} bytes, and the bus takes {connection.max_payload - HEADER_ROOM_BYTES}",
            where=subject,
            fix="Send less at once, for example fewer files.",
        )
    inbox = connection.new_inbox()
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    sent = {**headers, PATIENCE_HEADER: f"{timeout.total_seconds():.3f}"}
    answers = await connection.subscribe(inbox, cb=arrived.put)
    try:
        async with asyncio.timeout(timeout.total_seconds()):
            await connection.publish(subject, payload, reply=inbox, headers=sent)
            first = await arrived.get()
            found = first.headers or {}
            if found.get(Header.STATUS.value) == _NO_RESPONDERS:
                raise NoRespondersError
            parts = [first.data]
            while len(parts) < _count(found):
                parts.append((await arrived.get()).data)
    finally:
        if not connection.is_closed:
            await answers.unsubscribe()
    return Answer(b"".join(parts), found)


def _count(headers: Mapping[str, str]) -> int:
    text = headers.get(PARTS_HEADER, "1")
    return min(int(text), MAX_PARTS) if text.isdecimal() else 1

"""Recognizes JetStream's errors for messages that it did not store for lack of space."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import APIError

from slmops.contracts.errors import DiskFull
from slmops.contracts.subjects import spec_of
from slmops.kit.sizes import size_text

log = logging.getLogger("slmops.refusals")
_STORE_FAILED = 10077
_NO_RESOURCES = {10023, 10028, 10047}
"""Error codes of the server for limits of the account, of its storage, and of the server's storage."""


async def no_room(js: JetStreamContext, stream: str, error: BaseException) -> DiskFull | None:
    """Returns a `DiskFull` if `stream` did not store a message for lack of space; None for other errors."""
    if not isinstance(error, APIError) or error.err_code not in {_STORE_FAILED, *_NO_RESOURCES}:
        return None
    if "maximum" not in (error.description or ""):
        return DiskFull(
            f"the NATS server has no space for {stream}: {error.description}",
            where=stream,
            fix="Free disk space on the server, or raise its limit (max_file_store).",
        )
    limit = await _limit(js, stream)
    return DiskFull(
        f"the stream {stream} is full ({size_text(limit)}) and refuses new messages; stored messages are kept",
        where=stream,
        fix=f"Enlarge it: slmops stream resize {stream} {size_text(2 * limit)}.",
    )


async def _limit(js: JetStreamContext, stream: str) -> int:
    """Returns the stream's limit on the server, or our default if the server does not answer."""
    with suppress(TimeoutError, NatsError):
        return int((await js.stream_info(stream)).config.max_bytes or 0)
    spec = spec_of(stream)
    return spec.max_bytes if spec else 0


async def _nothing(_error: DiskFull) -> None:
    """Does nothing."""


async def until_stored(
    store: Callable[[], Awaitable[object]], waiting: Callable[[DiskFull], Awaitable[None]] = _nothing
) -> None:
    """Calls `store` until there is space for the message. For publishers without an outbox.

    `waiting` is called before each further attempt. Raises the other errors of `store`.
    """
    while True:
        try:
            await store()
            return
        except DiskFull as error:
            log.warning("waiting for free space: %s", error)
            await waiting(error)
            await asyncio.sleep(error.delay.total_seconds())

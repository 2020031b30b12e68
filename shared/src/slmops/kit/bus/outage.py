"""Keeps messages while the service's own database does not answer, or has no space.

An outage is no fault of a message. If it used up the deliveries of messages, an outage of an hour would dead-letter an
hour of messages. So the handler is tried again in place, without a limit, and the messages are kept alive, so that no
other delivery is counted. The consumer takes no further messages: they wait in their stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from slmops.contracts.errors import DatabaseFull, DatabaseUnreachable
from slmops.kit.bus.provision import ACK_WAIT_S
from slmops.kit.cancellation import cancel_and_wait

log = logging.getLogger("slmops.delivery")
T = TypeVar("T")
_OUTAGES = (DatabaseUnreachable, DatabaseFull)
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 5.0


async def outlast(work: Callable[[], Awaitable[T]], messages: Sequence[Msg], stopping: asyncio.Event) -> T:
    """Runs `work`, which must be idempotent, and again until the database answers. Raises its other errors.

    When the service stops, it raises the database's error, and the messages are delivered again to another process.
    """
    try:
        return await work()
    except _OUTAGES as error:
        log.warning("keeping %d messages until the database answers: %s", len(messages), error)
    beating = asyncio.create_task(_kept_alive(messages))
    pause_s = _PAUSE_S
    try:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                return await work()
            except _OUTAGES:
                if stopping.is_set():
                    raise
    finally:
        await cancel_and_wait([beating])


async def _kept_alive(messages: Sequence[Msg]) -> None:
    while True:
        for message in messages:
            with suppress(NatsError):  # in the worst case the message is delivered twice
                await message.in_progress()
        await asyncio.sleep(ACK_WAIT_S / 3)

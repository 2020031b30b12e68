"""Makes the stream of enrolments and the gateways' overlays agree with the journal.

The stream keeps the newest enrolment of each gateway, so it should have one message per gateway. Enrolments are missing
after an upgrade from a release without this stream, and after a loss of the stream. Those of removed gateways are
deleted, because other services read the stream to learn who belongs to the fleet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope, event_id
from slmops.contracts.errors import TemporaryError
from slmops.contracts.events import GatewayEnrolled
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.gaps import Durable, answering
from slmops.kit.journal import Journal
from slmops.rollout import store

log = logging.getLogger("slmops.rollout")
_PAGE = 200
_AT_ONCE = 20


async def keep_enrolments(journal: Journal, client: Callable[[], BusClient]) -> None:
    """Republishes missing enrolments once at start, retrying until it succeeds; then waits to be cancelled."""
    while True:
        try:
            await republish_enrolments(journal, client())
            break
        except TemporaryError as error:
            log.warning("could not compare enrolments with the bus, retrying: %s", error)
            await asyncio.sleep(error.delay.total_seconds())
    await asyncio.Event().wait()


async def republish_enrolments(journal: Journal, client: BusClient) -> int:
    """Publishes missing enrolments as the same events; returns their number. O(gateways) only if the numbers differ.

    Raises `Unreachable`, `DiskFull`.
    """
    if await _stored(client) >= await journal.read(store.enrolled):
        return 0
    after, published = "", 0
    while page := await journal.read(partial(store.enrolments, after=after, limit=_PAGE)):
        for start in range(0, len(page), _AT_ONCE):
            published += sum(await asyncio.gather(*(_publish(client, one) for one in page[start : start + _AT_ONCE])))
        after = page[-1].gateway_id
    log.info("published %s enrolments again that were missing on the bus", published)
    return published


async def _publish(client: BusClient, event: GatewayEnrolled) -> bool:
    if await client.latest(GatewayEnrolled, event.gateway_id) is not None:
        return False
    envelope = Envelope(
        id=event_id("rollout", f"gateway:{event.gateway_id}", f"enrolment {event.enrolment}"),
        source="slmops/rollout",
        type=event.type,
        time=event.at,
        subject=event.key,
    )
    # Without a message id: the server remembers the ids of removed messages for a while and would not store this one.
    headers = {key: value for key, value in envelope.headers().items() if key != MESSAGE_ID_HEADER}
    await client.store(event.subject, event.model_dump_json().encode(), headers)
    return True


async def _stored(client: BusClient) -> int:
    stream = subjects.stream_of(f"{GatewayEnrolled.type}.any")
    assert stream is not None, "enrolments are stored"
    with answering(Durable(stream, "")):
        return (await client.js.stream_info(stream)).state.messages

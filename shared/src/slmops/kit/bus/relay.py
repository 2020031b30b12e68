"""Publishes the events of the journal's outbox in order, and marks each as published when it is stored.

After a crash between storing and marking an event is published again. This is harmless because of JetStream's dedupe
window and because consumers are idempotent by event id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from slmops.contracts.errors import TemporaryError
from slmops.kit.bus.client import BusClient
from slmops.kit.journal import Journal

log = logging.getLogger("slmops.relay")
_POLL_S = 1.0  # another process of the service may have filled the outbox


async def run_relay(journal: Journal, client: BusClient) -> None:
    """Runs until cancelled."""
    while True:
        try:
            while await drain(journal, client):
                pass
        except TemporaryError as error:
            log.warning("could not publish the outbox, retrying: %s", error)
            await asyncio.sleep(error.delay.total_seconds())
        journal.appended.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(journal.appended.wait(), _POLL_S)


async def drain(journal: Journal, client: BusClient) -> int:
    """Publishes one page of the outbox. Returns the number of published events."""
    waiting = await journal.outbox()
    done: list[int] = []
    try:
        for recorded in waiting:
            await client.publish(recorded.event, recorded.envelope)
            done.append(recorded.position)
    finally:
        if done:
            await journal.published(done)
    return len(done)

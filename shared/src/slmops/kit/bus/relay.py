"""Publishes the events of the journal's outbox, and marks each as published when it is stored.

Events of one key are published one after another. Up to 64 of different keys wait for their acknowledgements at the
same time: they are sent in the order of the journal, and only an error of one can bring another before it.

After a crash between storing and marking an event is published again. This is harmless because of JetStream's dedupe
window and because consumers are idempotent by event id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict

from slmops.contracts.errors import TemporaryError
from slmops.kit.bus.client import BusClient
from slmops.kit.journal import Journal, Recorded

log = logging.getLogger("slmops.relay")
_IN_FLIGHT = 64
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
    """Publishes one page of the outbox; returns the number of published events. O(page).

    After an error of one event the later ones of its key stay in the outbox. Raises the first error at the end.
    """
    keys: dict[str, list[Recorded]] = defaultdict(list)
    for recorded in await journal.outbox():
        keys[recorded.event.key].append(recorded)
    done: list[int] = []
    free = asyncio.Semaphore(_IN_FLIGHT)

    async def publish(events: list[Recorded]) -> None:
        for recorded in events:
            async with free:
                await client.publish(recorded.event, recorded.envelope)
            done.append(recorded.position)

    try:
        ended = await asyncio.gather(*map(publish, keys.values()), return_exceptions=True)
    finally:
        if done:
            await journal.published(done)
    for error in ended:
        if error is not None:
            raise error
    return len(done)

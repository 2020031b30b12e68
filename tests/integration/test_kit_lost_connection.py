"""A connection that is closed for good ends the service; it must not keep it busy with nothing."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from integration.kit_world import unrestricted

from slmops.contracts.events import ModelAliasMoved
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus import provisioner
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.settings import BusSettings

if TYPE_CHECKING:
    from servers import NatsServer


async def ignore(_event: ModelAliasMoved, _delivered: MessageContext) -> None:
    """There is nothing to consume."""


async def started(server: NatsServer) -> Bus:
    await provisioner.run(BusSettings(nats_url=server.url, nats_creds=server.creds[PROVISIONER]))
    creds = unrestricted(server.creds["optimizer"].parent, "optimizer")  # the real one consumes no aliases
    bus = Bus("optimizer", BusSettings(nats_url=server.url, nats_creds=creds))
    bus.on(ModelAliasMoved, ignore)
    await bus.start()
    return bus


async def test_whoever_runs_the_bus_is_told_when_the_connection_is_lost_for_good(nats_server: NatsServer) -> None:
    bus, lost = await started(nats_server), asyncio.Event()
    bus.on_lost = lost.set
    await bus.client.connection.close()
    assert await asyncio.wait_for(lost.wait(), 5)
    await asyncio.wait_for(asyncio.sleep(0.5), 5)  # a consumer that spins would let nothing else run
    with suppress(ExceptionGroup):  # there is nobody to say goodbye to
        await bus.stop()


async def test_an_orderly_stop_is_no_loss(nats_server: NatsServer) -> None:
    bus, lost = await started(nats_server), asyncio.Event()
    bus.on_lost = lost.set
    await bus.stop()
    assert not lost.is_set()

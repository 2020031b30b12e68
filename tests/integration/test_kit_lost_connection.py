"""A permanently closed connection stops the service; its consumers must not run in a busy loop."""

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
    """Consumes nothing."""


async def start_bus(server: NatsServer) -> Bus:
    await provisioner.run(BusSettings(nats_url=server.url, nats_creds=server.creds[PROVISIONER]))
    creds = unrestricted(server.creds["optimizer"].parent, "optimizer")  # the real optimizer consumes no aliases
    bus = Bus("optimizer", BusSettings(nats_url=server.url, nats_creds=creds))
    bus.on(ModelAliasMoved, ignore)
    await bus.start()
    return bus


async def test_on_lost_is_called_when_the_connection_is_closed_permanently(nats_server: NatsServer) -> None:
    bus, lost = await start_bus(nats_server), asyncio.Event()
    bus.on_lost = lost.set
    await bus.client.connection.close()
    assert await asyncio.wait_for(lost.wait(), 5)
    await asyncio.wait_for(asyncio.sleep(0.5), 5)  # a busy loop in a consumer would block this
    with suppress(ExceptionGroup):  # the server cannot be notified any more
        await bus.stop()


async def test_on_lost_is_not_called_by_a_normal_stop(nats_server: NatsServer) -> None:
    bus, lost = await start_bus(nats_server), asyncio.Event()
    bus.on_lost = lost.set
    await bus.stop()
    assert not lost.is_set()

"""Messages wait for a database that does not answer, however long that takes, and are handled afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import World, moved, until, world_on

from slmops.contracts.errors import DatabaseUnreachable
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.delivery import MAX_DELIVER
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext

if TYPE_CHECKING:
    from servers import NatsServer

NAMES = ["first", "second", "third"]


@pytest.fixture
async def world(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("slmops.kit.bus.delivery.BACKOFF_S", (0.02,) * 5)
    monkeypatch.setattr("slmops.kit.bus.outage._PAUSE_S", 0.02)
    monkeypatch.setattr("slmops.kit.bus.outage._LONGEST_PAUSE_S", 0.04)
    monkeypatch.setattr("slmops.kit.bus.outage.ACK_WAIT_S", 0.03)
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


class Optimizer:
    """Its database does not answer for more tries than a message has deliveries."""

    def __init__(self) -> None:
        self.tries = 0
        self.done: list[str] = []
        self.attempts: set[int] = set()

    def _database(self) -> None:
        self.tries += 1
        if self.tries <= 3 * MAX_DELIVER:
            raise DatabaseUnreachable("gone", delay=timedelta(0))

    async def on_alias(self, event: ModelAliasMoved, context: MessageContext) -> None:
        self._database()
        self.done.append(event.alias)
        self.attempts.add(context.attempt)

    async def on_aliases(self, batch: Batch[ModelAliasMoved]) -> Refused:
        self._database()
        self.done += [received.body.alias for received in batch]
        self.attempts.update(received.context.attempt for received in batch)
        return {}


@pytest.mark.parametrize("batches", [False, True], ids=["one by one", "in batches"])
async def test_an_outage_of_the_database_uses_up_no_delivery(world: World, batches: bool) -> None:
    optimizer = Optimizer()

    def declare(bus: Bus) -> None:
        if batches:
            bus.on_batches(ModelAliasMoved, optimizer.on_aliases)
        else:
            bus.on(ModelAliasMoved, optimizer.on_alias)

    await world.publish(*map(moved, NAMES))
    await world.service("optimizer", declare)
    await until(lambda: len(optimizer.done) == len(NAMES))
    assert optimizer.done == NAMES
    assert optimizer.attempts == {1}
    await world.dead_letters(0)


async def test_a_service_stops_in_an_outage_and_another_process_gets_the_message(world: World) -> None:
    gone, back = Optimizer(), Optimizer()
    gone.tries, back.tries = -10_000, 10_000
    bus = await world.service("optimizer", lambda bus: bus.on(ModelAliasMoved, gone.on_alias))
    await world.publish(moved("first"))
    await until(lambda: gone.tries > -10_000)
    await world.service("optimizer", lambda bus: bus.on(ModelAliasMoved, back.on_alias))
    stopping = asyncio.create_task(bus.stop())
    await until(lambda: back.done == ["first"])
    await stopping
    assert back.attempts == {2}
    await world.dead_letters(0)

"""Dead letters in special cases: very large messages, a missing stream, and messages that crash their consumers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import World, envelope, moved, until, world_on

from slmops.contracts.errors import Conflict, InternalError, PermanentError
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.bus.deadletters import CODE_HEADER, REASON_HEADER, dead_letters, replay
from slmops.kit.bus.provision import consumer, provision
from slmops.kit.bus.service_bus import Bus, MessageContext

if TYPE_CHECKING:
    from servers import NatsServer

SUBJECT = ModelAliasMoved.type
DURABLE = "optimizer-slmops_model_alias_moved_v1"


@pytest.fixture
async def world(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Yields a bus with immediate redeliveries, and three instead of six."""
    monkeypatch.setattr("slmops.kit.bus.delivery.MAX_DELIVER", 3)
    monkeypatch.setattr("slmops.kit.bus.delivery.BACKOFF_S", (0.02, 0.02))
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


class Optimizer:
    def __init__(self) -> None:
        self.tried: list[str] = []

    async def on_alias(self, event: ModelAliasMoved, _: MessageContext) -> None:
        self.tried.append(event.alias)
        if event.alias == "busy":
            raise Conflict("busy", delay=timedelta(0))

    def declare(self, bus: Bus) -> None:
        bus.on(ModelAliasMoved, self.on_alias)


@pytest.mark.parametrize("large", ["payload", "header"])
async def test_a_message_of_the_maximum_size_is_dead_lettered_in_part_and_marked_as_incomplete(
    world: World, large: str
) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    limit = world.client.connection.max_payload
    payload, headers = (b"x" * (limit - 100), {}) if large == "payload" else (b"x", {"much": "x" * 65_400})
    await world.client.js.publish(SUBJECT, payload, headers=headers)
    await world.dead_letters(1)
    (letter,) = [letter async for letter in dead_letters(world.client)]
    assert (letter.subject, letter.code, letter.size_bytes) == (SUBJECT, "invalid_message", len(payload))
    assert not letter.whole
    with pytest.raises(PermanentError, match="incomplete"):
        await replay(world.client, letter)
    await world.dead_letters(1)
    await world.publish(moved("next"))
    await until(lambda: optimizer.tried == ["next"])


async def test_a_message_in_its_last_delivery_is_kept_until_the_dead_letter_stream_exists_again(world: World) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.client.js.delete_stream("DLQ")
    await world.publish(moved("busy"))
    await until(lambda: len(optimizer.tried) >= 3)
    await asyncio.sleep(0.2)
    await provision(world.client.js)
    (letter,) = await world.dead_letters(1)
    assert letter.data == moved("busy").model_dump_json().encode()
    assert await world.unsettled("EVENTS", DURABLE) == 0


async def test_a_message_that_crashes_every_consumer_is_dead_lettered(world: World) -> None:
    await consumer(world.client.js, "EVENTS", DURABLE, SUBJECT)
    await world.publish(moved("deadly"))
    reader = await world.client.js.pull_subscribe_bind(DURABLE, "EVENTS")
    for _ in range(3):  # as a consumer that crashes: it never acknowledges
        await (await reader.fetch(1))[0].nak()
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    (letter,) = await world.dead_letters(1)
    assert (letter.headers or {})[CODE_HEADER] == InternalError.code
    assert "delivered 4 times" in (letter.headers or {})[REASON_HEADER]
    assert (letter.headers or {})["ce-id"] == envelope(moved("deadly")).id
    assert optimizer.tried == []
    assert await world.unsettled("EVENTS", DURABLE) == 0

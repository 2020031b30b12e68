"""Messages that are consumed in batches: one call for many, and each failure on its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from integration.kit_world import World, moved, until, world_on
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from slmops.contracts.errors import Conflict, NotFound
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.deadletters import dead_letters
from slmops.kit.bus.delivery import REASON_HEADER
from slmops.kit.bus.service_bus import Batch, Bus

if TYPE_CHECKING:
    from servers import NatsServer

STREAM, DURABLE = "EVENTS", "optimizer-slmops_model_alias_moved_v1"
NAMES = [f"a{n:03}" for n in range(100)]


@pytest.fixture
async def world(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("slmops.kit.bus.delivery.BACKOFF_S", (0.02, 0.02))
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


class Optimizer:
    """Handles batches of aliases; raises, or refuses one message, as the alias says."""

    def __init__(self, busy: int = 0) -> None:
        self.calls: list[int] = []
        self.done: list[str] = []
        self.attempts: set[int] = set()
        self._busy = busy

    async def on_aliases(self, batch: Batch[ModelAliasMoved]) -> Refused:
        self.calls.append(len(batch))
        self.attempts |= {received.context.attempt for received in batch}
        names = [received.body.alias for received in batch]
        if self._busy:
            self._busy -= 1
            raise Conflict("busy", delay=timedelta(0))
        if "defect" in names:
            raise ValueError("hunter2")
        refused = {index: NotFound("no such model") for index, name in enumerate(names) if name == "refused"}
        self.done += [name for name in names if name != "refused"]
        return refused

    def declare(self, bus: Bus) -> None:
        bus.on_batches(ModelAliasMoved, self.on_aliases)


async def settled(world: World) -> None:
    while await world.unsettled(STREAM, DURABLE):
        pass


async def test_many_messages_are_handled_with_few_calls_and_acknowledged(world: World) -> None:
    await world.publish(*map(moved, NAMES))
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await until(lambda: len(optimizer.done) == len(NAMES))
    assert optimizer.done == NAMES
    assert len(optimizer.calls) <= 3
    await settled(world)


async def test_messages_that_were_collected_are_handled_when_the_time_is_over_between_two_requests(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py then raises asyncio's error and not its own, and FastStream would drop the messages."""
    await world.publish(*map(moved, NAMES))
    fetch, collected = JetStreamContext.PullSubscription.fetch, 0

    async def over_after_the_first(self: Any, batch: int, timeout: float) -> list[Msg]:
        nonlocal collected
        if collected == len(NAMES):
            collected = 0
            raise asyncio.TimeoutError  # noqa: UP041
        messages = await fetch(self, batch, timeout)
        collected += len(messages)
        return messages

    monkeypatch.setattr(JetStreamContext.PullSubscription, "fetch", over_after_the_first)
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await until(lambda: len(optimizer.done) == len(NAMES))
    assert optimizer.attempts == {1}


async def test_an_invalid_and_a_refused_message_are_dead_lettered_and_the_others_are_handled(world: World) -> None:
    await world.publish(*map(moved, NAMES[:20]), moved("refused"))
    await world.client.js.publish(ModelAliasMoved.type, b"{", headers={"ce-id": "x"})
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    letters = await world.dead_letters(2)
    reasons = sorted((letter.headers or {})[REASON_HEADER] for letter in letters)
    assert reasons[0] == "no such model"
    assert "does not validate" in reasons[1]
    assert optimizer.done == NAMES[:20]
    await settled(world)


async def test_a_message_whose_handling_fails_is_found_and_dead_lettered_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmops.kit.bus.delivery.MAX_DELIVER", 2)
    await world.publish(*map(moved, NAMES[:63]), moved("defect"))
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    (letter,) = await world.dead_letters(1)
    assert "hunter2" not in str(letter.headers)
    assert sorted(set(optimizer.done)) == NAMES[:63]
    assert len(optimizer.calls) < 2 * 63  # a handful for the halves, not one for each message
    await settled(world)


async def test_a_temporary_error_redelivers_the_whole_batch_without_dividing_it(world: World) -> None:
    await world.publish(*map(moved, NAMES))
    optimizer = Optimizer(busy=1)
    await world.service("optimizer", optimizer.declare)
    await until(lambda: len(optimizer.done) == len(NAMES))
    assert sorted(optimizer.done) == NAMES
    await world.dead_letters(0)
    await settled(world)


@pytest.mark.parametrize(
    "headers",
    [
        {"Nats-Expected-Last-Sequence": "1"},
        {"slmops-dead-size": "abc", "slmops-dead-subject": "cmd.access.add_user.x.y"},
    ],
    ids=["expected sequence", "our own"],
)
async def test_headers_of_a_sender_cannot_keep_its_dead_letter_from_being_stored(
    world: World, headers: dict[str, str]
) -> None:
    """Otherwise messages that can be neither handled nor dead-lettered would fill the consumer, for the whole fleet."""
    await world.publish(moved("a"))
    await world.client.js.publish(ModelAliasMoved.type, b"{", headers=headers)
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.dead_letters(1)
    [letter] = [one async for one in dead_letters(world.client)]
    assert (letter.subject, letter.whole, letter.size_bytes) == (ModelAliasMoved.type, True, 1)
    assert optimizer.done == ["a"]
    await settled(world)


async def test_an_invalid_message_of_almost_the_largest_size_is_dead_lettered(world: World) -> None:
    payload = b"{" * (world.client.connection.max_payload - 1000)
    await world.client.js.publish(ModelAliasMoved.type, payload)
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    (letter,) = await world.dead_letters(1)
    assert (letter.headers or {})["slmops-dead-size"] == str(len(payload))
    await settled(world)

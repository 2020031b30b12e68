"""Messages that are removed before a consumer had them are a gap, and it stays until somebody accepts it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import World, moved, world_on
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig

from slmops.contracts.errors import NotFound, NotReady
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.bus import gaps
from slmops.kit.bus.gaps import Durable, Gap
from slmops.kit.bus.provision import consumer, provision
from slmops.kit.clock import utc_now

if TYPE_CHECKING:
    from servers import NatsServer

OURS = Durable("EVENTS", "packager-test")


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
async def reader(world: World) -> JetStreamContext.PullSubscription:
    """Of a new consumer of facts."""
    await consumer(world.client.js, *OURS, ModelAliasMoved.type)
    return await world.client.js.pull_subscribe_bind(OURS.consumer, OURS.stream)


async def publish(world: World, *numbers: int) -> None:
    await world.publish(*(moved(f"a{number}") for number in numbers))


async def handle(reader: JetStreamContext.PullSubscription, count: int = 1) -> None:
    for _ in range(count):
        (message,) = await reader.fetch(1)
        await message.ack_sync()


async def look(world: World) -> tuple[int, int] | None:
    gap = await gaps.check_for_gap(world.client, OURS)
    return (gap.first, gap.last) if gap else None


async def test_what_was_handled_may_be_removed(world: World, reader: JetStreamContext.PullSubscription) -> None:
    await publish(world, 1, 2, 3)
    await handle(reader, 3)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) is None
    await publish(world, 4)
    await handle(reader)
    assert await look(world) is None


async def test_what_is_purged_before_it_is_delivered_is_a_gap(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2, 3)
    await handle(reader)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (2, 3)


async def test_a_gap_shows_although_the_consumer_went_on_behind_it(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2, 3)
    await handle(reader)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    await publish(world, 4)
    await handle(reader)
    assert await look(world) == (2, 3)


async def test_what_waits_to_be_tried_again_is_not_handled(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1)
    (message,) = await reader.fetch(1)
    await message.nak(delay=60)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (1, 1)


async def test_a_fact_that_is_deleted_from_the_middle_is_a_gap(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2, 3, 4)
    await handle(reader, 2)
    assert await look(world) is None
    await world.client.js.delete_msg("EVENTS", 1)
    await world.client.js.delete_msg("EVENTS", 2)
    assert await look(world) is None, "it was handled"
    await world.client.js.delete_msg("EVENTS", 3)
    assert await look(world) == (3, 3)


async def test_facts_that_went_before_a_consumer_was_new_are_missing_to_it(world: World) -> None:
    await publish(world, 1, 2, 3)
    await world.client.js.purge_stream("EVENTS", seq=3)
    await consumer(world.client.js, *OURS, ModelAliasMoved.type)
    assert await look(world) == (1, 2)


async def test_a_new_consumer_of_what_may_be_forgotten_begins_with_what_is_there(world: World) -> None:
    for number in range(3):
        await world.client.store("measure.gw-1", str(number).encode(), {})
    await world.client.js.purge_stream("MEASUREMENTS", seq=3)
    durable = Durable("MEASUREMENTS", "telemetry-test")
    await consumer(world.client.js, *durable, "measure.*")
    assert await gaps.check_for_gap(world.client, durable) is None


async def test_a_consumer_of_an_earlier_release_begins_with_what_is_there(world: World) -> None:
    await publish(world, 1, 2, 3)
    config = ConsumerConfig(durable_name=OURS.consumer, filter_subject=ModelAliasMoved.type)
    await world.client.js.add_consumer("EVENTS", config)
    await world.client.js.purge_stream("EVENTS", seq=3)
    await consumer(world.client.js, *OURS, ModelAliasMoved.type)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (3, 3)


async def test_a_gap_outlives_restarts_and_stays_until_it_is_accepted(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2)
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (1, 2)
    await provision(world.client.js)
    await consumer(world.client.js, *OURS, ModelAliasMoved.type, ack_wait_s=20)
    await publish(world, 3, 4)
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (1, 4), "both gaps are reported as one range"
    (accepted,) = await gaps.accept(world.client, "EVENTS")
    assert (accepted.durable, accepted.gap.first, accepted.gap.last) == (OURS, 1, 4)
    assert await look(world) is None
    assert await gaps.accept(world.client, "EVENTS") == []


async def test_a_stream_that_ends_before_the_mark_was_restored_from_an_older_state(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2)
    await handle(reader, 2)
    later = gaps.Mark(until=9).model_dump_json()
    info = await world.client.js.consumer_info(*OURS)
    await world.client.js.add_consumer("EVENTS", info.config.evolve(metadata={gaps.MARK_KEY: later}))
    assert await look(world) == (3, 9)
    assert [gap for _, gap in await gaps.accept(world.client, "EVENTS")]
    assert await look(world) is None, "the mark went back"


async def test_a_work_queue_has_no_gaps(world: World) -> None:
    durable = Durable("JOBS", "optimizer-test")
    await consumer(world.client.js, *durable, "jobs.optimize.*")
    await world.client.store("jobs.optimize.edge-small", b"{}", {})
    await world.client.js.purge_stream("JOBS")
    assert await gaps.check_for_gap(world.client, durable) is None


async def test_a_consumer_that_is_not_there_is_no_proof_of_anything(world: World) -> None:
    with pytest.raises(NotReady):
        await gaps.check_for_gap(world.client, OURS)
    with pytest.raises(NotFound, match="no stream NOTHING"):
        await gaps.found(world.client, "NOTHING")


def test_gaps_are_told_in_one_line() -> None:
    gap = Gap(first=2, last=5, why="removed", found_at=utc_now())
    assert gaps.described([gaps.Found(OURS, gap)]) == "2 to 5 of EVENTS for packager-test (removed)"

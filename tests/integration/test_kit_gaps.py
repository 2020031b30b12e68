"""Messages that are removed before a consumer read them are a gap, which stays until an operator accepts it."""

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
    """Returns a subscription of a new consumer of facts."""
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


async def test_removing_handled_messages_is_not_a_gap(world: World, reader: JetStreamContext.PullSubscription) -> None:
    await publish(world, 1, 2, 3)
    await handle(reader, 3)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) is None
    await publish(world, 4)
    await handle(reader)
    assert await look(world) is None


async def test_messages_purged_before_their_delivery_are_a_gap(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2, 3)
    await handle(reader)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (2, 3)


async def test_a_gap_is_found_after_the_consumer_has_read_later_messages(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2, 3)
    await handle(reader)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    await publish(world, 4)
    await handle(reader)
    assert await look(world) == (2, 3)


async def test_purging_a_message_that_waits_for_redelivery_is_a_gap(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1)
    (message,) = await reader.fetch(1)
    await message.nak(delay=60)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (1, 1)


async def test_deleting_an_unread_message_between_others_is_a_gap(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2, 3, 4)
    await handle(reader, 2)
    assert await look(world) is None
    await world.client.js.delete_msg("EVENTS", 1)
    await world.client.js.delete_msg("EVENTS", 2)
    assert await look(world) is None, "handled messages are no gap"
    await world.client.js.delete_msg("EVENTS", 3)
    assert await look(world) == (3, 3)


async def test_facts_removed_before_a_consumer_was_created_are_a_gap(world: World) -> None:
    await publish(world, 1, 2, 3)
    await world.client.js.purge_stream("EVENTS", seq=3)
    await consumer(world.client.js, *OURS, ModelAliasMoved.type)
    assert await look(world) == (1, 2)


async def test_a_new_consumer_of_a_stream_that_drops_messages_has_no_gap(world: World) -> None:
    for number in range(3):
        await world.client.store("measure.gw-1", str(number).encode(), {})
    await world.client.js.purge_stream("MEASUREMENTS", seq=3)
    durable = Durable("MEASUREMENTS", "telemetry-test")
    await consumer(world.client.js, *durable, "measure.*")
    assert await gaps.check_for_gap(world.client, durable) is None


async def test_a_consumer_of_an_earlier_release_has_gaps_only_after_its_upgrade(world: World) -> None:
    await publish(world, 1, 2, 3)
    config = ConsumerConfig(durable_name=OURS.consumer, filter_subject=ModelAliasMoved.type)
    await world.client.js.add_consumer("EVENTS", config)
    await world.client.js.purge_stream("EVENTS", seq=3)
    await consumer(world.client.js, *OURS, ModelAliasMoved.type)
    assert await look(world) is None
    await world.client.js.purge_stream("EVENTS")
    assert await look(world) == (3, 3)


async def test_a_gap_is_kept_over_restarts_until_it_is_accepted(
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


async def test_a_stream_restored_from_an_older_state_is_a_gap(
    world: World, reader: JetStreamContext.PullSubscription
) -> None:
    await publish(world, 1, 2)
    await handle(reader, 2)
    later = gaps.Mark(until=9).model_dump_json()
    info = await world.client.js.consumer_info(*OURS)
    await world.client.js.add_consumer("EVENTS", info.config.evolve(metadata={gaps.MARK_KEY: later}))
    assert await look(world) == (3, 9)
    assert [gap for _, gap in await gaps.accept(world.client, "EVENTS")]
    assert await look(world) is None, "the mark was reset"


async def test_a_work_queue_has_no_gaps(world: World) -> None:
    durable = Durable("JOBS", "optimizer-test")
    await consumer(world.client.js, *durable, "jobs.optimize.*")
    await world.client.store("jobs.optimize.edge-small", b"{}", {})
    await world.client.js.purge_stream("JOBS")
    assert await gaps.check_for_gap(world.client, durable) is None


async def test_looking_for_gaps_of_a_missing_consumer_or_stream_is_an_error(world: World) -> None:
    with pytest.raises(NotReady):
        await gaps.check_for_gap(world.client, OURS)
    with pytest.raises(NotFound, match="no stream NOTHING"):
        await gaps.found(world.client, "NOTHING")


def test_gaps_are_described_in_one_line() -> None:
    gap = Gap(first=2, last=5, why="removed", found_at=utc_now())
    assert gaps.described([gaps.Found(OURS, gap)]) == "2 to 5 of EVENTS for packager-test (removed)"

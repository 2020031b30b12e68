"""The guarantees of the journal on SQLite and PostgreSQL: atomic appends, no lost events and no duplicates."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter as Tally
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from integration import kit_counter
from integration.kit_counter import Counter, moved
from integration.kit_world import World, world_on
from sqlalchemy import text, update

from slmops.contracts.errors import Conflict, InternalError, Unreachable
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.relay import drain, run_relay
from slmops.kit.journal import UnitOfWork
from slmops.kit.tracing import span

if TYPE_CHECKING:
    from servers import NatsServer

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def counter(database_url: str) -> AsyncIterator[Counter]:
    counter = Counter(database_url)
    await counter.journal.open()
    yield counter
    await counter.journal.close()


@pytest.fixture
async def other(database_url: str, counter: Counter) -> AsyncIterator[Counter]:
    """Yields a second journal on the same database, as another process has it."""
    other = Counter(database_url)
    await other.journal.open()
    yield other
    await other.journal.close()


async def versions(counter: Counter) -> list[str]:
    return [f"{r.event.key} {r.event.version}" for r in await counter.journal.history()]  # type: ignore[attr-defined]


# ---- append -----------------------------------------------------------------------------------------------


async def test_appended_events_are_loaded_in_order_also_after_a_restart(counter: Counter, database_url: str) -> None:
    assert [await counter.step() for _ in range(3)] == [1, 2, 3]
    await counter.step("other")
    again = Counter(database_url)
    await again.journal.open()
    events, version = await again.journal.transact(lambda unit: unit.load("m"))
    assert version == 3
    assert events == [moved("m", "stable", n) for n in (1, 2, 3)]
    assert await again.journal.transact(lambda unit: unit.load("nothing")) == ([], 0)
    assert await again.count() == 3
    await again.journal.close()


async def test_an_event_is_recorded_with_its_envelope(counter: Counter) -> None:
    with span("decision", parent=PARENT):
        await counter.step()
    (found,) = await counter.journal.history()
    envelope = found.envelope
    assert (envelope.source, envelope.type, envelope.subject) == ("slmops/counter", "slmops.model.alias_moved.v1", "m")
    assert envelope.traceparent is not None
    assert envelope.traceparent.split("-")[1] == PARENT.split("-")[1]


async def test_an_append_with_an_outdated_version_is_a_conflict(counter: Counter) -> None:
    await counter.step()

    def late(unit: UnitOfWork) -> None:
        unit.append("m", 0, [moved("m", "late", 1)])

    with pytest.raises(Conflict):
        await counter.journal.transact(late)
    assert await versions(counter) == ["m 1.0.0"]


async def test_concurrent_writers_retry_and_lose_no_event(counter: Counter, other: Counter) -> None:
    async def steps(mine: Counter) -> list[int]:
        return [await mine.step() for _ in range(15)]

    counts = await asyncio.gather(steps(counter), steps(other))
    assert sorted(counts[0] + counts[1]) == list(range(1, 31))
    assert await versions(counter) == [f"m {n}.0.0" for n in range(1, 31)]


async def test_emit_appends_without_a_version_check(counter: Counter) -> None:
    await counter.step()
    await counter.journal.transact(lambda unit: unit.emit("m", [moved("m", "stable", 2)]))
    assert (await counter.count(), await counter.step()) == (2, 3)


@pytest.mark.parametrize("how", [{"fail": True}, {"alias": "unprojectable"}], ids=["decision", "read table"])
async def test_a_failed_transaction_stores_nothing(counter: Counter, how: dict[str, Any]) -> None:
    await counter.step()
    with pytest.raises((ValueError, RuntimeError)):
        await counter.step(**how)
    assert (await counter.count(), await versions(counter)) == (1, ["m 1.0.0"])
    assert await counter.step() == 2


async def test_the_read_table_always_agrees_with_the_events(counter: Counter, other: Counter) -> None:
    def look(connection: Any) -> tuple[int, int]:
        row = connection.execute(
            text("SELECT coalesce((SELECT max(version) FROM journal), 0), coalesce((SELECT count FROM now), 0)")
        ).one()
        return row[0], row[1]

    writing = asyncio.create_task(_steps(counter, 15))
    seen = []
    while not writing.done():
        seen.append(await other.journal.read(look))
    assert all(events == table for events, table in seen)
    assert await other.journal.read(look) == (15, 15)


async def _steps(counter: Counter, count: int) -> None:
    for _ in range(count):
        await counter.step()


async def test_a_message_consumed_by_two_processes_at_the_same_time_takes_effect_once(
    counter: Counter, other: Counter
) -> None:
    def consume(unit: UnitOfWork) -> bool:
        first = unit.first_time("counter", "message-1")
        if first:
            unit.emit("m", [moved("m", "stable", 1)])
        return first

    found = await asyncio.gather(*(c.journal.transact(consume) for c in (counter, other, counter, other)))
    assert Tally(found) == {True: 1, False: 3}
    assert await versions(counter) == ["m 1.0.0"]
    assert await counter.journal.transact(lambda unit: unit.first_time("another", "message-1"))


async def test_a_message_whose_handler_failed_is_new_on_the_next_delivery(counter: Counter) -> None:
    def fail(unit: UnitOfWork) -> None:
        assert unit.first_time("counter", "message-1")
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await counter.journal.transact(fail)


async def test_the_error_for_an_unknown_event_type_names_the_type(counter: Counter) -> None:
    await counter.step()
    table = counter.journal.events
    await counter.journal.transact(
        lambda unit: unit.connection.execute(update(table).values(type="slmops.model.melted.v9"))
    )
    with pytest.raises(InternalError, match=r"slmops\.model\.melted\.v9") as caught:
        await counter.step()
    assert "Upgrade" in str(caught.value.fix)


# ---- outbox and relay -------------------------------------------------------------------------------------


async def test_the_outbox_holds_unpublished_events_oldest_first(counter: Counter) -> None:
    await _steps(counter, 3)
    waiting = await counter.journal.outbox()
    assert [r.event.version for r in waiting] == ["1.0.0", "2.0.0", "3.0.0"]  # type: ignore[attr-defined]
    await counter.journal.published([waiting[0].position])
    assert [r.position for r in await counter.journal.outbox()] == [r.position for r in waiting[1:]]
    assert len(await counter.journal.history()) == 3


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


async def published_versions(world: World) -> list[str]:
    return [ModelAliasMoved.model_validate_json(message.data).version for message in await world.stored("EVENTS")]


async def test_the_relay_publishes_events_in_order(counter: Counter, world: World) -> None:
    relay = asyncio.create_task(run_relay(counter.journal, await world.connect("registry")))
    try:
        await _steps(counter, 10)
        for _ in range(200):
            if not await counter.journal.outbox():
                break
            await asyncio.sleep(0.02)
    finally:
        relay.cancel()
    assert await published_versions(world) == [f"{n}.0.0" for n in range(1, 11)]
    sent = (await world.stored("EVENTS"))[0].headers or {}
    assert sent.items() >= (await counter.journal.history())[0].envelope.headers().items()


async def test_a_relay_killed_before_marking_events_publishes_them_once(counter: Counter, world: World) -> None:
    registry = await world.connect("registry")
    await _steps(counter, 3)
    for recorded in (await counter.journal.outbox())[:2]:
        await registry.publish(recorded.event, recorded.envelope)  # killed here, before the events are marked
    assert await drain(counter.journal, registry) == 3
    assert await published_versions(world) == ["1.0.0", "2.0.0", "3.0.0"]
    assert await counter.journal.outbox() == []


async def test_two_relays_publish_each_event_once(counter: Counter, other: Counter, world: World) -> None:
    await _steps(counter, 20)
    registry = await world.connect("registry")
    await asyncio.gather(drain(counter.journal, registry), drain(other.journal, registry))
    assert await published_versions(world) == [f"{n}.0.0" for n in range(1, 21)]
    assert await counter.journal.outbox() == []


async def test_events_stay_in_the_outbox_while_the_bus_is_unreachable_and_stored_ones_are_marked(
    counter: Counter, world: World
) -> None:
    registry = await world.connect("registry")

    class Failing(BusClient):
        async def publish(self, event: Any, envelope: Any) -> None:
            if event.version == "3.0.0":
                raise Unreachable("gone")
            await super().publish(event, envelope)

    await _steps(counter, 4)
    with pytest.raises(Unreachable):
        await drain(counter.journal, Failing(registry.connection))
    assert [r.event.version for r in await counter.journal.outbox()] == ["3.0.0", "4.0.0"]  # type: ignore[attr-defined]
    await drain(counter.journal, registry)
    assert await published_versions(world) == ["1.0.0", "2.0.0", "3.0.0", "4.0.0"]


# ---- faults -----------------------------------------------------------------------------------------------


async def test_a_killed_writer_loses_no_acknowledged_event(database_url: str) -> None:
    acknowledged: list[int] = []
    for _ in range(3):
        argv = [sys.executable, kit_counter.__file__, database_url]
        process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        assert process.stdout
        acknowledged += [int(await process.stdout.readline()) for _ in range(15)]
        process.kill()
        acknowledged += [int(line) for line in (await process.stdout.read()).split()]
        await process.wait()
    assert acknowledged == sorted(set(acknowledged))
    counter = Counter(database_url)
    await counter.journal.open()
    stored = await versions(counter)
    # The last write of each process may have been stored without an acknowledgement.
    assert stored == [f"m {n}.0.0" for n in range(1, len(stored) + 1)]
    assert acknowledged[-1] <= len(stored) <= len(acknowledged) + 3
    assert await counter.count() == len(stored) == len(await counter.journal.outbox())
    await counter.journal.close()


async def test_an_append_wakes_the_relay(counter: Counter) -> None:
    counter.journal.appended.clear()
    await counter.step()
    assert counter.journal.appended.is_set()

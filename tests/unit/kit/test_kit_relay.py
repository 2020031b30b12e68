"""The outbox is published with many messages in flight, and in order for each key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from integration.kit_counter import Counter, moved
from integration.kit_world import AT
from sqlalchemy import MetaData

from slmops.contracts.errors import DiskFull, Unreachable
from slmops.contracts.events import Event, GatewayEnrolled, GatewayRemoved
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.relay import Refusing, drain
from slmops.kit.journal import Journal, UnitOfWork

KEYS = [f"model-{n}" for n in range(64)]


class FullBus:
    """Refuses events of the stream of enrolments, except those of `known` gateways."""

    def __init__(self, *known: str) -> None:
        self.known, self.tried, self.stored = known, 0, list[Event]()

    async def publish(self, event: Event, envelope: Any) -> None:
        if isinstance(event, GatewayEnrolled) and event.gateway_id not in self.known:
            self.tried += 1
            raise DiskFull("ENROLMENTS is full")
        self.stored.append(event)


class Bus:
    """Acknowledges an event when `together` events wait, or at once; `refused` is a key that it never stores."""

    def __init__(self, together: int = 1, refused: str = "") -> None:
        self._all_wait = asyncio.Barrier(together)
        self._refused = refused
        self.stored: list[tuple[str, str]] = []

    async def publish(self, event: Any, envelope: Any) -> None:
        await self._all_wait.wait()
        if event.key == self._refused:
            raise Unreachable("gone")
        self.stored.append((event.key, event.version))


async def drained(counter: Counter, bus: Bus) -> int:
    async with asyncio.timeout(30):
        return await drain(counter.journal, cast("BusClient", bus))


def enrolled(gateway_id: str) -> GatewayEnrolled:
    return GatewayEnrolled(gateway_id=gateway_id, blueprint="kiosk", public_key="U", at=AT)


def gone(gateway_id: str) -> GatewayRemoved:
    return GatewayRemoved(gateway_id=gateway_id, blueprint="kiosk", at=AT)


@pytest.fixture
async def journal(tmp_path: Path) -> Any:
    url = f"sqlite:///{tmp_path}/journal.db"
    journal = Journal(url, service="rollout", metadata=MetaData(), migrations=None, project=lambda *_: None)
    await journal.open()
    yield journal
    await journal.close()


async def record(journal: Journal, *events: Event) -> None:
    def work(unit: UnitOfWork) -> None:
        for event in events:
            unit.append(f"of:{event.key}", len(unit.load(f"of:{event.key}")[0]), [event])

    await journal.transact(work)


async def test_a_full_stream_does_not_hold_up_events_of_other_streams(journal: Journal) -> None:
    await record(journal, *(enrolled(f"gw-{n}") for n in range(250)))  # more than a page
    await record(journal, gone("gw-7"), gone("gw-999"), moved("m", "stable", 1))
    bus, now = FullBus(), [0.0]
    refusing = Refusing(lambda: now[0])
    assert await drain(journal, cast("BusClient", bus), refusing) == 2
    assert bus.stored == [gone("gw-999"), moved("m", "stable", 1)], "the removal of gw-7 waits for its enrolment"
    assert bus.tried <= 64
    tried = bus.tried
    await record(journal, moved("m", "stable", 2))
    assert await drain(journal, cast("BusClient", bus), refusing) == 1
    assert bus.tried == tried, "it is not tried again before its time"
    bus.known, now[0] = tuple(f"gw-{n}" for n in range(250)), 2.5
    while await drain(journal, cast("BusClient", bus), refusing):
        pass
    assert await journal.outbox() == []
    assert [type(event) for event in bus.stored if event.key == "gw-7"] == [GatewayEnrolled, GatewayRemoved]


def test_a_stream_that_refuses_is_tried_less_and_less_often() -> None:
    now = [0.0]
    refusing = Refusing(lambda: now[0])
    delays = []
    for _ in range(6):
        delays.append(refusing.refused("ENROLMENTS"))
        assert GatewayEnrolled.type in refusing.types() and GatewayRemoved.type not in refusing.types()
        refusing.accepted("ENROLMENTS")  # another subject of the stream
        assert refusing.waits("ENROLMENTS")
        now[0] += delays[-1]
        assert refusing.types() == []
    assert delays == [2, 4, 8, 16, 30, 30]
    refusing.accepted("ENROLMENTS")
    assert refusing.refused("ENROLMENTS") == 2


@pytest.fixture
async def counter(tmp_path: Path) -> Any:
    counter = Counter(f"sqlite:///{tmp_path}/events.db")
    await counter.journal.open()
    yield counter
    await counter.journal.close()


async def test_events_of_64_keys_wait_for_their_acknowledgements_at_the_same_time(counter: Counter) -> None:
    for key in KEYS:
        await counter.step(key)
    assert await drained(counter, Bus(together=64)) == 64
    assert await counter.journal.outbox() == []


async def test_an_event_of_a_key_waits_for_the_one_before(counter: Counter) -> None:
    for _ in range(3):
        await counter.step("a")
        await counter.step("b")
    bus = Bus(together=2)  # would never continue if a third event were sent
    await drained(counter, bus)
    for key in ("a", "b"):
        assert [version for stored, version in bus.stored if stored == key] == ["1.0.0", "2.0.0", "3.0.0"]


async def test_a_refused_event_keeps_the_later_ones_of_its_key_and_no_other_key(counter: Counter) -> None:
    for _ in range(2):
        await counter.step("a")
        await counter.step("b")
    with pytest.raises(Unreachable):
        await drained(counter, Bus(refused="a"))
    assert [recorded.event.key for recorded in await counter.journal.outbox()] == ["a", "a"]

"""The outbox is published with many messages in flight, and in order for each key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from integration.kit_counter import Counter

from slmops.contracts.errors import Unreachable
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.relay import drain

KEYS = [f"model-{n}" for n in range(64)]


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

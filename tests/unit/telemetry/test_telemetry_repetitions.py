"""A batch with a number counts once, in whatever order its messages come, and leaves no row of its own."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.telemetry.test_telemetry_windows import Telemetry, at, batch, telemetry

from slmops.contracts.errors import Denied
from slmops.contracts.measurement import MeasurementBatch
from slmops.telemetry.domain.sequences import MOST_GAPS, Seen
from slmops.telemetry.handlers import CONSUMED_KEPT

__all__ = ["telemetry"]


def numbered(sequence: int, boot: str = "b-1", gateway_id: str = "gw-1", requests: int = 1) -> MeasurementBatch:
    return batch(f"{boot}-{sequence}", 1, gateway_id, boot=boot, sequence=sequence, requests=requests)


def rows(telemetry: Telemetry, table: str) -> int:
    with sqlite3.connect(telemetry.database) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@given(st.lists(st.integers(1, 40), max_size=60))
def test_exactly_the_numbers_that_came_are_seen(numbers: list[int]) -> None:
    seen = Seen()
    for number in numbers:
        seen = seen.also(number)
    assert [number for number in range(1, 42) if number in seen] == sorted(set(numbers))
    assert len(seen.gaps) <= len(set(numbers)) + 1


def test_the_lowest_gaps_are_forgotten_before_they_grow_without_bound() -> None:
    seen = Seen()
    for number in range(2, 2 * MOST_GAPS + 102, 2):
        seen = seen.also(number)
    assert len(seen.gaps) == MOST_GAPS
    assert 1 in seen, "as if it had come"
    assert 2 * MOST_GAPS + 99 not in seen


async def test_batches_that_come_out_of_order_or_twice_count_once(telemetry: Telemetry) -> None:
    await telemetry.receive(numbered(3, requests=100), numbered(5, requests=10_000), numbered(3, requests=100))
    await telemetry.receive(numbered(4, requests=1000), numbered(1), numbered(5, requests=10_000))
    await telemetry.receive(numbered(2, requests=10), numbered(1))
    [window] = await telemetry.closed(6)
    assert window.requests == 11_111


async def test_each_start_of_an_agent_and_each_gateway_has_numbers_of_its_own(telemetry: Telemetry) -> None:
    await telemetry.receive(numbered(1), numbered(1, "b-2"), numbered(1, gateway_id="gw-2"), numbered(1, "b-2"))
    [window] = await telemetry.closed(6)
    assert (window.requests, window.gateways) == (3, 2)


async def test_a_repetition_is_recognized_after_a_restart(telemetry: Telemetry) -> None:
    await telemetry.receive(numbered(1), numbered(3))
    reborn = Telemetry(telemetry.database)
    await reborn.journal.open()
    await reborn.receive(numbered(3), numbered(2))
    [window] = await reborn.closed(6)
    assert window.requests == 3
    await reborn.journal.close()


async def test_a_refused_batch_counts_when_it_is_replayed(telemetry: Telemetry) -> None:
    with pytest.raises(Denied):
        await telemetry.receive(numbered(1).model_copy(update={"blueprint": "kiosk"}))
    await telemetry.receive(*map(numbered, range(2, 200)))
    await telemetry.receive(numbered(1))
    [window] = await telemetry.closed(6)
    assert window.requests == 199


async def test_batches_with_numbers_leave_one_row_for_each_start_of_an_agent(telemetry: Telemetry) -> None:
    for first in range(1, 1001, 250):
        await telemetry.receive(*map(numbered, range(first, first + 250)))
    assert (rows(telemetry, "sequences"), rows(telemetry, "consumed")) == (1, 0)
    telemetry.now = at(0) + CONSUMED_KEPT / 2
    await telemetry.receive(numbered(1, "b-2"))
    telemetry.now = at(1) + CONSUMED_KEPT
    await telemetry.handlers.forget_old()
    assert rows(telemetry, "sequences") == 1, "that of the newer start"

"""Telemetry as a process on a real nats-server: each batch is told once, whatever happens in between."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rollout_world import System, _new_databases, eventually, open_system

from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.descriptor import digest_of
from slmops.contracts.events import CohortMeasured
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.kit.client import BusClient

RELEASE = digest_of(b"1.0.0")


@dataclass
class Measured:
    """Telemetry, and a console connection that sends batches and reads what was told."""

    system: System
    client: BusClient

    async def send(self, batch: MeasurementBatch, subject: str | None = None) -> None:
        # A message id of its own each time: what is sent twice must get past the server's own deduplication.
        headers = {MESSAGE_ID_HEADER: str(uuid.uuid4())}
        await self.client.store(subject or f"measure.{batch.gateway_id}", batch.model_dump_json().encode(), headers)

    async def windows(self) -> list[CohortWindow]:
        """Every window on the stream, in order."""
        state = (await self.client.js.stream_info("WINDOWS")).state
        messages = [await self.client.js.get_msg("WINDOWS", n) for n in range(state.first_seq or 1, state.last_seq + 1)]
        return [
            CohortMeasured.model_validate_json(m.data or b"").window
            for m in messages
            if m.subject == CohortMeasured.type
        ]

    async def requests(self) -> int:
        return sum(window.requests for window in await self.windows())

    async def dead_letters(self) -> dict[str, int]:
        return (await self.client.js.stream_info("DLQ", subjects_filter=">")).state.subjects or {}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
async def measured(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Measured]:
    databases = _new_databases(request.getfixturevalue("postgres")) if request.param == "postgres" else None
    async with AsyncExitStack() as stack:
        system = await open_system(tmp_path, stack, databases)
        await system.start("telemetry")
        client = await system.connect("console")
        stack.push_async_callback(client.close)
        yield Measured(system, client)


def batch(identity: str, gateway_id: str = "gw-1", requests: int = 1, **changes: Any) -> MeasurementBatch:
    ended = changes.pop("ended_at", datetime.now(UTC))
    values = {
        "batch_id": identity,
        "gateway_id": gateway_id,
        "blueprint": "edge-chat",
        "release": RELEASE,
        "version": "1.0.0",
        "started_at": ended - timedelta(seconds=1),
        "ended_at": ended,
        "requests": requests,
        "failed_requests": 0,
        "prompt_tokens": 1,
        "completion_tokens": 10,
        "decode_seconds": 0.5,
        "ttft_seconds": 0.1,
    }
    return MeasurementBatch(**(values | changes))


async def test_batches_of_two_gateways_become_windows(measured: Measured) -> None:
    now = datetime.now(UTC)
    for gateway_id in ("gw-1", "gw-2"):
        await measured.send(batch("a", gateway_id, requests=3, ended_at=now))
    [window] = await eventually(measured.windows, bool, "a window")
    assert (window.gateways, window.requests, window.tokens_per_s) == (2, 6, 20)
    assert window.started_at <= now < window.ended_at


async def test_duplicates_count_once_and_late_batches_are_told_apart(measured: Measured) -> None:
    now = datetime.now(UTC)
    first = batch("a", requests=1, ended_at=now)
    for _ in range(3):
        await measured.send(first)
    await eventually(measured.requests, lambda n: n == 1, "the first window")
    await measured.send(first)
    await measured.send(batch("late", "gw-2", requests=10, ended_at=now))
    await eventually(measured.requests, lambda n: n == 11, "the late one")
    await asyncio.sleep(1.5)
    windows = await measured.windows()
    assert sorted((w.requests, w.gateways) for w in windows) == [(1, 1), (10, 1)]
    assert len({w.started_at for w in windows}) == 1


async def test_nothing_is_lost_or_told_twice_over_kills(measured: Measured) -> None:
    """Killed six times while batches stream in, at moments that differ: windows still add up exactly."""
    total = 0
    for round_ in range(6):
        for number in range(20):
            await measured.send(batch(f"{round_}-{number}", requests=number))
            total += number
        await asyncio.sleep(0.17 * round_)
        measured.system.kill("telemetry")
        await measured.system.start("telemetry")
    await eventually(measured.requests, lambda n: n >= total, "every request")
    await asyncio.sleep(1.5)
    assert await measured.requests() == total
    assert await measured.dead_letters() == {}


async def test_foreign_and_impossible_batches_are_dead_lettered_and_the_service_goes_on(measured: Measured) -> None:
    await measured.send(batch("a", "gw-1", requests=100), subject="measure.gw-2")
    await measured.send(batch("b", "gw-3", decode_seconds=1e300))
    await measured.client.store("measure.gw-4", b"{}", {MESSAGE_ID_HEADER: "garbage"})
    letters = await eventually(measured.dead_letters, lambda found: len(found) == 3, "dead letters")
    assert set(letters) == {"dlq.measure.gw-2", "dlq.measure.gw-3", "dlq.measure.gw-4"}
    await measured.send(batch("good", requests=5))
    await eventually(measured.requests, lambda n: n == 5, "a good batch")

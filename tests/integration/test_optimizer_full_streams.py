"""An optimizer waits while its streams are full: no job and no result is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.artifact_world import eventually
from integration.kit_world import World, world_on
from integration.stream_world import TINY_BYTES, fill, make_tiny
from integration.test_optimizer_board import DURABLE, JOB, Worker

from slmops.contracts import subjects
from slmops.contracts.commands import ListVersions, Optimize, VersionList, VersionView
from slmops.contracts.errors import DiskFull, NotFound
from slmops.contracts.events import ModelVersionRegistered, VariantRejected
from slmops.contracts.jobs import JobState, OptimizeJob
from slmops.contracts.profile import EDGE_SMALL
from slmops.kit.bus.provision import consumer
from slmops.kit.bus.service_bus import Bus
from slmops.optimizer.handlers import DELIVERIES, Handlers, routes
from slmops.optimizer.jobs.board import Board

if TYPE_CHECKING:
    from servers import NatsServer

AT = datetime(2026, 1, 2, tzinfo=UTC)
REGISTERED = ModelVersionRegistered(
    model="smollm2", version="1.0.0", digest=JOB.digest, format="gguf", architecture="llama", files=JOB.files, at=AT
)
WAITS_S = 4.0
"""Longer than two attempts to store a message."""


class NoAncestors:
    async def anchored(self, job: OptimizeJob) -> OptimizeJob:
        return job


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


async def optimizer(world: World, worker: Worker) -> Board:
    bus = Bus("optimizer", world.settings("optimizer"))
    board, profiles = Board(bus), {"edge-small": EDGE_SMALL}
    handlers = Handlers(
        *(bus, None, board, worker, profiles, ("edge-small",), ("int8",), NoAncestors(), Path(), lambda: AT)  # type: ignore[arg-type]
    )
    routes(bus, handlers)
    await bus.start()
    world.stack.push_async_callback(bus.stop)
    return board


async def enlarge(world: World, stream: str) -> None:
    config = (await world.client.js.stream_info(stream)).config
    await world.client.js.update_stream(config.evolve(max_bytes=4 * TINY_BYTES))


async def fill_the_queue(world: World) -> None:
    """Pauses the consumer of jobs and fills its stream."""
    await world.client.js.pause_consumer("JOBS", DURABLE, "2100-01-01T00:00:00Z")
    await fill(world, "JOBS")


async def wait_until_jobs_ended(board: Board) -> None:
    async def look() -> bool | None:
        return all(job.state.ended for job in await board.all()) or None

    await eventually(look)


async def test_a_job_in_its_last_delivery_waits_while_the_stream_of_its_events_is_full(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_tiny(world, monkeypatch, "EVENTS")
    await fill(world, "EVENTS")
    await consumer(world.client.js, "JOBS", DURABLE, subjects.optimize_job("*"))
    payload = JOB.model_dump_json(by_alias=True).encode()
    await world.client.store(subjects.optimize_job("edge-small"), payload, {"Nats-Msg-Id": JOB.id})
    reader = await world.client.js.pull_subscribe_bind(DURABLE, "JOBS")
    for _ in range(DELIVERIES - 1):
        await (await reader.fetch(1))[0].nak()
    await reader.unsubscribe()

    board = await optimizer(world, Worker(NotFound("not called")))
    await asyncio.sleep(WAITS_S)
    await world.dead_letters(0)
    (waiting,) = await board.all()
    assert waiting.state is JobState.QUEUED
    assert "the stream EVENTS is full" in waiting.reason
    await enlarge(world, "EVENTS")
    await wait_until_jobs_ended(board)
    await world.dead_letters(0)
    rejected = [m for m in await world.stored("EVENTS") if m.subject == VariantRejected.type]
    assert len(rejected) == len(JOB.recipes)


async def test_a_version_waits_while_the_queue_of_jobs_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await make_tiny(world, monkeypatch, "JOBS")
    board = await optimizer(world, Worker(NotFound("not called")))
    await fill_the_queue(world)
    await world.publish(REGISTERED)
    await asyncio.sleep(WAITS_S)
    durable = "optimizer-slmops_model_version_registered_v1"
    info = await world.client.js.consumer_info("EVENTS", durable)
    assert (info.num_ack_pending, info.num_redelivered) == (1, 0), "the message is kept without redeliveries"
    assert await board.all() == [], "no job is shown that is not in the queue"
    await enlarge(world, "JOBS")

    async def look() -> bool | None:
        return await world.unsettled("EVENTS", durable) == 0 or None

    await eventually(look)
    assert [job.state for job in await board.all()] == [JobState.QUEUED]
    await world.dead_letters(0)


async def test_an_optimize_command_fails_while_the_queue_of_jobs_is_full(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def versions(query: ListVersions) -> VersionList:
        return VersionList(versions=(version_view(),))

    await make_tiny(world, monkeypatch, "JOBS")
    await world.service("registry", lambda bus: bus.serve(ListVersions, versions))
    board = await optimizer(world, Worker(NotFound("not called")))
    await fill_the_queue(world)
    with pytest.raises(DiskFull, match="the stream JOBS is full"):
        await world.client.request(Optimize(model="smollm2", version="1.0.0"))
    assert await board.all() == []


def version_view() -> VersionView:
    shared = REGISTERED.model_dump(include={"model", "version", "digest", "format", "architecture", "files", "at"})
    return VersionView.model_validate({**shared, "size_bytes": 1, "state": "registered", "stage": "registered"})

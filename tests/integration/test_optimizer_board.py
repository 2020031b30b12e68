"""The job board on a real NATS server: states, cancellation, lists and deliveries of jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from integration.artifact_world import eventually
from integration.kit_world import World, world_on

from slmops.contracts import subjects
from slmops.contracts.commands import ListJobs
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InternalError, NotFound, Unreachable
from slmops.contracts.events import VariantRejected
from slmops.contracts.jobs import JobState, JobView, OptimizeJob
from slmops.contracts.model import ModelFile
from slmops.contracts.profile import EDGE_SMALL
from slmops.kit.bus.provision import consumer
from slmops.kit.bus.service_bus import Bus
from slmops.optimizer.handlers import DELIVERIES, Handlers, routes
from slmops.optimizer.jobs.board import Board

if TYPE_CHECKING:
    from servers import NatsServer

DURABLE = "optimizer-jobs_optimize_each"
AT = datetime(2026, 1, 2, tzinfo=UTC)
JOB = OptimizeJob(
    model="smollm2",
    version="1.0.0",
    digest=digest_of(b"x"),
    format="gguf",
    files=(ModelFile(path="m.gguf", digest=digest_of(b"x"), size_bytes=1),),
    profile=EDGE_SMALL,
    recipes=("int8", "int4"),
)


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
async def board(world: World) -> Board:
    return Board(await world.service("optimizer", lambda bus: None))


def view(job: str = "a", state: JobState = JobState.QUEUED, **changes: Any) -> JobView:
    fields = {"job": job, "work": "w", "model": "smollm2", "version": "1.0.0", "profile": "edge-small"}
    return JobView(**fields | {"recipes": ("int8",), "state": state, "queued_at": AT, "at": AT} | changes)


async def test_an_empty_board_has_no_jobs_and_no_cancellations(board: Board) -> None:
    assert await board.all() == []
    assert await board.find("a") is None
    assert await board.cancelled("a") is None


async def test_queueing_a_running_job_again_keeps_its_progress(board: Board) -> None:
    await board.queue(view())
    await board.put(view(state=JobState.RUNNING, done=3, of=5))
    await board.queue(view())
    found = await board.find("a")
    assert found and (found.state, found.done) == (JobState.RUNNING, 3)


@pytest.mark.parametrize(
    ("state", "visible"),
    [
        (JobState.QUEUED, JobState.CANCELLED),
        (JobState.RUNNING, JobState.CANCELLING),
        (JobState.DONE, JobState.DONE),
        (JobState.FAILED, JobState.FAILED),
    ],
)
async def test_a_cancellation_is_visible_before_the_worker_receives_it(
    board: Board, state: JobState, visible: JobState
) -> None:
    await board.put(view(state=state))
    await board.cancel("a", "alice")
    found = await board.find("a")
    assert found and found.state is visible
    assert [one.state for one in await board.all()] == [visible]
    assert await board.cancelled("a") == "alice"


async def test_jobs_are_listed_in_the_order_in_which_they_were_queued(board: Board) -> None:
    for day, job in ((3, "c"), (1, "a"), (2, "b")):
        await board.queue(view(job, queued_at=AT.replace(day=day)))
    await board.cancel("b", "bob")
    assert [one.job for one in await board.all()] == ["a", "b", "c"]


@pytest.mark.parametrize("jobs", [1, 2, 15])
async def test_a_list_is_complete_while_the_board_changes_and_the_process_is_busy(board: Board, jobs: int) -> None:
    queued = [f"job-{number}" for number in range(jobs)]
    for job in queued:
        await board.queue(view(job))

    async def change() -> None:
        for done in range(100):
            await board.put(view("job-0", done=done))
            time.sleep(0.003)  # noqa: ASYNC251 - delays the processing of messages

    changing = asyncio.create_task(change())
    listed = await asyncio.gather(*[board.all() for _ in range(40)])
    await changing
    assert all({entry.job for entry in found} == set(queued) for found in listed)


async def test_a_deleted_board_is_reported_as_unreachable(world: World, board: Board) -> None:
    await board.queue(view())
    await world.client.js.delete_stream(f"KV_{subjects.JOB_BUCKET}")
    with pytest.raises(Unreachable, match="job board"):
        await board.put(view())


class Worker:
    """A fake worker that fails every job with `error` and counts the jobs."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    async def run(self, job: OptimizeJob, publisher: object) -> None:
        self.calls += 1
        raise self.error


async def deliver(world: World, worker: Worker, times_before: int) -> Board:
    """Publishes a job that was delivered `times_before` times without an end, and starts an optimizer with `worker`."""
    client = await world.connect("optimizer")
    headers = {"Nats-Msg-Id": JOB.id}
    bus = Bus("optimizer", world.settings("optimizer"))
    board = Board(bus)
    routes(bus, Handlers(bus, None, board, worker, {}, (), (), None, Path(), lambda: AT))  # type: ignore[arg-type]
    await consumer(client.js, "JOBS", DURABLE, subjects.optimize_job("*"))
    await client.store(subjects.optimize_job("edge-small"), JOB.model_dump_json(by_alias=True).encode(), headers)
    reader = await client.js.pull_subscribe_bind(DURABLE, "JOBS")
    for _ in range(times_before):  # as when the job crashed its workers
        await (await reader.fetch(1))[0].nak()
    await reader.unsubscribe()
    await bus.start()
    world.stack.push_async_callback(bus.stop)
    return board


async def test_a_job_that_crashes_every_worker_is_rejected_after_the_last_delivery(world: World) -> None:
    worker = Worker(NotFound("not called"))
    board = await deliver(world, worker, DELIVERIES - 1)
    await settled(world)
    found = await board.find(JOB.id)
    assert found and found.problem and found.problem.code == InternalError.code
    assert f"started {DELIVERIES - 1} times" in found.reason
    assert worker.calls == 0
    assert len([m for m in await world.stored("EVENTS") if m.subject == VariantRejected.type]) == 2


async def test_a_job_has_more_deliveries_than_other_messages(world: World) -> None:
    worker = Worker(NotFound("the store lost its files"))
    board = await deliver(world, worker, 10)
    await settled(world)
    found = await board.find(JOB.id)
    assert found and (found.state, found.reason) == (JobState.FAILED, "the store lost its files")
    assert worker.calls == 1
    await world.dead_letters(0)


async def settled(world: World) -> None:
    """Waits until every job is acknowledged."""

    async def look() -> bool | None:
        return await world.unsettled("JOBS", DURABLE) == 0 or None

    await eventually(look)


async def test_jobs_are_listed_by_pages_the_newest_first(board: Board) -> None:
    """Jobs of one second have an order too, so none is on two pages or on none."""
    for number in range(7):
        model = "other" if number == 3 else "smollm2"
        await board.put(view(f"job-{number}", model=model, queued_at=AT + timedelta(seconds=number // 3)))
    handlers = Handlers(*[cast(Any, None)] * 2, board, *[cast(Any, ())] * 7)

    async def listed(**asked: Any) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            page = await handlers.list_jobs(ListJobs(**asked, limit=2, cursor=cursor))
            assert len(page.jobs) <= 2
            found += [job.job for job in reversed(page.jobs)]
            if (cursor := page.cursor) is None:
                return found

    assert await listed() == [f"job-{number}" for number in reversed(range(7))]
    assert await listed(model="smollm2") == ["job-6", "job-5", "job-4", "job-2", "job-1", "job-0"]
    assert await listed(model="nobody") == []

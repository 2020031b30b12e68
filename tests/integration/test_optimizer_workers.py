"""Several optimizers on one queue: jobs whose worker or process is killed, and jobs that are cancelled."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import forked_jobs
import pytest
from disk_calls import DiskCalls, calls_of_this_thread
from integration.artifact_world import eventually, running, settings_of
from integration.kit_world import World, world_on
from integration.optimizer_world import Factory, factory_on, processes_in, wait_until_no_process

from slmops.contracts.errors import JobCancelled, NotEnoughMemory
from slmops.contracts.events import VariantOptimized, VariantProgressed, VariantRejected, VariantStarted
from slmops.contracts.jobs import JobState
from slmops.optimizer.app import build
from slmops.optimizer.jobs import process
from slmops.optimizer.settings import Settings

if TYPE_CHECKING:
    from servers import S3, NatsServer

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
async def factory(world: World, s3: S3, tmp_path: Path) -> AsyncIterator[Factory]:
    async with factory_on(world, s3, tmp_path) as factory:
        yield factory


async def finished_pass(data: Path) -> Path:
    """Waits until a running job under `data` has finished a pass. Returns the folder of the pass."""

    async def look() -> Path | None:
        return next((path for path in data.glob("jobs/*/passes/quantize-*") if path.suffix != ".part"), None)

    return await eventually(look, within_s=150)


async def process_in(folder: Path) -> int:
    async def look() -> int | None:
        return next(iter(processes_in(folder)), None)

    return await eventually(look, within_s=60)


async def test_the_optimizers_event_loop_waits_for_no_file(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Removing the folder of a job on the loop would hold up the commands and the in-progress acknowledgements."""
    monkeypatch.setattr(process, "_start", process._start)  # restored after the test
    forked_jobs.fork_jobs(forked_jobs.environment()[forked.JOBS_PARENT])
    (home := tmp_path / "here").mkdir()
    settings = Settings(**settings_of(factory.world, factory.s3, "optimizer", home), recipes=("int8",))
    settings.data_dir = home / "data"
    calls = DiskCalls(monkeypatch, settings.data_dir)
    on_the_loop = calls_of_this_thread(calls)
    async with running(build(settings)):
        await factory.push("1.0.0", seed=107)
        job = (await factory.job_of("1.0.0")).job
        await factory.reached(job, JobState.DONE)
    assert on_the_loop == []
    assert list((settings.data_dir / "jobs").iterdir()) == []


@pytest.mark.slow
async def test_two_workers_share_the_queue_and_run_each_job_once(factory: Factory) -> None:
    workers = [await factory.start(name) for name in ("one", "two")]
    versions = ["1.0.0", "1.0.1", "1.0.2"]
    for seed, version in enumerate(versions, 100):
        await factory.push(version, seed)
    ended = [await factory.reached((await factory.job_of(v)).job, JobState.DONE) for v in versions]
    assert len({view.worker for view in ended}) == 2
    assert len(await factory.events(VariantStarted)) == 3
    assert sorted(e.version for e in await factory.events(VariantOptimized)) == versions
    assert await factory.world.unsettled("JOBS", "optimizer-jobs_optimize_each") == 0
    for worker in workers:
        worker.stop()
    assert factory.spans("optimize") == 3


@pytest.mark.parametrize(
    "same_machine",
    [
        pytest.param(True, id="on the same machine"),
        pytest.param(False, id="on another machine", marks=pytest.mark.slow),
    ],
)
async def test_the_job_of_a_killed_worker_is_continued_by_another_one(factory: Factory, same_machine: bool) -> None:
    data = factory.folder / "shared"
    first = await factory.start("one", data, recipes='["int8", "int4"]')
    await factory.push("1.0.0", seed=110 + same_machine)
    job = (await factory.job_of("1.0.0")).job
    quantized = await finished_pass(data)
    made = quantized.stat().st_ino
    first.kill()
    await wait_until_no_process(data, within_s=5)  # the job's process is killed with its worker
    await factory.start("two", data if same_machine else None, recipes='["int8", "int4"]')

    seen = set()
    while (view := await factory.job(job)).state is not JobState.DONE:
        seen |= {quantized.stat().st_ino} if quantized.exists() else set()
        assert not view.state.ended, view
        await asyncio.sleep(0.1)
    if same_machine:
        assert seen == {made}  # the finished pass is reused
    assert {e.recipe for e in await factory.events(VariantOptimized, job)} == {"int8", "int4"}
    assert len(await factory.events(VariantOptimized, job)) == 2
    assert await factory.world.unsettled("JOBS", "optimizer-jobs_optimize_each") == 0


async def test_running_jobs_are_cancelled_on_every_worker_and_a_cancelled_queued_job_never_starts(
    factory: Factory,
) -> None:
    data = [factory.folder / name / "data" for name in ("one", "two")]
    await factory.start("one")
    await factory.start("two")
    for seed, version in enumerate(["1.0.0", "1.0.1", "1.0.2"], 120):
        await factory.push(version, seed)
    jobs = [await factory.job_of(version) for version in ("1.0.0", "1.0.1", "1.0.2")]
    for folder in data:
        await process_in(folder)
    running = [v for j in jobs if (v := await factory.job(j.job)).state is JobState.RUNNING]
    [queued] = [j for j in jobs if j.job not in {v.job for v in running}]

    assert (await factory.cancel(queued.job)).state is JobState.CANCELLED
    start = time.monotonic()
    for view in running:
        assert (await factory.cancel(view.job)).state is JobState.CANCELLING
    for view in running:
        ended = await factory.reached(view.job, JobState.CANCELLED, within_s=10)
        assert ended.reason.startswith("cancelled by person:")
    for folder in data:
        await wait_until_no_process(folder, within_s=5)
        assert not list(folder.glob("jobs/*"))
    print(f"cancelled after {time.monotonic() - start:.1f} s")

    async def settled() -> bool | None:
        return await factory.world.unsettled("JOBS", "optimizer-jobs_optimize_each") == 0 or None

    await eventually(settled)
    rejected = await factory.events(VariantRejected)
    assert sorted(e.job for e in rejected) == sorted(j.job for j in jobs)
    assert {e.problem.code for e in rejected if e.problem} == {JobCancelled.code}
    assert await factory.events(VariantProgressed, queued.job) == []
    again = await factory.ask(queued.version, recipes=("int8",))  # a cancelled job may be requested again
    assert again.job != queued.job
    await factory.reached(again.job, JobState.DONE)


async def test_a_job_killed_for_memory_fails_and_the_next_job_runs(factory: Factory) -> None:
    worker = await factory.start("one")
    await factory.push("1.0.0", seed=130)
    await factory.push("1.0.1", seed=131)
    first, second = await factory.job_of("1.0.0"), await factory.job_of("1.0.1")
    os.kill(await process_in(factory.folder / "one" / "data"), signal.SIGKILL)  # as the kernel does
    ended = await factory.reached(first.job, JobState.FAILED)
    assert ended.problem and ended.problem.code == NotEnoughMemory.code
    assert "probably because of its memory" in ended.reason
    await factory.reached(second.job, JobState.DONE)
    worker.stop()


async def test_a_model_that_needs_more_memory_than_the_limit_fails_before_its_job_starts(factory: Factory) -> None:
    await factory.start("one", job_memory_bytes=100_000_000)
    await factory.push("1.0.0", seed=132)
    ended = await factory.reached((await factory.job_of("1.0.0")).job, JobState.FAILED)
    assert ended.problem and ended.problem.code == NotEnoughMemory.code
    assert "0.1 GB" in ended.reason
    [rejected] = await factory.events(VariantRejected)
    assert rejected.problem == ended.problem

"""The registry in this process, optimizers as separate processes, and tiny models that an operator pushes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import forked_jobs
from integration.artifact_world import Process, eventually, running, settings_of
from integration.kit_world import World
from tiny_model import make_tiny_llama

from slmops.console.commands.evaluation_data import OwnData
from slmops.console.commands.push import push
from slmops.contracts.commands import CancelJob, ListJobs, Optimize, VersionView
from slmops.contracts.events import EVENTS, Event
from slmops.contracts.jobs import JobState, JobView
from slmops.registry.app import build as registry
from slmops.registry.settings import Settings as RegistrySettings

if TYPE_CHECKING:
    from servers import S3

E = TypeVar("E", bound=Event)
JOB_WITHIN_S = 150  # about 10 s on an idle machine


@dataclass
class Factory:
    """Starts optimizers, which run until the test ends, and sends them the operator's commands."""

    world: World
    s3: S3
    folder: Path
    workers: dict[str, Process] = field(default_factory=dict)

    async def start(self, name: str, data_dir: Path | None = None, **settings: Any) -> Process:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        wanted = settings_of(self.world, self.s3, "optimizer", home)
        wanted |= {"data_dir": data_dir or home / "data", "trace_file": home / "trace.jsonl", "recipes": '["int8"]'}
        worker = Process.of("optimizer", home, wanted | settings)
        worker.environment |= {"OMP_WAIT_POLICY": "PASSIVE"} | forked_jobs.environment()
        await worker.start()
        self.workers[name] = worker
        return worker

    async def push(
        self, version: str, seed: int, model: str = "tiny", golden: bytes | None = None, own: OwnData | None = None
    ) -> VersionView:
        source = self.folder / f"llama-{seed}"
        if not source.exists():
            await asyncio.to_thread(make_tiny_llama, source, seed)
        prompts = self.folder / "golden.jsonl"
        if golden:
            prompts.write_bytes(golden)
        return await push(self.world.client, source, model, version, prompts if golden else None, own=own)

    async def ask(self, version: str = "1.0.0", model: str = "tiny", **asked: Any) -> JobView:
        return await self.world.client.request(Optimize(model=model, version=version, **asked))

    async def jobs(self) -> list[JobView]:
        return list((await self.world.client.request(ListJobs())).jobs)

    async def job(self, job: str) -> JobView:
        [found] = (await self.world.client.request(ListJobs(job=job))).jobs
        return found

    async def cancel(self, job: str) -> JobView:
        return await self.world.client.request(CancelJob(job=job, by="a test"))

    async def job_of(self, version: str, model: str = "tiny") -> JobView:
        """Waits for the job that a push queued and returns it."""

        async def look() -> JobView | None:
            return next((job for job in await self.jobs() if (job.model, job.version) == (model, version)), None)

        return await eventually(look)

    async def reached(self, job: str, *states: JobState, within_s: float = JOB_WITHIN_S) -> JobView:
        async def look() -> JobView | None:
            view = await self.job(job)
            assert view.state in states or not view.state.ended, view
            return view if view.state in states else None

        return await eventually(look, within_s)

    async def events(self, kind: type[E], job: str | None = None) -> list[E]:
        stored = [m for m in await self.world.stored("EVENTS") if m.subject == kind.type]
        found = [EVENTS[kind.type].model_validate_json(m.data) for m in stored]
        return [event for event in found if isinstance(event, kind) and job in (None, event.model_dump().get("job"))]

    def spans(self, name: str) -> int:
        """Returns the number of spans of this name in the traces of all workers; complete only for stopped workers."""
        paths = [self.folder / worker / "trace.jsonl" for worker in self.workers]
        lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
        return sum(json.loads(line)["name"] == name for line in lines)


@asynccontextmanager
async def factory_on(world: World, s3: S3, folder: Path) -> AsyncIterator[Factory]:
    (folder / "registry").mkdir()
    settings = RegistrySettings(**settings_of(world, s3, "registry", folder / "registry"))
    factory = Factory(world, s3, folder)
    async with running(registry(settings)):
        try:
            yield factory
        finally:
            for worker in factory.workers.values():
                if worker.running and worker.running.poll() is None:
                    worker.kill()


def processes_in(folder: Path) -> list[int]:
    """Returns the live processes that work in `folder`, by command line or (`forked_jobs`) by working folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes() + bytes((entry / "cwd").readlink()):
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


async def wait_until_no_process(folder: Path, within_s: float) -> float:
    """Waits until no process works in `folder`. Returns the seconds that it took."""
    start = time.monotonic()
    while processes_in(folder):
        assert time.monotonic() - start < within_s, "a process still runs"
        await asyncio.sleep(0.05)
    return time.monotonic() - start

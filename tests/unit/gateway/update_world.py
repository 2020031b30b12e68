"""A gateway's updater without processes: simulated runners, real slots on a real disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slmops.contracts.blueprint import SoakPolicy
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import DiskFull
from slmops.contracts.manifest import GOLDEN_PATH
from slmops.contracts.plan import Release
from slmops.gateway.domain import RESTING
from slmops.gateway.install import documents
from slmops.gateway.install import updater as module
from slmops.gateway.install.slots import Slot, Slots
from slmops.gateway.install.updater import Updater
from slmops.gateway.serving.inference import Done, InferenceRequest, Ready, Token
from slmops.gateway.serving.inference import Release as Served
from slmops.gateway.serving.releases import Serving, ServingLimits
from slmops.kit.atomic_write import atomic_write

GOLDEN = '{"prompt": "hi", "expect": ["yes"]}\n'


class Faults:
    """Counts the steps, and fails at one of them."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.on_step: Callable[[], None] = lambda: None
        self.at: int | None = None
        self.error: Callable[[], BaseException] = lambda: DiskFull("full")
        self.lasting = False
        """Whether every later write to the disk fails too."""

    def step(self, name: str) -> None:
        self.on_step()
        self.steps.append(name)
        number = len(self.steps) - 1
        if self.at is not None and (number == self.at or (self.lasting and number > self.at and "write" in name)):
            raise self.error()


async def at_once() -> None: ...


class SimulatedRunner:
    """A runner without a process, that answers every prompt."""

    running: list[SimulatedRunner] = []  # noqa: RUF012 (emptied by the fixture)

    def __init__(self, release: Served, faults: Faults, before_answer: Callable[[], Awaitable[None]]) -> None:
        self.release, self._faults, self._before_answer = release, faults, before_answer
        self._dead = asyncio.Event()
        self._dead.set()

    @property
    def alive(self) -> bool:
        return not self._dead.is_set()

    async def start(self) -> Ready:
        self._faults.step(f"start {self.release.version}")
        self._dead.clear()
        self.running.append(self)
        return Ready(load_s=0.0, rss_bytes=1, model="llama", context_tokens=2048)

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[Token | Done, None]:
        self._faults.step("answer")
        await self._before_answer()
        yield Done("yes", "stop", 1, 1, 0.1, 10.0)

    async def dead(self) -> None:
        await self._dead.wait()

    async def stop(self, drain: timedelta = timedelta()) -> None:
        self._faults.step(f"stop {self.release.version}")
        self._dead.set()
        if self in self.running:
            self.running.remove(self)

    def peak_rss_bytes(self) -> int:
        return 1


class Acquirer:
    """Puts a file and a golden prompt into the slot."""

    fetched_bytes = 0

    def __init__(self, slots: Slots, blobs: Path, faults: Faults) -> None:
        self._slots, self._blobs, self._faults = slots, blobs, faults

    async def acquire(self, release: Release) -> Slot:
        self._faults.step("acquire")
        files = await asyncio.to_thread(self._download, release.version)
        return await self._slots.disk.complete(partial(self._slots.install, release.manifest.digest, files))

    def _download(self, version: str) -> list[tuple[Path, str]]:
        folder = self._blobs / version
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((GOLDEN_PATH, GOLDEN), ("model", version)):
            with atomic_write(folder / name) as out:
                out.write(text.encode())
        return [(folder / name, name) for name in (GOLDEN_PATH, "model")]

    def prune(self) -> None:
        self._faults.step("prune")


class World:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.faults = home, Faults()
        self.runners: list[SimulatedRunner] = []
        self.before_answer: Callable[[], Awaitable[None]] = at_once
        SimulatedRunner.running.clear()
        self.make_runner = self._runner
        monkeypatch.setattr(module, "_runner", lambda release, path: self.make_runner(release, path))
        write = Slots._write

        def failing_atomic_write(path: Path) -> Any:
            self.faults.step(f"write {path.suffix}")
            return atomic_write(path)

        def failing_write(slots: Slots, **changes: object) -> None:
            self.faults.step("write slots")
            write(slots, **changes)

        monkeypatch.setattr(documents, "atomic_write", failing_atomic_write)
        monkeypatch.setattr(Slots, "_write", failing_write)
        self.start()

    def _runner(self, release: Release, _path: Path) -> SimulatedRunner:
        served = Served(release.manifest.digest, release.model, release.version)
        self.runners.append(SimulatedRunner(served, self.faults, self.before_answer))
        return self.runners[-1]

    def start(self) -> None:
        """Starts the gateway, as after a restart of its process: everything is read from the disk."""
        self.slots = Slots(self.home)
        limits = ServingLimits(drain=timedelta(), backoff=timedelta(milliseconds=1), patience=timedelta(seconds=5))
        self.serving = Serving(limits)
        acquirer: Any = Acquirer(self.slots, self.home / "blobs", self.faults)
        self.updater = Updater(self.slots, acquirer, self.serving, self.home / "releases")

    @property
    def serves(self) -> str | None:
        return self.serving.release.version if self.serving.release and self.serving.ready else None

    def check(self) -> None:
        """Asserts what holds after every failure."""
        assert self.updater.phase in RESTING
        assert not self.slots.on_trial
        assert self.slots.active is not None
        assert self.serving.release is not None
        assert self.slots.active.digest == self.serving.release.digest
        assert (self.slots.active.path / "model").read_text() == self.serving.release.version
        assert (self.slots.active.path / GOLDEN_PATH).read_text() == GOLDEN
        assert [runner.release for runner in SimulatedRunner.running] == [self.serving.release], "a runner is left over"


def release(version: str, **changes: object) -> Release:
    manifest = Descriptor(media_type="m", digest=digest_of(version.encode()), size=1)
    values = {"revision": 1, "model": "tiny", "version": version, "manifest": manifest, "signature": manifest}
    soak = SoakPolicy(seconds=0, golden_every_s=0.01)
    return Release.model_validate({**values, "size_bytes": 1, "soak": soak, **changes})


OLD, NEW = release("1.0.0"), release("1.0.1")


async def settled(world: World) -> None:
    """Waits until the keeper has started a runner that did not start."""
    async with asyncio.timeout(10):
        while not world.serving.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

"""An update fails or is killed at each of its steps: the gateway serves, leaves nothing behind, and updates again."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from slmops.contracts.blueprint import RuntimeSettings, SoakPolicy
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import DiskFull, InferenceFailed, NotReady, SlmopsError
from slmops.contracts.manifest import GOLDEN_PATH
from slmops.contracts.plan import Release
from slmops.gateway.domain import MAX_ATTEMPTS, RESTING
from slmops.gateway.install import updater as module
from slmops.gateway.install.slots import Slot, Slots
from slmops.gateway.install.updater import Updater
from slmops.gateway.serving.inference import Done, InferenceRequest, Ready, Token
from slmops.gateway.serving.inference import Release as Served
from slmops.gateway.serving.releases import Serving, ServingLimits
from slmops.gateway.serving.runner import ProcessRunner

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
        folder = self._blobs / release.version
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GOLDEN_PATH).write_text(GOLDEN)
        (folder / "model").write_text(release.version)
        return self._slots.install(release.manifest.digest, [(folder / name, name) for name in (GOLDEN_PATH, "model")])

    def prune(self) -> None:
        self._faults.step("prune")


class World:
    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.faults = home, Faults()
        self.runners: list[SimulatedRunner] = []
        self.before_answer: Callable[[], Awaitable[None]] = at_once
        SimulatedRunner.running.clear()
        monkeypatch.setattr(module, "_runner", self._runner)
        atomic_write, write = module.atomic_write, Slots._write

        def failing_atomic_write(path: Path) -> Any:
            self.faults.step(f"write {path.suffix}")
            return atomic_write(path)

        def failing_write(slots: Slots, **changes: object) -> None:
            self.faults.step("write slots")
            write(slots, **changes)

        monkeypatch.setattr(module, "atomic_write", failing_atomic_write)
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
        assert [runner.release for runner in SimulatedRunner.running] == [self.serving.release], "a runner is left over"


def release(version: str, **changes: object) -> Release:
    manifest = Descriptor(media_type="m", digest=digest_of(version.encode()), size=1)
    values = {"revision": 1, "model": "tiny", "version": version, "manifest": manifest, "signature": manifest}
    soak = SoakPolicy(seconds=0, golden_every_s=0.01)
    return Release.model_validate({**values, "size_bytes": 1, "soak": soak, **changes})


OLD, NEW = release("1.0.0"), release("1.0.1")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path, monkeypatch)
    await world.updater.update(OLD, "r1")
    return world


ERRORS: dict[str, Callable[[], BaseException]] = {
    "full disk": lambda: DiskFull("full"),
    "no memory": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "cancelled": asyncio.CancelledError,
    "rejected": lambda: InferenceFailed("bad"),
}


async def steps_of_an_update(world: World) -> int:
    before = len(world.faults.steps)
    await world.updater.update(release("0.9.9"), "r")
    steps = len(world.faults.steps) - before
    await world.updater.update(release("1.0.0"), "r")
    world.faults.steps.clear()
    return steps


@pytest.mark.parametrize(
    ("kind", "lasting"), [*((kind, False) for kind in ERRORS), ("full disk", True), ("no memory", True)]
)
async def test_an_update_that_fails_at_any_step_leaves_a_gateway_that_serves_and_can_update(
    world: World, kind: str, lasting: bool
) -> None:
    steps = await steps_of_an_update(world)
    assert steps >= 10
    for number in range(steps):
        world.faults.steps.clear()
        world.faults.at, world.faults.error, world.faults.lasting = number, ERRORS[kind], lasting
        outcome = (await asyncio.gather(world.updater.update(NEW, "r"), return_exceptions=True))[0]
        failed_at = world.faults.steps[min(number, len(world.faults.steps) - 1)]
        world.faults.at = None
        await settled(world)
        world.check()
        assert world.serves in ("1.0.0", "1.0.1"), failed_at
        if not isinstance(outcome, SlmopsError) or isinstance(outcome, DiskFull):
            assert NEW.manifest.digest not in world.slots.failed, f"{failed_at} is not the release's fault"
            assert world.slots.attempts(NEW.manifest.digest) < MAX_ATTEMPTS
        world.updater.allow_retry(NEW.manifest.digest)
        if world.serves == "1.0.0":
            await world.updater.update(NEW, "r")
        assert world.serves == "1.0.1", failed_at
        await world.updater.update(OLD, "r")


async def settled(world: World) -> None:
    """Waits until the keeper has started a runner that did not start."""
    async with asyncio.timeout(10):
        while not world.serving.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_gateway_that_is_killed_at_any_step_serves_after_the_restart(
    world: World, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process leaves is the disk as it was before the step."""
    disks: list[Path] = []

    def copy_the_disk() -> None:
        disks.append(tmp_path_factory.mktemp("disk") / "home")
        shutil.copytree(world.home, disks[-1])

    world.faults.on_step = copy_the_disk
    await world.updater.update(NEW, "r")
    world.faults.on_step = lambda: None
    assert len(disks) >= 10
    for disk in disks:
        after = World(disk, monkeypatch)
        await after.updater.restore()
        await settled(after)
        after.check()
        if after.serves == "1.0.0":
            await after.updater.update(NEW, "r")
        assert after.serves == "1.0.1"
        await after.serving.stop()


async def test_a_damaged_release_document_does_not_stop_the_gateway(world: World) -> None:
    """A power loss left it empty, because it was renamed before its content was on the disk."""
    [document] = (world.home / "releases").glob("*.json")
    document.write_bytes(b"")
    world.start()
    await world.updater.restore()
    assert world.serves is None
    await world.updater.refresh(OLD)  # as the plan says
    assert world.serves == "1.0.0"


async def test_settings_that_could_not_be_applied_are_applied_later(world: World) -> None:
    changed = OLD.model_copy(update={"runtime": RuntimeSettings(max_tokens=7)})
    world.faults.steps.clear()
    world.faults.at = 0  # the new runner does not start
    with pytest.raises(DiskFull):
        await world.updater.refresh(changed)
    world.faults.at = None
    before = len(world.runners)
    await world.updater.refresh(changed)
    assert len(world.runners) == before + 1
    await world.updater.refresh(changed)
    assert len(world.runners) == before + 1


# ---- the soak ---------------------------------------------------------------------------------------------


async def test_a_model_that_answers_nobody_while_soaking_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak waited for ever, and the gateway followed no other plan."""
    monkeypatch.setattr(module, "_ANSWER_WITHIN", timedelta(milliseconds=20))

    asked: list[str] = []

    async def hang() -> None:
        asked.append("x")
        if len(asked) > 1:  # the first one is the probe's
            await asyncio.Event().wait()

    world.before_answer = hang
    with pytest.raises(InferenceFailed, match="answered nothing within"):
        await world.updater.update(NEW, "r")
    assert (world.serves, NEW.manifest.digest in world.slots.failed) == ("1.0.0", True)


async def test_a_busy_gateway_does_not_revert_a_good_release(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, busy = Serving.generate, iter([True, True, True])

    def sometimes(serving: Serving, request: InferenceRequest) -> Any:
        if next(busy, False):
            raise NotReady("too many requests are waiting")
        return generate(serving, request)

    monkeypatch.setattr(Serving, "generate", sometimes)
    await world.updater.update(NEW, "r")
    assert world.serves == "1.0.1"
    assert next(busy, None) is None


async def test_a_gateway_that_stays_busy_tries_again_and_does_not_blame_the_release(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_FOR", timedelta())

    def always(serving: Serving, request: InferenceRequest) -> Any:
        raise NotReady("too many requests are waiting")

    with monkeypatch.context() as patched:
        patched.setattr(Serving, "generate", always)
        for _ in range(MAX_ATTEMPTS + 1):
            with pytest.raises(NotReady):
                await world.updater.update(NEW, "r")
    assert (world.serves, world.slots.failed, world.slots.attempts(NEW.manifest.digest)) == ("1.0.0", (), 0)


# ---- the runner -------------------------------------------------------------------------------------------


async def test_a_device_without_memory_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_memory(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    runner = ProcessRunner(Served(OLD.manifest.digest, "tiny", "1.0.0"), tmp_path)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_memory)
    with pytest.raises(NotReady, match="Cannot allocate memory"):
        await runner.start()


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no memory"), NotReady("no memory"), InferenceFailed("bad")])
async def test_a_dead_runner_is_started_again_whatever_its_start_raises(world: World, error: Exception) -> None:
    """The keeper ended at an `OSError`, and the gateway never answered again while its health said 200."""
    world.faults.error = lambda: error
    world.faults.at, world.faults.lasting = len(world.faults.steps), False
    runner = world.runners[-1]
    runner._dead.set()  # it dies
    assert not world.serving.ready
    await settled(world)
    assert world.serves == "1.0.0"

"""An update fails or is killed at each of its steps: the gateway serves, leaves nothing behind, and updates again."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from unit.gateway.update_world import NEW, OLD, World, release, settled

from slmops.contracts.blueprint import RuntimeSettings
from slmops.contracts.errors import DiskFull, InferenceFailed, NotReady, SlmopsError
from slmops.gateway.domain import MAX_ATTEMPTS
from slmops.gateway.install import updater as module
from slmops.gateway.serving.inference import InferenceRequest
from slmops.gateway.serving.inference import Release as Served
from slmops.gateway.serving.releases import Serving
from slmops.gateway.serving.runner import ProcessRunner


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
        await world.updater.allow_retry(NEW.manifest.digest)
        if world.serves == "1.0.0":
            await world.updater.update(NEW, "r")
        assert world.serves == "1.0.1", failed_at
        await world.updater.update(OLD, "r")


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

"""Every call of an update that changes the disk fails, with each error, or is the last one before a power loss.

The gateway always starts afterwards with a whole release and updates again. And no call is made on the event loop,
which streams the users' answers meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from disk_calls import DAMAGES, DiskCalls, calls_of_this_thread, changes
from unit.gateway.update_world import NEW, OLD, World, release, settled

from slmops.contracts.blueprint import RuntimeSettings
from slmops.contracts.errors import DiskFull, InferenceFailed, SlmopsError
from slmops.contracts.plan import Release
from slmops.gateway.serving.inference import Done

BAD = release("6.6.6")
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class FailingDisk:
    """Fails the calls that change the disk: the one with the number `at`, or all from there."""

    def __init__(self, calls: DiskCalls) -> None:
        self.at, self.errno, self.lasting = -1, errno.EIO, False
        self.made: list[str] = []
        calls.before = self._before

    def _before(self, name: str, path: Path) -> None:
        if not changes(name):
            return
        self.made.append(f"{name} {path.name}")
        number = len(self.made) - 1
        if number == self.at or (self.lasting and 0 <= self.at < number):
            raise OSError(self.errno, os.strerror(self.errno), str(path))

    def works(self) -> None:
        self.at = -1


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskCalls:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what counts is when it is called
    return DiskCalls(monkeypatch, tmp_path)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path / "home", monkeypatch)
    await world.updater.update(OLD, "r1")
    return world


def answering(world: World, wrong_from: int) -> None:
    """Every answer of `BAD` from this number (0: the probe) is wrong."""
    make = world._runner

    def runner(wanted: Release, path: Path) -> Any:
        made = make(wanted, path)
        if wanted.version != BAD.version:
            return made
        asked, generate = iter(range(10**6)), made.generate

        async def wrong(request: Any) -> Any:
            async for item in generate(request):
                late = isinstance(item, Done) and next(asked) >= wrong_from
                if late:
                    world.faults.step("wrong answer")
                yield Done("no", "stop", 1, 1, 0.1, 10.0) if late else item

        made.generate = wrong  # type: ignore[method-assign]
        return made

    world.make_runner = runner


async def good(world: World) -> None:
    await world.updater.update(NEW, "r")


async def rejected(world: World) -> None:
    answering(world, 0)
    await world.updater.update(BAD, "r")


async def reverted(world: World) -> None:
    answering(world, 1)
    await world.updater.update(BAD, "r")


async def first_call(world: World, disk: FailingDisk, scenario: str) -> int:
    """Returns the number of the first call that no other scenario makes: after the wrong answer, if there is one."""
    begun: list[int] = []
    step = world.faults.step

    def noted(name: str) -> None:
        if name == "wrong answer":
            begun.append(len(disk.made))
        step(name)

    world.faults.step = noted  # type: ignore[method-assign]
    await asyncio.gather(SCENARIOS[scenario](world), return_exceptions=True)
    world.faults.step = step  # type: ignore[method-assign]
    await recovers(world, "nothing failed")
    await world.updater.allow_retry(BAD.manifest.digest)
    await world.updater.update(OLD, "r")
    return begun[0] if begun else 0


SCENARIOS: dict[str, Callable[[World], Awaitable[None]]] = {"good": good, "rejected": rejected, "reverted": reverted}


async def recovers(world: World, where: str) -> None:
    """Asserts that the gateway serves a whole release, and installs another one."""
    await settled(world)
    world.check()
    assert world.serves in ("1.0.0", "1.0.1"), where
    await world.updater.allow_retry(NEW.manifest.digest)
    if world.serves == "1.0.0":
        await world.updater.update(NEW, "r")
    assert world.serves == "1.0.1", where
    world.check()


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_the_gateway_recovers_whatever_call_fails(
    world: World, calls: DiskCalls, scenario: str, lasting: bool
) -> None:
    disk = FailingDisk(calls)
    first = await first_call(world, disk, scenario)
    for code in ERRNOS[:1] if lasting else ERRNOS:
        number = first
        while True:
            disk.made.clear()
            disk.at, disk.errno, disk.lasting = number, code, lasting
            outcome = (await asyncio.gather(SCENARIOS[scenario](world), return_exceptions=True))[0]
            reached, where = len(disk.made) > number, f"{disk.made[-1]} {errno.errorcode[code]}"
            disk.works()
            if isinstance(outcome, DiskFull | OSError):
                assert NEW.manifest.digest not in world.slots.failed, f"{where} is not the release's fault"
            assert outcome is None or isinstance(outcome, SlmopsError | OSError), f"{where}: {outcome!r}"
            await recovers(world, where)
            await world.updater.allow_retry(BAD.manifest.digest)
            await world.updater.update(OLD, "r")
            if not reached:
                break
            number += 1
        assert number - first > (20 if scenario == "good" else 5)
        assert any(call.startswith("half") for call in disk.made), "a write stops in the middle"


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_the_gateway_starts_after_a_power_loss_before_any_call(
    world: World, calls: DiskCalls, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    disks: list[tuple[str, Path]] = []

    def copy(name: str, path: Path) -> None:
        if not changes(name):
            return
        made.append(f"{name} {path.name}")
        if len(made) > first:
            for kind in DAMAGES if calls.unsynced(world.home) else ["empty"]:
                disks.append((f"{made[-1]} ({kind})", tmp_path / f"disk-{len(disks)}"))
                calls.copy_after_power_loss(world.home, disks[-1][1], DAMAGES[kind])

    first = await first_call(world, FailingDisk(calls), scenario)
    calls.before = copy
    await asyncio.gather(SCENARIOS[scenario](world), return_exceptions=True)
    calls.before = lambda name, path: None
    assert len(made) > 20
    assert {kind for kind in DAMAGES if any(kind in where for where, _ in disks)} == {*DAMAGES}
    for where, folder in disks:
        after = World(folder, monkeypatch)
        await after.updater.restore()
        await recovers(after, where)
        await after.serving.stop()


async def test_the_gateway_starts_on_a_disk_that_fails(
    world: World, calls: DiskCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process went down while a release was on trial and another one was being installed."""
    disks: list[Path] = []

    def copy_on_trial(name: str, path: Path) -> None:
        if world.slots.on_trial and not disks:
            disks.append(tmp_path / "trial")
            calls.copy_after_power_loss(world.home, disks[0])

    calls.before = copy_on_trial
    await world.updater.update(NEW, "r")
    (disks[0] / "slots" / "staging").mkdir()
    (disks[0] / "slots" / "staging" / "half").write_text("x")
    for number in range(100):
        folder = tmp_path / f"start-{number}"
        calls.copy_after_power_loss(disks[0], folder)
        disk = FailingDisk(calls)
        disk.at, disk.errno, disk.lasting = number, errno.EIO, True
        after = World(folder, monkeypatch)
        await after.updater.restore()
        reached = len(disk.made) > number
        disk.works()
        assert after.serves == "1.0.0"
        await recovers(after, f"call {number} of the start")
        await after.serving.stop()
        if not reached:
            break
    assert 3 < number < 99


async def test_no_step_of_an_update_waits_for_the_disk_on_the_event_loop(world: World, calls: DiskCalls) -> None:
    found = calls_of_this_thread(calls)
    await world.updater.update(NEW, "r2")
    await world.updater.refresh(NEW.model_copy(update={"runtime": RuntimeSettings(max_tokens=7)}))
    for wrong_from in (0, 1):
        answering(world, wrong_from)
        with pytest.raises(InferenceFailed):
            await world.updater.update(BAD, "r3")
        assert world.updater.failed_in(BAD.manifest.digest) == "r3"
        await world.updater.allow_retry(BAD.manifest.digest)
    assert world.updater.release(NEW.manifest.digest) is not None
    await world.updater.restore()
    assert found == []

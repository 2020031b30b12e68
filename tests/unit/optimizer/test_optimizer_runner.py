"""A job's process is killed above its memory limit, and its work folder is locked."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from slmops.contracts.errors import NotEnoughMemory
from slmops.optimizer.jobs.memory_watch import MemoryWatch
from slmops.optimizer.jobs.workspace import Workspace

MB = 1_000_000
# A child of the watched process takes the memory, as the benchmark of a job does.
GREEDY = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
TAKES = "x = bytearray(300_000_000); import time; time.sleep(20)"


async def watched(limit_bytes: int | None, taken: str) -> tuple[MemoryWatch, int]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", GREEDY, taken, start_new_session=True)
    watch = MemoryWatch(process.pid, limit_bytes)
    watching = asyncio.create_task(watch.run())
    async with asyncio.timeout(15):
        code = await process.wait()
    watching.cancel()
    return watch, code


async def test_a_job_above_its_memory_limit_is_killed_with_its_children_and_the_error_has_figures() -> None:
    watch, code = await watched(200 * MB, TAKES)
    with pytest.raises(
        NotEnoughMemory, match=r"used 0\.[23]\d* GB of memory, more than its limit of 0\.2 GB"
    ) as caught:
        watch.check(code)
    assert "SLMOPS_JOB_MEMORY_BYTES" in (caught.value.fix or "")
    assert not any(TAKES in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


async def test_a_job_within_its_memory_limit_is_not_killed() -> None:
    watch, code = await watched(2_000 * MB, "x = bytearray(100_000_000); import time; time.sleep(1.5)")
    watch.check(code)
    assert code == 0
    assert 100 * MB < watch.peak_bytes < 400 * MB


async def test_a_job_killed_by_the_system_is_reported_as_probably_out_of_memory() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", TAKES, start_new_session=True)
    watch = MemoryWatch(process.pid, None)
    watching = asyncio.create_task(watch.run())
    async with asyncio.timeout(15):
        while watch.peak_bytes < 300 * MB:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    code = await process.wait()
    watching.cancel()
    with pytest.raises(NotEnoughMemory, match=r"killed \(code -9\), probably because of its memory: its peak was 0\.3"):
        watch.check(code)


def workspace(home: Path) -> Workspace:
    return Workspace(home, timedelta(minutes=1))


async def test_a_folder_is_claimed_by_one_worker_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    async def work(name: str) -> None:
        async with workspace(tmp_path).claim("w") as claim:
            order.append(f"{name} begins")
            (claim.folder / "x").touch()
            await asyncio.sleep(0.3)
            order.append(f"{name} ends")
        workspace(tmp_path).discard("w")

    await asyncio.gather(*(work(name) for name in ("a", "b", "c")))
    assert sorted(order[::2]) == ["a begins", "b begins", "c begins"]
    assert [begins[0] for begins in order[::2]] == [ends[0] for ends in order[1::2]]
    assert list((tmp_path / "jobs").iterdir()) == []


async def test_a_folder_stays_claimed_until_the_last_process_that_holds_it_is_dead(tmp_path: Path) -> None:
    async with workspace(tmp_path).claim("w") as claim:
        sleeper = await asyncio.create_subprocess_exec("sleep", "30", pass_fds=[claim.lock])
    waiting = asyncio.create_task(entered(tmp_path))
    workspace(tmp_path).discard("w")  # has no effect while the folder is locked
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert claim.folder.exists()
    sleeper.kill()
    await sleeper.wait()
    await asyncio.wait_for(waiting, 5)


async def entered(home: Path) -> None:
    async with workspace(home).claim("w"):
        return

"""The work folders of jobs on this machine, each locked by the worker that uses it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from slmops.optimizer.domain.result import JobResult
from slmops.optimizer.jobs.process import OnProgress, run_job
from slmops.optimizer.recipes.restore import restore
from slmops.optimizer.recipes.spec import JobSpec
from slmops.optimizer.store import Measured

_LOCK, _LOCK_EVERY_S = ".lock", 0.2


@dataclass(frozen=True)
class Claim:
    """A locked work folder. The lock is held while the descriptor `lock` is open in any process."""

    folder: Path
    lock: int


class Workspace:
    """The work folders under `home`. An interrupted job continues in the folder of its work."""

    def __init__(self, home: Path, timeout: timedelta) -> None:
        self._home = home
        self._timeout = timeout

    @asynccontextmanager
    async def claim(self, work: str) -> AsyncIterator[Claim]:
        """Locks the folder; waits while another worker on this machine does the same work."""
        folder = self._folder(work)
        lock = await _lock(folder)
        try:
            yield Claim(folder, lock)
        finally:
            os.close(lock)

    def discard(self, work: str) -> None:
        """Removes the folder, unless somebody works in it. Blocks, because it may hold gigabytes."""
        if (lock := _try_lock(self._folder(work))) is not None:
            shutil.rmtree(self._folder(work), ignore_errors=True)
            os.close(lock)

    def discard_old(self, before: datetime) -> int:
        """Removes the folders that no worker has used since then, and what killed verifications left. Returns how many.

        Blocks. A folder that somebody works in stays, however long that takes.
        """
        old = [lock.parent for lock in (self._home / "jobs").glob(f"*/{_LOCK}") if _changed(lock) < before.timestamp()]
        for folder in old:
            self.discard(folder.name)
        left = [path for path in (self._home / "verifications").glob("*") if _changed(path) < before.timestamp()]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return sum(not path.exists() for path in (*old, *left))

    def _folder(self, work: str) -> Path:
        return self._home / "jobs" / work

    async def run(
        self, source: Path, claim: Claim, spec: JobSpec, known: Sequence[Measured], on_progress: OnProgress
    ) -> JobResult:
        """Makes, measures and judges variants; variants that are `known` are only judged.

        Raises what the job raises: errors about the model, `NotEnoughMemory`, `OptimizationFailed`, `DiskFull`.
        """
        await asyncio.to_thread(restore, claim.folder, known)
        timeout = self._timeout + (spec.search.budget if spec.search else timedelta())
        return await run_job(source, claim.folder, spec, on_progress, timeout, held=[claim.lock])


async def _lock(folder: Path) -> int:
    while True:
        if (lock := await asyncio.to_thread(_try_lock, folder)) is not None:
            return lock
        await asyncio.sleep(_LOCK_EVERY_S)


def _try_lock(folder: Path) -> int | None:
    """Returns a descriptor that holds the folder's lock.

    None if another process holds it or has just removed the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with suppress(BlockingIOError, FileNotFoundError):
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                os.utime(lock)  # the age of the folder
                return lock
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
    return None


def _changed(path: Path) -> float:
    """Returns when a file or folder was changed, in Unix seconds; infinity if somebody has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")

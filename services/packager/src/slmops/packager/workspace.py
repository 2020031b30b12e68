"""Folders in which packages and deltas are built. Threads, not the event loop, wait for the disk."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from slmops.contracts.errors import DiskFull
from slmops.kit.threads import Threads

T = TypeVar("T")
_THREADS = 4


class Workspace:
    """Makes folders in `work`, which nothing else may use.

    It has threads of its own: hashing gigabytes or making a delta takes minutes, for which nothing else waits.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._threads = Threads("workspace", _THREADS)

    async def clear(self) -> None:
        """Removes what a killed process left."""
        await self._threads.run(lambda: shutil.rmtree(self._work, ignore_errors=True))

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """Yields a new folder, so that a redelivered message does not write into the folder of the first delivery.

        Raises `DiskFull`.
        """

        def make() -> Path:
            self._work.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self._work))

        folder = await self.run(make)
        try:
            yield folder
        finally:
            await self._threads.run(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def run(self, work: Callable[[], T]) -> T:
        """Runs work on the disk. Raises `DiskFull`."""

        def guarded() -> T:
            with disk_full(self._work):
                return work()

        return await self._threads.run(guarded)


@contextmanager
def disk_full(where: Path) -> Iterator[None]:
    """Raises `DiskFull` when the disk is full or a quota is exceeded."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            "the disk is too full to build a package or a delta", where=str(where), fix="Free disk space."
        ) from error

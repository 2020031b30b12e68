"""Watches the disks of a process: how much is free, and whether a write succeeds.

A full disk makes a process degraded, not unhealthy: it still answers and recovers by itself when there is space again,
and a restart frees nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import Gauge
from pydantic import BaseModel, ConfigDict

from slmops.kit.settings import BusSettings, DatabaseSettings
from slmops.kit.sizes import size_text
from slmops.kit.threads import Threads

log = logging.getLogger("slmops.disk")
FREE = Gauge("slmops_disk_free_bytes", "Free bytes of the disk of a folder", ["folder"])
_LOOK_EVERY_S: Final = 15.0
_FRESH_FOR_S: Final = 5.0
_WITHIN_S: Final = 2.0
_PROBE: Final = bytes(4096)
_SQLITE: Final = "sqlite:///"


class DiskProblem(BaseModel):
    """A disk that is full or nearly full. `path` is the folder that a process writes to."""

    model_config = ConfigDict(frozen=True)

    path: str
    reason: str
    free_bytes: int
    floor_bytes: int


def folders_of(settings: BusSettings) -> list[Path]:
    """Returns the folders that a service writes to: its data, its SQLite database and its trace."""
    found = [settings.data_dir, *([settings.trace_file.parent] if settings.trace_file else [])]
    if isinstance(settings, DatabaseSettings) and settings.database_url.startswith(_SQLITE):
        found.append(Path(settings.database_url.removeprefix(_SQLITE)).parent)
    return found


class DiskWatch:
    """Looks at the disks of some folders. Folders that do not exist yet are represented by their nearest parent."""

    def __init__(self, folders: Iterable[Path], floor_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folders = [*folders]
        self._floor_bytes = floor_bytes
        self._clock = clock
        self._threads = Threads("disk", 1)  # of its own: a hung disk must not hold up other work
        self._found: list[DiskProblem] = []
        self._looked_at = float("-inf")
        self._looking: asyncio.Future[list[DiskProblem]] | None = None

    async def problems(self) -> list[DiskProblem]:
        """Returns what is wrong, at most `_FRESH_FOR_S` old. A disk that hangs is a problem too."""
        if self._clock() - self._looked_at < _FRESH_FOR_S:
            return self._found
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._threads.run(self.look))
        done, _ = await asyncio.wait([self._looking], timeout=_WITHIN_S)
        found = self._looking.result() if done else self._hangs()
        self._note(found)
        return found

    async def run(self) -> None:
        """Keeps the metric and the log up to date, until cancelled."""
        while True:
            await self.problems()
            await asyncio.sleep(_LOOK_EVERY_S)

    def look(self) -> list[DiskProblem]:
        """Looks at each disk once. Blocks."""
        disks: dict[int, Path] = {}
        for folder in map(_existing, self._folders):
            disks.setdefault(folder.stat().st_dev, folder)
        return [problem for folder in disks.values() if (problem := self._look(folder))]

    def _look(self, folder: Path) -> DiskProblem | None:
        free = shutil.disk_usage(folder).free
        FREE.labels(str(folder)).set(free)
        if (refusal := _refusal(folder)) is not None:
            return self._problem(folder, f"cannot write: {refusal}", free)
        if free < self._floor_bytes:
            return self._problem(folder, f"only {size_text(free)} free", free)
        return None

    def _problem(self, folder: Path, reason: str, free_bytes: int) -> DiskProblem:
        return DiskProblem(path=str(folder), reason=reason, free_bytes=free_bytes, floor_bytes=self._floor_bytes)

    def _hangs(self) -> list[DiskProblem]:
        return [self._problem(self._folders[0], f"does not answer within {_WITHIN_S:g} s", 0)]

    def _note(self, found: list[DiskProblem]) -> None:
        known = {problem.path for problem in self._found}
        for problem in found:
            if problem.path not in known:
                log.warning("the disk of %s: %s. Free disk space.", problem.path, problem.reason)
        if known and not found:
            log.info("the disks have space again")
        self._found, self._looked_at = found, self._clock()


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _refusal(folder: Path) -> str | None:
    """Returns why a small write fails, None if it succeeds. Quotas and inodes show only in a write."""
    probe = folder / f".disk-{os.getpid()}"
    try:
        probe.write_bytes(_PROBE)
    except OSError as error:
        return error.strerror or type(error).__name__
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return None

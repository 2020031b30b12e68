"""Watches the memory of a job's processes and kills them above a limit."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import psutil

from slmops.contracts.errors import NotEnoughMemory

_EVERY_S = 0.5


class MemoryWatch:
    """Polls the memory of a process and all its children, and kills their group above the limit.

    It sums resident memory, so shared memory counts once per process. Peaks between two polls are not seen.
    """

    def __init__(self, pid: int, limit_bytes: int | None) -> None:
        self._pid, self._limit_bytes = pid, limit_bytes
        self.peak_bytes = 0
        self._least_free_bytes = psutil.virtual_memory().available

    async def run(self) -> None:
        """Returns when the process has ended or was killed because of its memory."""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            process = psutil.Process(self._pid)
            while not self.exceeded:
                self.peak_bytes = max(self.peak_bytes, _resident_bytes(process))
                self._least_free_bytes = min(self._least_free_bytes, psutil.virtual_memory().available)
                if self.exceeded:
                    os.killpg(self._pid, signal.SIGKILL)
                await asyncio.sleep(_EVERY_S)

    @property
    def exceeded(self) -> bool:
        return self._limit_bytes is not None and self.peak_bytes > self._limit_bytes

    def check(self, code: int) -> None:
        """Raises `NotEnoughMemory`, with figures, if the exit code shows that the process died of its memory."""
        if self.exceeded:
            assert self._limit_bytes is not None
            raise NotEnoughMemory(
                f"the job used {_gb(self.peak_bytes)} of memory, more than its limit of {_gb(self._limit_bytes)}",
                fix="Raise SLMOPS_JOB_MEMORY_BYTES, or use recipes that need less.",
            )
        if code == -signal.SIGKILL:
            raise NotEnoughMemory(
                f"the job was killed (code {code}), probably because of its memory: its peak was "
                f"{_gb(self.peak_bytes)}, and {_gb(self._least_free_bytes)} of the host's "
                f"{_gb(psutil.virtual_memory().total)} were free",
                fix="Run the optimizer on a host with more memory, or stop other programs on this host.",
            )


def _resident_bytes(process: psutil.Process) -> int:
    found = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += one.memory_info().rss
    return found


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.3g} GB"

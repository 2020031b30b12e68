"""Resident memory of a process."""

from __future__ import annotations

from pathlib import Path

import psutil


def rss_bytes(pid: int) -> int:
    """Returns the current resident memory. Raises `psutil.NoSuchProcess`."""
    return int(psutil.Process(pid).memory_info().rss)


def peak_rss_bytes(pid: int) -> int | None:
    """Returns the peak resident memory (`VmHWM`), without /proc the current one; None if the process has ended.

    `getrusage` is not used, because its ru_maxrss includes the image of the parent that forked the process.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else None  # a zombie has no VmHWM
    except OSError:
        return rss_bytes(pid) if psutil.pid_exists(pid) else None

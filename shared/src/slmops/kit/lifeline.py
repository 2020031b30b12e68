"""Ends helper processes when the process that started them ends for any reason."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here, because loading after a fork is unsafe


def die_with(parent: int) -> None:
    """Makes this process get SIGKILL when its parent process `parent` dies. On Linux; elsewhere it does nothing."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os.kill(os.getpid(), signal.SIGKILL)

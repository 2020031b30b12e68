"""Ctrl-C of the command line: outside a command it ends the process at once, within one it is a KeyboardInterrupt.

Outside, there is nothing to clean up, and the modules that are being imported would print a traceback. This module
imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""`ExitCode.INTERRUPTED`; importing it takes as long as a short command."""


def end_at_once() -> None:
    """From now on, Ctrl-C prints one line and ends the process."""
    signal.signal(signal.SIGINT, _end)


@contextmanager
def as_exception() -> Iterator[None]:
    """Within the block, Ctrl-C raises `KeyboardInterrupt`, if `end_at_once` was called before."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_at_once()


def _end(_number: int, _frame: object) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)

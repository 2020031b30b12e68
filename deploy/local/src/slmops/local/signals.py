"""Ctrl-C and SIGTERM as an orderly stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP cancel the current task, once: a second one cannot tear the clean-up.

    The clean-up must therefore have an end of its own, as `Supervisor.stop` has.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("call it within a task")

    def cancel() -> None:
        if not task.cancelling():
            task.cancel()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)

"""Converts Ctrl-C and SIGTERM to the cancellation of a task."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP cancels the current task. Further signals are ignored.

    So a second signal cannot interrupt the clean-up. The clean-up must limit its own time, as `Supervisor.stop` does.
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

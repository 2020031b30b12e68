"""Cancels tasks that run until they are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 5.0
"""Longer than a task's cleanup, which a second cancellation would abort; shorter than a container's stop timeout."""


def raise_if_cancelled() -> None:
    """Raises `CancelledError` if this task was cancelled and an await returned all the same.

    A loop that asks a server again and again calls it once per turn. Otherwise Ctrl-C is lost when it comes in the
    moment in which an answer arrives (see `cancel_and_wait`).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and returns when all of them have ended, with whatever outcome.

    They are cancelled again every few seconds. Before Python 3.12 `asyncio.wait_for` loses a cancellation that arrives
    when its awaitable is just done (python/cpython#86296). nats-py uses it for every acknowledgement, so a loop around
    it could run forever.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)

"""Carries out commands side by side: a bounded number at once and waiting, each until its requester gives up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from slmops.kit.bus.exchange import deadline
from slmops.kit.cancellation import cancel_and_wait

log = logging.getLogger("slmops.bus")
AT_ONCE = 8
"""Commands of one subject that one process carries out at the same time."""
WAITING = 256
"""Commands of one subject that may wait for their turn. Further ones are refused at once: they would wait too long."""
Work = Callable[[], Awaitable[None]]


class CommandPool:
    """Runs the commands of one subject."""

    def __init__(self, at_once: int = AT_ONCE, waiting: int = WAITING) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._most = at_once + waiting
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def full(self) -> bool:
        return len(self._tasks) >= self._most

    def start(self, work: Work, patience: timedelta, given_up: Callable[[], None]) -> None:
        """Starts `work`, or queues it. When its requester's patience ends, it is cancelled and `given_up` is called."""
        until = asyncio.get_running_loop().time() + patience.total_seconds()
        task = asyncio.create_task(self._run(work, until, given_up))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, work: Work, until: float, given_up: Callable[[], None]) -> None:
        deadline.set(until)
        try:
            async with asyncio.timeout_at(until), self._turns:
                if asyncio.get_running_loop().time() >= until:  # the cancellation comes only at the next await
                    raise TimeoutError
                await work()
        except TimeoutError:
            given_up()
        except Exception:
            log.exception("a command could not be answered")

    async def stop(self, grace: timedelta) -> None:
        """Lets running commands finish for at most `grace`, then cancels them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace.total_seconds())
        await cancel_and_wait(list(self._tasks))

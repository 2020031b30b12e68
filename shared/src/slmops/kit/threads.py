"""Threads for one kind of work, so that work that waits for one thing cannot starve work that waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """Like `asyncio.to_thread`, which has one pool for everything: a hung object store would fill it."""

    def __init__(self, name: str, most: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=most, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` in one of the threads, with the context (trace, deadline) of the caller."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, work)

    async def complete(self, work: Callable[[], T]) -> T:
        """Runs `work` to its end, also if the caller is cancelled; the cancellation is raised afterwards.

        For steps that must not overlap with what the caller does to undo them.
        """
        running = asyncio.ensure_future(self.run(work))
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not running.cancelled():
                running.exception()  # otherwise it is logged as never retrieved
            raise cancelled
        return running.result()

    def close(self) -> None:
        """Lets the threads end when their work is done. Nothing may be run afterwards."""
        self._pool.shutdown(wait=False)

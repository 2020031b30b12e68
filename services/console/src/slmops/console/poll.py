"""Polling that survives the restart of a service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

from slmops.contracts.errors import TemporaryError
from slmops.kit.cancellation import raise_if_cancelled

T = TypeVar("T")
EVERY = timedelta(seconds=0.5)
PATIENCE = timedelta(seconds=60)


async def poll(
    ask: Callable[[], Awaitable[T]], every: timedelta = EVERY, patience: timedelta = PATIENCE
) -> AsyncIterator[T]:
    """Yields answers without end. Raises a `TemporaryError` that has lasted longer than `patience`."""
    answered = time.monotonic()
    while True:
        try:
            answer = await ask()
        except TemporaryError:
            if time.monotonic() - answered > patience.total_seconds():
                raise
        else:
            answered = time.monotonic()
            yield answer
        raise_if_cancelled()
        await asyncio.sleep(every.total_seconds())

"""Tasks that run forever end when cancelled, also if a cancellation gets lost."""

from __future__ import annotations

import asyncio

import pytest

from slmops.kit import cancellation as ending
from slmops.kit.cancellation import cancel_and_wait


async def test_a_loop_that_loses_its_cancellation_in_wait_for_ends(monkeypatch):
    monkeypatch.setattr(ending, "_AGAIN_S", 0.01)
    acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def publishing() -> None:
        await asyncio.wait_for(acknowledged, 60)
        await asyncio.Event().wait()

    task = asyncio.create_task(publishing())
    await asyncio.sleep(0)
    acknowledged.set_result(None)  # and in the same turn of the loop:
    await asyncio.wait_for(cancel_and_wait([task]), 5)
    assert task.cancelled()


async def test_the_error_of_a_cancelled_task_is_not_raised():
    async def failing() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("on the way out")

    task = asyncio.create_task(failing())
    await asyncio.sleep(0)
    await cancel_and_wait([task])
    with pytest.raises(ValueError, match="on the way out"):
        task.result()
    await cancel_and_wait([task])
    await cancel_and_wait([])

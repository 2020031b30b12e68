"""Polling ends when it is cancelled, also in the moment in which an answer arrives."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from slmops.console.poll import poll


async def test_polling_ends_when_the_cancellation_comes_together_with_an_answer() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    answers = []

    async def ask() -> str:
        return await asyncio.wait_for(answer, 60)  # as nats-py does; before Python 3.12 it loses the cancellation

    async def watch() -> None:
        async for found in poll(ask, every=timedelta(0)):
            answers.append(found)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    answer.set_result("running")
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(watching, 5)
    assert len(answers) <= 1

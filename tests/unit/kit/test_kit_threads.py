"""A hung object store does not stop the journal, and the other way round."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path

import pytest
from sqlalchemy import MetaData, text

from slmops.kit.journal import Journal
from slmops.kit.objects.s3 import answered
from slmops.kit.threads import Threads


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db", service="test", metadata=MetaData(), migrations=None, project=lambda *_: None
    )
    await journal.open()
    yield journal
    await journal.close()


async def test_a_hung_object_store_does_not_stop_the_journal(journal: Journal) -> None:
    hung = threading.Event()
    requests = [asyncio.create_task(answered("s3", hung.wait)) for _ in range(64)]
    try:
        async with asyncio.timeout(10):
            assert await journal.read(lambda connection: connection.execute(text("SELECT 1")).scalar()) == 1
            await journal.transact(lambda unit: unit.first_time("test", "1"))
    finally:
        hung.set()
        await asyncio.gather(*requests)


async def test_a_thread_has_the_context_of_its_caller() -> None:
    value, threads = ContextVar("value", default=""), Threads("test", 1)
    value.set("trace")
    assert await threads.run(value.get) == "trace"
    threads.close()


async def test_work_that_must_complete_ends_before_its_caller_is_cancelled() -> None:
    """Otherwise what the caller does to undo a step would overlap with the step."""
    threads, begun, go_on, done = Threads("steps", 1), threading.Event(), threading.Event(), list[str]()

    def step() -> None:
        begun.set()
        go_on.wait()
        done.append("step")

    async def caller() -> None:
        try:
            await threads.complete(step)
        finally:
            done.append("undo")

    task = asyncio.create_task(caller())
    await asyncio.to_thread(begun.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert done == []
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["step", "undo"]


async def test_work_that_completes_returns_its_result_or_error() -> None:
    threads = Threads("steps", 1)
    assert await threads.complete(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await threads.complete(lambda: 1 // 0)

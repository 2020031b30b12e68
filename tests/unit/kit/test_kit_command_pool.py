"""Commands wait for their turn in a bounded queue, and end when their requester gives up or the service stops."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from slmops.contracts.errors import MessageTooLarge
from slmops.kit.bus.command_pool import CommandPool
from slmops.kit.bus.exchange import HEADER_ROOM_BYTES, REQUEST_TIMEOUT, parts_of, patience, remaining

LONG = timedelta(hours=1)


def nothing() -> None: ...


async def test_only_so_many_run_at_once_and_only_so_many_wait() -> None:
    pool, release, running = CommandPool(at_once=2, waiting=1), asyncio.Event(), list[int]()

    async def work(number: int) -> None:
        running.append(number)
        await release.wait()

    for number in range(3):
        assert not pool.full
        pool.start(lambda number=number: work(number), LONG, nothing)  # type: ignore[misc]
    assert pool.full
    await asyncio.sleep(0)
    assert running == [0, 1]
    release.set()
    await pool.stop(LONG)
    assert running == [0, 1, 2]
    assert not pool.full


async def test_a_command_that_nobody_waits_for_is_never_started() -> None:
    pool, started, given_up = CommandPool(), list[str](), list[str]()

    async def work() -> None:
        started.append("x")
        await asyncio.sleep(0)

    pool.start(work, timedelta(seconds=-1), lambda: given_up.append("x"))
    await pool.stop(LONG)
    assert (started, given_up) == ([], ["x"])


async def test_a_defect_of_one_command_harms_no_other() -> None:
    pool, done = CommandPool(at_once=1), list[str]()

    async def broken() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        done.append("x")

    pool.start(broken, LONG, nothing)
    pool.start(work, LONG, nothing)
    await pool.stop(LONG)
    assert done == ["x"]


async def test_a_stop_ends_commands_that_take_too_long() -> None:
    pool = CommandPool()
    pool.start(asyncio.Event().wait, LONG, nothing)  # type: ignore[arg-type]
    await pool.stop(timedelta())
    assert not pool._tasks


async def test_outside_a_command_a_request_has_its_own_timeout() -> None:
    assert remaining(LONG) == LONG


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "0", "1e99"])
def test_an_impossible_patience_is_the_default(text: str) -> None:
    assert patience({"slmops-patience-s": text}) == REQUEST_TIMEOUT
    assert patience({}) == REQUEST_TIMEOUT
    assert patience({"slmops-patience-s": "2.5"}) == timedelta(seconds=2.5)


@pytest.mark.parametrize("size", [0, 1, 10, 11, 640])
def test_the_parts_of_an_answer_are_the_answer(size: int) -> None:
    parts = parts_of(b"x" * size, HEADER_ROOM_BYTES + 10, 64, "subject")
    assert b"".join(parts) == b"x" * size
    assert all(len(part) <= 10 for part in parts)


@pytest.mark.parametrize(("size", "accepted"), [(11, 1), (11, 0), (641, 64), (641, 9999)])
def test_an_answer_in_more_parts_than_are_accepted_is_refused(size: int, accepted: int) -> None:
    with pytest.raises(MessageTooLarge):
        parts_of(b"x" * size, HEADER_ROOM_BYTES + 10, accepted, "subject")

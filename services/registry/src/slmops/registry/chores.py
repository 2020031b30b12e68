"""Runs the registry's scheduled work: each chore in one process at a time, at times that survive restarts.

A process claims a due chore in the database and renews its claim while it works. If it dies, its claim ends after
`HELD`, and another process starts the chore again from its stored state.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from prometheus_client import Counter, Gauge

from slmops.contracts.errors import SlmopsError
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.registry import store

log = logging.getLogger("slmops.registry")
HELD: Final = timedelta(minutes=3)
AGAIN_AFTER: Final = timedelta(hours=1)
"""When a chore that failed is tried again."""
_LOOK_EVERY: Final = timedelta(minutes=1)
DONE = Gauge("slmops_chore_done_timestamp_seconds", "Unix time when scheduled work last succeeded here", ["chore"])
FAILED = Counter("slmops_chore_failed", "Scheduled work that failed", ["chore"])


@dataclass(frozen=True)
class Chore:
    """Scheduled work. `work` takes the stored state and returns the new one, and when the chore is due again.

    `first_after`: how long after the first start of a new system it is done for the first time.
    """

    name: str
    first_after: timedelta
    work: Callable[[str], Awaitable[tuple[str, timedelta]]]


class Chores:
    """Does the chores of one process. A failed chore keeps its state and its problem, and is tried again."""

    def __init__(self, journal: Journal, clock: Clock, chores: Sequence[Chore]) -> None:
        self._journal, self._clock, self._chores = journal, clock, chores
        self._me = secrets.token_hex(8)

    async def run(self) -> None:
        """Does chores when they are due, until cancelled."""
        while True:
            for chore in self._chores:
                try:
                    await self.turn(chore)
                except SlmopsError as error:  # of the database: `turn` handles those of the chore
                    log.warning("could not look whether to %s: %s", chore.name, error)
            await asyncio.sleep(_LOOK_EVERY.total_seconds())

    async def turn(self, chore: Chore) -> bool:
        """Does a chore if it is due and no other process does it. Returns whether it did."""
        state = await self._claim(chore)
        if state is None:
            return False
        holding = asyncio.create_task(self._hold(chore))
        new: str | None = None
        due, problem = AGAIN_AFTER, ""
        try:
            new, due = await chore.work(state)
            DONE.labels(chore.name).set_to_current_time()
        except SlmopsError as error:
            problem = str(error)
            FAILED.labels(chore.name).inc()
            log.warning("could not %s, will retry: %s", chore.name, error)
        finally:
            await cancel_and_wait([holding])
        await self._end(chore, self._clock() + due, new, problem)
        return True

    async def _claim(self, chore: Chore) -> str | None:
        now = self._clock()
        until, first = now + HELD, now + chore.first_after
        return await self._journal.transact(
            lambda unit: store.claim_chore(
                unit.connection, chore.name, self._me, now.timestamp(), until.timestamp(), first.timestamp()
            )
        )

    async def _hold(self, chore: Chore) -> None:
        while True:
            await asyncio.sleep(HELD.total_seconds() / 3)
            until = (self._clock() + HELD).timestamp()
            renew = partial(_renew, name=chore.name, holder=self._me, until=until)
            try:
                await self._journal.transact(renew)
            except SlmopsError as error:  # another process may start it too, which harms nothing
                log.warning("could not renew the claim to %s: %s", chore.name, error)

    async def _end(self, chore: Chore, due: datetime, state: str | None, problem: str) -> None:
        await self._journal.transact(
            lambda unit: store.end_chore(unit.connection, chore.name, self._me, due.timestamp(), state, problem)
        )


def _renew(unit: UnitOfWork, name: str, holder: str, until: float) -> None:
    store.hold_chore(unit.connection, name, holder, until)

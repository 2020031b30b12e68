"""Exports unsent messages as a sealed file into the bundle folder, to be carried to a network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from slmops.contracts.plan import Identity
from slmops.contracts.results import RESULTS_SUFFIX, ResultMessage
from slmops.gateway.report.spool import Spool, Spooled
from slmops.kit.clock import Clock
from slmops.kit.sealed_results import Add, writing

log = logging.getLogger(__name__)
_AT_ONCE = 100


class Results:
    """Writes the whole spool to a sealed file whenever it holds new messages.

    The messages stay in the spool, because only the bus acknowledges their arrival.
    """

    def __init__(
        self, folder: Path, identity: Identity, seed: str, spool: Spool, every: timedelta, clock: Clock
    ) -> None:
        self._file = folder / f"{identity.gateway_id}{RESULTS_SUFFIX}"
        self._identity = identity
        self._seed = seed
        self._spool = spool
        self._every = every
        self._clock = clock
        self._written = 0

    async def watch(self) -> None:
        """Exports new messages until cancelled. The folder may disappear and come back: it may be a USB stick."""
        while True:
            await asyncio.sleep(self._every.total_seconds())
            newest = self._spool.newest
            if newest in (0, self._written) or not self._file.parent.is_dir():
                continue
            try:
                await self._write()
            except OSError as error:
                log.warning("cannot write %s: %s", self._file, error)
            else:
                self._written = newest

    async def _write(self) -> None:
        last = 0
        with writing(self._file, self._identity, self._seed, self._clock()) as add:
            while waiting := self._spool.pending(_AT_ONCE, last):
                last = waiting[-1].id
                await asyncio.to_thread(_add, add, waiting)


def _add(add: Add, waiting: Sequence[Spooled]) -> None:
    for one in waiting:
        add(ResultMessage(subject=one.subject, headers=one.headers, payload=one.payload.decode()))

"""Exports unsent messages as a sealed file into the bundle folder, to be carried to a network."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from pathlib import Path

from slmops.contracts import subjects
from slmops.contracts.errors import InvalidBundle
from slmops.contracts.plan import Identity
from slmops.contracts.results import RESULTS_SUFFIX, ResultMessage
from slmops.gateway.report.spool import Spool
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

    def move_to(self, identity: Identity) -> None:
        """Seals under this identity from the next file on."""
        self._identity = identity

    async def watch(self) -> None:
        """Exports new messages until cancelled. The folder may disappear and come back: it may be a USB stick."""
        while True:
            await asyncio.sleep(self._every.total_seconds())
            await asyncio.to_thread(self.export)

    def export(self) -> None:
        """Writes the file if the spool has new messages and the folder is there. An error of the disk is logged."""
        newest = self._spool.newest
        if newest in (0, self._written) or not self._file.parent.is_dir():
            return
        try:
            with writing(self._file, self._identity, self._seed, self._clock()) as add:
                self._add_all(add)
        except OSError as error:
            log.warning("cannot write %s: %s", self._file, error)
        else:
            self._written = newest

    def _add_all(self, add: Add) -> None:
        last = 0
        while waiting := self._spool.pending(_AT_ONCE, last):
            last = waiting[-1].id
            for one in waiting:
                message = ResultMessage(subject=one.subject, headers=one.headers, payload=one.payload.decode())
                try:
                    add(message)
                except InvalidBundle as error:  # one message must not make the others unreadable
                    log.warning(
                        "left a message for %s out of %s: %s", subjects.template(one.subject), self._file, error
                    )

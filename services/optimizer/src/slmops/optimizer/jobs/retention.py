"""Removes old cached results, and the work folders of interrupted jobs that were not resumed.

The server removes the states of jobs when they expire (`kit.bus.provision`), and the registry collects blobs.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Final

from slmops.contracts.errors import TemporaryError
from slmops.kit.clock import Clock
from slmops.optimizer.jobs.workspace import Workspace
from slmops.optimizer.store import Results

log = logging.getLogger(__name__)
_EVERY: Final = timedelta(hours=6)


class Retention:
    """`cache_kept`: since a result was written or used last. `work_kept`: since a worker last had the folder."""

    def __init__(
        self, results: Results, workspace: Workspace, cache_kept: timedelta, work_kept: timedelta, clock: Clock
    ) -> None:
        self._results, self._workspace, self._clock = results, workspace, clock
        self._cache_kept, self._work_kept = cache_kept, work_kept

    async def run(self) -> None:
        """Enforces it every 6 hours, until cancelled. Several workers may do so at once."""
        while True:
            try:
                await self.enforce()
            except (TemporaryError, OSError) as error:
                log.warning("could not remove old results, will retry: %s", error)
            await asyncio.sleep(_EVERY.total_seconds())

    async def enforce(self) -> None:
        """Removes what is too old now. Raises `Unreachable`."""
        now = self._clock()
        folders = await asyncio.to_thread(self._workspace.discard_old, now - self._work_kept)
        results = await self._results.forget(now - self._cache_kept)
        if folders or results:
            log.info("removed %s cached results and %s old work folders", results, folders)

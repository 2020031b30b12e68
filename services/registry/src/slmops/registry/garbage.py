"""Garbage collection in this order: read the store's clock, find live blobs, list all blobs, sweep the rest.

The order makes it safe. A service that puts a blob names it in an event within the grace period. So a blob that nobody
wrote or claimed during the grace period before the clock was read either has a name that the marker finds, or never
gets one. The sweep checks again whether somebody has claimed the blob meanwhile (`slmops.kit.objects.sweeps`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta

from slmops.contracts.commands import CollectGarbage, GarbageReport, Share
from slmops.contracts.descriptor import Digest
from slmops.kit.objects.collecting import SWEEP_OF, Collecting
from slmops.kit.objects.s3 import Stored

log = logging.getLogger("slmops.registry")
SECOND = timedelta(seconds=1)
"""S3 rounds times down to seconds, so an object that seems a second old may have been written just now."""
Mark = Callable[[datetime], Awaitable[Collection[Digest]]]
"""Returns all named blobs, except those of versions retired before the given time."""


class Collector:
    def __init__(self, store: Collecting, mark: Mark) -> None:
        self._store = store
        self._mark = mark

    async def collect(self, command: CollectGarbage) -> GarbageReport:
        """Runs a collection. Raises `Unreachable` and the marker's errors; blobs removed before that were garbage."""
        now = await self._store.now()
        before = now - command.grace - SECOND
        live = frozenset(await self._mark(before))
        blobs, claims, uploads = await asyncio.gather(self._store.blobs(), self._store.claims(), self._store.uploads())
        old = {digest for digest in blobs.keys() - live if _wanted(digest, blobs, claims) < before}
        forgotten = [upload for upload in uploads if upload.modified < before]
        report = GarbageReport(
            live=_share(blobs[digest] for digest in blobs.keys() & live),
            young=_share(blobs[digest] for digest in blobs.keys() - live - old),
            garbage=_share(blobs[digest] for digest in old),
            uploads=_share(forgotten),
            missing=len(live - blobs.keys()),
        )
        if report.missing:
            log.error(
                "%s referenced blobs are missing from the store, for example %s",
                report.missing,
                min(live - blobs.keys()),
            )
        if command.dry_run:
            return report
        await self._store.end_dead_sweeps(now)
        await self._store.remove_uploads([upload.key for upload in forgotten])
        await self._store.abort_parts(before)
        removed = await self._sweep(sorted(old)[: command.at_most], live, before)
        stale = [digest for digest, claim in claims.items() if claim.modified < before and digest not in old]
        await self._sweep(sorted(stale)[: command.at_most], live, before)
        await self._store.remove_marks(before)
        return report.model_copy(update={"removed": _share(blobs[digest] for digest in removed)})

    async def _sweep(self, condemned: list[Digest], live: Collection[Digest], before: datetime) -> list[Digest]:
        removed: list[Digest] = []
        for start in range(0, len(condemned), SWEEP_OF):
            part = await self._store.sweep(condemned[start : start + SWEEP_OF], live, before)
            if part:
                log.info("removed the blobs %s", ", ".join(part))
            removed += part
        return removed


def _wanted(digest: Digest, blobs: Mapping[Digest, Stored], claims: Mapping[Digest, Stored]) -> datetime:
    """Returns when the blob was last written or claimed."""
    blob, claim = blobs[digest], claims.get(digest)
    return max(blob.modified, claim.modified) if claim else blob.modified


def _share(stored: Iterable[Stored]) -> Share:
    sizes = [one.size_bytes for one in stored]
    return Share(objects=len(sizes), size_bytes=sum(sizes))

"""Verifies stored blobs: reads them again, finds missing ones, says what needs them, and restores what can be restored.

Costs per part: the reading, and for each 10 minutes of verification one run of the marker, whose memory grows with the
number of named blobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from slmops.contracts.commands import Damage, DamagedBlob, Share, StorageReport, VerifyStorage
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import DigestMismatch, NotFound
from slmops.kit.objects.store import Objects
from slmops.kit.objects.verifying import Finding, Pace, Verifying
from slmops.registry.domain.live_blobs import BlobReference, needed_by, restoring
from slmops.registry.marker import Marker

_LIVE_FOR_S: Final = timedelta(minutes=10).total_seconds()
DAMAGED_AT_MOST: Final = 1000
"""Damaged blobs in one part, so that its report fits into an answer. The rest of the part's missing blobs is counted in
the next verification."""


class Verifier:
    """Verifies in parts. `store` reads, `objects` restores, `marker` knows which blobs are named and by what."""

    def __init__(self, store: Verifying, objects: Objects, marker: Marker, clock: Callable[[], datetime]) -> None:
        self._store, self._objects, self._marker, self._clock = store, objects, marker, clock
        self._named: frozenset[Digest] = frozenset()
        self._named_at = float("-inf")

    async def verify(self, command: VerifyStorage) -> StorageReport:
        """Verifies one part. Raises `StoreUnreachable`, `Unreachable`."""
        listed = await self._store.page(command.after, command.at_most)
        pace, read, last = Pace(command.bytes_per_s), Share(), command.after
        findings: dict[Digest, Finding] = {}
        for digest in listed:
            finding = await self._store.check(digest, pace)
            if finding.damage:
                findings[digest] = finding
            size_bytes = finding.copy.size_bytes if finding.copy else 0
            read, last = Share(objects=read.objects + 1, size_bytes=read.size_bytes + size_bytes), digest
            if read.size_bytes >= command.at_most_bytes or len(findings) >= DAMAGED_AT_MOST:
                break
        complete = len(listed) < command.at_most and last == next(reversed(listed), command.after)
        for digest in await self._missing(command.after, None if complete else last, frozenset(listed)):
            findings.setdefault(digest, Finding(Damage.MISSING))
        damaged = await self._damaged(findings, repair=command.repair)
        return StorageReport(checked=read, damaged=damaged, after=None if complete else last)

    async def needed(self, digests: Sequence[Digest]) -> list[Digest]:
        """Returns those of the digests that something names and the store does not have, or only in quarantine."""
        named = await self._live()
        return [one for one in dict.fromkeys(digests) if one in named and not await self._store.usable(one)]

    async def _missing(self, after: Digest | None, until: Digest | None, listed: frozenset[Digest]) -> list[Digest]:
        """Returns the named blobs between two digests that the store does not have."""
        absent = sorted(
            one
            for one in await self._live() - listed
            if (after is None or one > after) and (until is None or one <= until)
        )
        # Some were put after the listing.
        return [one for one in absent[:DAMAGED_AT_MOST] if not await self._objects.exists(one)]

    async def _live(self) -> frozenset[Digest]:
        if time.monotonic() - self._named_at > _LIVE_FOR_S:
            self._named = frozenset(await self._marker.named(self._clock()))
            self._named_at = time.monotonic()
        return self._named

    async def _damaged(self, findings: dict[Digest, Finding], *, repair: bool) -> tuple[DamagedBlob, ...]:
        if not findings:
            return ()
        references = await self._marker.referrers(findings, self._clock())
        return tuple([await self._one(digest, findings[digest], references[digest], repair) for digest in findings])

    async def _one(
        self, digest: Digest, finding: Finding, references: Sequence[BlobReference], repair: bool
    ) -> DamagedBlob:
        assert finding.damage is not None
        if repair:
            await self._store.mark(digest, finding)
        restored = repair and await self._restored(digest)
        return DamagedBlob(
            digest=digest,
            damage=finding.damage,
            size_bytes=finding.copy.size_bytes if finding.copy else 0,
            needed_by=needed_by(references),
            quarantined=repair and finding.copy is not None and not restored,
            restored=restored,
            fix="" if restored else restoring(references),
        )

    async def _restored(self, digest: Digest) -> bool:
        """Restores a blob from an upload with the same bytes. Returns whether there was one."""
        for upload, size_bytes in await self._store.uploads_of(digest):
            try:
                await self._objects.adopt(upload, digest, size_bytes)
            except (DigestMismatch, NotFound):
                continue
            return True
        return False

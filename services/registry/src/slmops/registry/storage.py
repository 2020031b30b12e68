"""The registry's work on the object store: commands of operators, and the chores that do the same by schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from prometheus_client import Counter, Gauge
from pydantic import AwareDatetime, BaseModel, ConfigDict

from slmops.contracts.commands import (
    BeginRestore,
    CollectGarbage,
    Damage,
    DamagedBlob,
    DescribeStorage,
    GarbageReport,
    RestoreBlobs,
    RestoredBlobs,
    Share,
    StorageReport,
    StorageStatus,
    UploadTicket,
    VerifyStorage,
)
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidMessage
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal
from slmops.kit.objects.store import Objects
from slmops.kit.objects.verifying import Verifying
from slmops.kit.sizes import size_text
from slmops.registry import store
from slmops.registry.chores import Chore
from slmops.registry.garbage import Collector
from slmops.registry.settings import Settings
from slmops.registry.verification import Verifier

log = logging.getLogger("slmops.registry")
COLLECT, VERIFY, FORGET = "collect garbage", "verify the store", "forget handled events"
_SLICE: Final = timedelta(hours=1)
_PART = 200
_PART_BYTES = 1 << 28
_NAMED = 100
_HANDLED_FOR = timedelta(days=100)
"""Longer than dead letters are kept, which are the oldest messages that may come again. Handling one twice is
harmless."""
REMOVED = Counter("slmops_garbage_removed_bytes", "Bytes of blobs that scheduled collections removed")
VERIFIED = Counter("slmops_blobs_verified_bytes", "Bytes of blobs that the scheduled verification read")
DAMAGED = Gauge("slmops_blobs_damaged", "Blobs that the store lost or holds with other bytes", ["damage"])


class Collected(BaseModel):
    """The state of the scheduled collection."""

    model_config = ConfigDict(extra="ignore")

    at: AwareDatetime | None = None
    removed: Share = Share()


class Progress(BaseModel):
    """The state of the scheduled verification. `missing` counts in the current run, `missing_before` in the last
    one."""

    model_config = ConfigDict(extra="ignore")

    began: AwareDatetime | None = None
    after: Digest | None = None
    checked: Share = Share()
    missing: tuple[Digest, ...] = ()
    missing_before: tuple[Digest, ...] = ()
    ended: AwareDatetime | None = None


def position(digest: Digest | None) -> float:
    """Returns the part of all digests that is not greater, from 0 to 1. Digests are spread evenly."""
    return int(digest.removeprefix("sha256:")[:8], 16) / (1 << 32) if digest else 0.0


class Storage:
    """Handles the commands about blobs and does the chores. `new_upload` returns an unguessable id."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        objects: Objects,
        verifying: Verifying,
        collector: Collector,
        verifier: Verifier,
        clock: Clock,
        new_upload: Callable[[], str],
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._objects = objects
        self._verifying = verifying
        self._collector = collector
        self._verifier = verifier
        self._clock = clock
        self._new_upload = new_upload

    # ---- commands -----------------------------------------------------------------------------------------

    async def collect_garbage(self, command: CollectGarbage) -> GarbageReport:
        """Runs a collection. Raises `InvalidMessage` for a too short grace period, `FactsMissing`, `Unreachable`."""
        if command.grace < self._settings.shortest_grace:
            raise InvalidMessage(
                f"a grace period of {command.grace} is shorter than {self._settings.shortest_grace}",
                where="grace",
                fix="Use a longer one: every push, optimization and packaging must finish within it.",
            )
        return await self._collector.collect(command)

    async def verify(self, command: VerifyStorage) -> StorageReport:
        return await self._verifier.verify(command)

    async def begin_restore(self, command: BeginRestore) -> UploadTicket:
        upload = self._new_upload()
        needed = await self._verifier.needed(command.digests)
        return UploadTicket(
            upload=upload, urls={one: await self._objects.presigned_upload(upload, one) for one in needed}
        )

    async def restore(self, command: RestoreBlobs) -> RestoredBlobs:
        """Adopts uploads. Those before an error stay restored."""
        needed = frozenset(await self._verifier.needed([blob.digest for blob in command.blobs]))
        blobs = [blob for blob in command.blobs if blob.digest in needed]
        for blob in blobs:
            await self._objects.adopt(command.upload, blob.digest, blob.size)
        log.info("restored %s blobs: %s", len(blobs), ", ".join(blob.digest for blob in blobs))
        return RestoredBlobs(restored=tuple(blob.digest for blob in blobs))

    async def describe(self, _: DescribeStorage) -> StorageStatus:
        found = await self._journal.read(store.chores)
        progress = Progress.model_validate_json(found.get(VERIFY, ("{}", ""))[0])
        collected = Collected.model_validate_json(found.get(COLLECT, ("{}", ""))[0])
        corrupt = await self._verifying.quarantined()
        absent = dict.fromkeys((*progress.missing, *progress.missing_before))
        missing = [one for one in absent if not await self._objects.exists(one)]
        return StorageStatus(
            corrupt=len(corrupt),
            missing=len(missing),
            damaged=tuple([*corrupt, *missing][:_NAMED]),
            verified=progress.checked,
            verification_began=progress.began,
            verification_ended=progress.ended,
            collected_at=collected.at,
            collected=collected.removed,
            problems={name: problem for name, (_, problem) in found.items() if problem},
        )

    # ---- chores -------------------------------------------------------------------------------------------

    def chores(self) -> list[Chore]:
        """Returns the scheduled work that the settings ask for."""
        found = [Chore(FORGET, timedelta(days=1), self._forget)]
        if every := self._settings.collect_every:
            found.append(Chore(COLLECT, every, lambda _: self._collect(every)))
        if within := self._settings.verify_within:
            found.append(Chore(VERIFY, min(_SLICE, within), lambda state: self._verify(state, within)))
        return found

    async def _collect(self, every: timedelta) -> tuple[str, timedelta]:
        """Removes all garbage."""
        command, removed, report = CollectGarbage(grace=self._settings.collect_grace), Share(), None
        while report is None or (report.removed and report.removed.objects >= command.at_most):
            report = await self._collector.collect(command)
            part = report.removed or Share()
            removed = Share(objects=removed.objects + part.objects, size_bytes=removed.size_bytes + part.size_bytes)
            REMOVED.inc(part.size_bytes)
        log.info(
            "collected garbage: removed %s blobs (%s) and %s unregistered uploads; kept %s blobs",
            *(removed.objects, size_text(removed.size_bytes), report.uploads.objects),
            report.live.objects + report.young.objects,
        )
        return Collected(at=self._clock(), removed=removed).model_dump_json(), every

    async def _verify(self, state: str, within: timedelta) -> tuple[str, timedelta]:
        """Verifies as much as keeps the pace: after a share of the period the same share of all digests."""
        now, progress = self._clock(), Progress.model_validate_json(state)
        began = progress.began
        if began is None or (progress.ended and progress.ended >= began):
            progress, began = Progress(began=now, ended=progress.ended, missing_before=progress.missing), now
        slice_ = min(_SLICE, within / 24)
        wanted = (now + slice_ - began) / within
        rate, read = max(1 << 16, self._settings.verify_bytes_per_hour // 3600), 0
        budget = self._settings.verify_bytes_per_hour * (slice_ / _SLICE)
        while position(progress.after) < wanted and read < budget:
            command = VerifyStorage(
                after=progress.after, at_most=_PART, at_most_bytes=_PART_BYTES, bytes_per_s=rate, repair=True
            )
            report = await self._verifier.verify(command)
            progress, read = _noted(progress, report), read + report.checked.size_bytes
            if report.after is None:
                progress.ended = max(self._clock(), began)
                break
        await self._measure(progress)
        if progress.after is not None:
            return progress.model_dump_json(), slice_
        log.info("verified all %s blobs of the store", progress.checked.objects)
        return progress.model_dump_json(), max(slice_, began + within - now)

    async def _measure(self, progress: Progress) -> None:
        DAMAGED.labels(Damage.CORRUPT).set(len(await self._verifying.quarantined()))
        DAMAGED.labels(Damage.MISSING).set(len(set(progress.missing) | set(progress.missing_before)))

    async def _forget(self, _: str) -> tuple[str, timedelta]:
        while await self._journal.forget_consumed(self._clock() - _HANDLED_FOR):
            pass
        return "{}", timedelta(days=1)


def _noted(progress: Progress, report: StorageReport) -> Progress:
    """Returns the progress after a part."""
    VERIFIED.inc(report.checked.size_bytes)
    for blob in report.damaged:
        _log(blob)
    missing = [one.digest for one in report.damaged if one.damage is Damage.MISSING and not one.restored]
    checked = Share(
        objects=progress.checked.objects + report.checked.objects,
        size_bytes=progress.checked.size_bytes + report.checked.size_bytes,
    )
    return progress.model_copy(
        update={"after": report.after, "checked": checked, "missing": (*progress.missing, *missing)[:_NAMED]}
    )


def _log(blob: DamagedBlob) -> None:
    if blob.restored:
        log.warning("restored the blob %s, which was %s", blob.digest, blob.damage)
        return
    needed = ", ".join(blob.needed_by) or "nothing"
    log.error("the blob %s is %s; needed by %s. %s", blob.digest, blob.damage, needed, blob.fix)


def routes(bus: Bus, storage: Storage) -> None:
    bus.serve(CollectGarbage, storage.collect_garbage, at_once=1)
    bus.serve(VerifyStorage, storage.verify, at_once=1)
    bus.serve(BeginRestore, storage.begin_restore)
    bus.serve(RestoreBlobs, storage.restore, at_once=1)
    bus.serve(DescribeStorage, storage.describe)

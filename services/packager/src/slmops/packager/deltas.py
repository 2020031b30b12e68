"""Deltas to a new package from what the fleet runs: planned when it is published, made one after the other.

A delta is a convenience: one that cannot be made is told and left out, and gateways fetch the whole files.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import PermanentError
from slmops.contracts.events import PackageDeltaPublished, PackagePublished
from slmops.contracts.manifest import DELTA, Manifest, layers_by_path
from slmops.kit.clock import Clock
from slmops.kit.delta import make
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.objects.store import Objects
from slmops.kit.tracing import span
from slmops.packager import store
from slmops.packager.assemble import disk_full
from slmops.packager.domain import offered_no_more
from slmops.packager.routes import bases_of, new_bytes

log = logging.getLogger("slmops.packager")
PATIENCE_S = 10
"""Of a gateway that asks while a delta is being made: seconds to wait are cheaper than the whole files."""


@dataclass(frozen=True)
class Bounds:
    """`most` deltas for a package; one that saves less than `saves` of what it replaces is not kept; of all that
    there are, the oldest go when they have more than `space_bytes`."""

    most: int = 3
    saves: float = 0.3
    space_bytes: int = 20_000_000_000


class DeltaPlanner:
    """Works in `work`, which is its own: emptied at the start."""

    def __init__(self, journal: Journal, objects: Objects, work: Path, bounds: Bounds, clock: Clock) -> None:
        self._journal = journal
        self._objects = objects
        self._work = work
        self._bounds = bounds
        self._clock = clock
        self._under_way: dict[Digest, asyncio.Event] = {}

    async def open(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._work, ignore_errors=True)

    async def settled(self, target: Digest) -> None:
        """When no delta to that package is being made here any more, or after `PATIENCE_S`."""
        if (done := self._under_way.get(target)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), PATIENCE_S)

    async def plan(self, target: PackagePublished) -> None:
        """As `_plan`, for `settled` to see."""
        done = self._under_way.setdefault(target.manifest.digest, asyncio.Event())
        try:
            await self._plan(target)
        finally:
            self._under_way.pop(target.manifest.digest, None)
            done.set()

    async def _plan(self, target: PackagePublished) -> None:
        """Make and publish the deltas that the fleet needs for `target` and that are not there. Raises `DiskFull`,
        and what storage and journal raise while they cannot be reached."""
        manifest = target.manifest.digest
        running, known, made = await self._journal.read(
            lambda connection: (
                store.running(connection),
                {p.manifest.digest: p for p in store.packages(connection) if p.model == target.model},
                {d.base for d in store.deltas_of(connection, target.model) if d.target == manifest},
            )
        )
        if manifest not in known:
            return  # withdrawn meanwhile
        for base in bases_of(running, manifest, known.keys(), self._bounds.most):
            if base in made:
                continue  # by a delivery before this one, which was interrupted
            try:
                await self._between(known[base], target)
            except PermanentError as error:
                log.warning("no delta to %s:%s from %s: %s", target.model, target.version, base, error)

    async def _between(self, base: PackagePublished, target: PackagePublished) -> None:
        before, after = [await self._objects.get_manifest(package.manifest.digest) for package in (base, target)]
        full = new_bytes(before, after)
        with span("delta", model=target.model, base=base.version, version=target.version):
            delta = await self._made(before, after, full)
        if delta is None:
            log.info("a delta to %s:%s from %s saves too little", target.model, target.version, base.version)
            return
        event = PackageDeltaPublished(
            model=target.model,
            version=target.version,
            base=base.manifest.digest,
            target=target.manifest.digest,
            delta=delta,
            full_bytes=full,
            at=self._clock(),
        )
        await self._journal.transact(lambda unit: self._publish(unit, event, target.profile))
        log.info("%s:%s from %s: %d bytes, not %d", event.model, event.version, base.version, delta.size, full)

    def _publish(self, unit: UnitOfWork, event: PackageDeltaPublished, profile: str) -> None:
        stream = store.stream(event.model, event.version, profile)
        events, version = unit.load(stream)
        there = [store.package(unit.connection, manifest) for manifest in (event.base, event.target)]
        made = any(isinstance(e, PackageDeltaPublished) and e.base == event.base for e in events)
        if all(there) and not made:
            unit.append(stream, version, [event])
            withdraw_deltas(unit, store.oldest_deltas(unit.connection, self._bounds.space_bytes), self._clock())

    async def _made(self, before: Manifest, after: Manifest, full: int) -> Descriptor | None:
        """In the store, if it is worth it."""
        with disk_full(self._work):
            self._work.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._work))
        try:
            for manifest, side in ((before, folder / "base"), (after, folder / "target")):
                await self._lay_out(manifest, side)
            out = folder / "delta"
            with disk_full(folder):
                stat = await asyncio.to_thread(make, folder / "base", folder / "target", out)
            if stat.size_bytes > (1 - self._bounds.saves) * full:
                return None
            return await self._objects.put_file(out, DELTA)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _lay_out(self, manifest: Manifest, folder: Path) -> None:
        """By paths, for the same path in both packages is where likeness is looked for first."""
        for path, layer in layers_by_path(manifest).items():
            await self._objects.get_file(layer.digest, folder / path)


def withdraw_deltas(unit: UnitOfWork, deltas: Iterable[PackageDeltaPublished], now: datetime) -> None:
    for event in offered_no_more(deltas, now):
        unit.emit(f"delta:{event.delta}", [event])

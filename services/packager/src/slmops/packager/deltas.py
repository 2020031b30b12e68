"""Makes deltas to a newly published package from the packages that the fleet runs, one after the other.

A delta is an optimization. If one cannot be made, the packager logs it, and gateways fetch the whole files instead.
"""

from __future__ import annotations

import asyncio
import logging
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
from slmops.packager.domain import delta_withdrawals
from slmops.packager.routes import bases_of, new_bytes
from slmops.packager.workspace import Workspace

log = logging.getLogger("slmops.packager")
MAX_WAIT_S = 10
"""How long a fetch waits for a delta that is being made: a short wait costs a gateway less than the whole files."""


@dataclass(frozen=True)
class Bounds:
    """Limits for deltas.

    `most` is the number of deltas per package. A delta must save at least the share `saves` of the bytes it replaces.
    When all deltas together exceed `space_bytes`, the oldest are withdrawn.
    """

    most: int = 3
    saves: float = 0.3
    space_bytes: int = 20_000_000_000


class DeltaPlanner:
    """Makes deltas in the folder `work`, which nothing else may use: `open` empties it."""

    def __init__(self, journal: Journal, objects: Objects, work: Path, bounds: Bounds, clock: Clock) -> None:
        self._journal = journal
        self._objects = objects
        self._workspace = Workspace(work)
        self._bounds = bounds
        self._clock = clock
        self._in_progress: dict[Digest, asyncio.Event] = {}

    async def open(self) -> None:
        await self._workspace.clear()

    async def wait_until_made(self, target: Digest) -> None:
        """Returns when no delta to that package is being made, at the latest after `MAX_WAIT_S`."""
        if (done := self._in_progress.get(target)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), MAX_WAIT_S)

    async def make_all(self, target: PackagePublished) -> None:
        """Makes and publishes the deltas to `target` that the fleet needs and that do not exist yet.

        Raises `DiskFull`, and what the object store and the journal raise while they cannot be reached.
        """
        done = self._in_progress.setdefault(target.manifest.digest, asyncio.Event())
        try:
            await self._make_all(target)
        finally:
            self._in_progress.pop(target.manifest.digest, None)
            done.set()

    async def _make_all(self, target: PackagePublished) -> None:
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
                continue  # an earlier, interrupted delivery of this message made it
            try:
                await self._make_one(known[base], target)
            except PermanentError as error:
                log.warning("cannot make a delta from %s to %s:%s: %s", base, target.model, target.version, error)

    async def _make_one(self, base: PackagePublished, target: PackagePublished) -> None:
        before, after = [await self._objects.get_manifest(package.manifest.digest) for package in (base, target)]
        full = new_bytes(before, after)
        with span("delta", model=target.model, base=base.version, version=target.version):
            delta = await self._build(before, after, full)
        if delta is None:
            log.info("the delta %s:%s -> %s saves too little", target.model, base.version, target.version)
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
        log.info(
            "the delta %s:%s -> %s has %d bytes instead of %d",
            event.model,
            base.version,
            event.version,
            delta.size,
            full,
        )

    def _publish(self, unit: UnitOfWork, event: PackageDeltaPublished, profile: str) -> None:
        stream = store.stream(event.model, event.version, profile)
        events, version = unit.load(stream)
        packages = [store.package(unit.connection, manifest) for manifest in (event.base, event.target)]
        made = any(isinstance(e, PackageDeltaPublished) and e.base == event.base for e in events)
        if all(packages) and not made:
            unit.append(stream, version, [event])
            withdraw_deltas(unit, store.oldest_deltas(unit.connection, self._bounds.space_bytes), self._clock())

    async def _build(self, before: Manifest, after: Manifest, full: int) -> Descriptor | None:
        """Makes a delta and stores it; None when it saves too little."""
        async with self._workspace.folder() as folder:
            for manifest, side in ((before, folder / "base"), (after, folder / "target")):
                await self._lay_out(manifest, side)
            out = folder / "delta"
            stat = await self._workspace.run(lambda: make(folder / "base", folder / "target", out))
            if stat.size_bytes > (1 - self._bounds.saves) * full:
                return None
            return await self._objects.put_file(out, DELTA)

    async def _lay_out(self, manifest: Manifest, folder: Path) -> None:
        """Writes the layers by path: the delta compares files with the same path first."""
        for path, layer in layers_by_path(manifest).items():
            await self._objects.get_file(layer.digest, folder / path)


def withdraw_deltas(unit: UnitOfWork, deltas: Iterable[PackageDeltaPublished], now: datetime) -> None:
    for event in delta_withdrawals(deltas, now):
        unit.emit(f"delta:{event.delta}", [event])

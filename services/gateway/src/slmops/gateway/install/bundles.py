"""Updates without a network: a folder into which somebody puts bundles, and a bundle that answers like the packager.

No second verifier: metadata, plan and package of a bundle go through what those of the network go through. Whatever is
wrong with one, what was trusted and installed before stays, and what serves goes on serving.
"""

from __future__ import annotations

import asyncio
import logging
from base64 import b64encode
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from slmops.contracts.bundle import BUNDLE_SUFFIX, PLAN_NAME, BundledPackage, blob_name, metadata_name
from slmops.contracts.commands import Command, FetchMetadata, FetchPackage, MetadataFile, PackageFiles
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidBundle, NotFound, PermanentError, TemporaryError, Unreachable
from slmops.contracts.manifest import (
    MANIFEST_LIMIT_BYTES,
    MANIFEST_PATH,
    SIGNATURE_PATH,
    DeltaStep,
    Manifest,
    PackageFile,
    layers_by_path,
)
from slmops.contracts.plan import Plan
from slmops.contracts.signed import PLAN_LIMIT_BYTES
from slmops.contracts.trust import METADATA_LIMIT_BYTES, Attack, refused
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.install.download import blob_path
from slmops.gateway.install.trust import Trust
from slmops.gateway.twin import Twin
from slmops.kit.atomic_write import atomic_write
from slmops.kit.bundle import BundleFile

log = logging.getLogger(__name__)
R = TypeVar("R", bound=BaseModel)
_NOWHERE = "bundle:"
"""In the place of a URL. What is asked for has been laid among the blobs before, and needs none."""


class BundleSource:
    """Answers `FetchMetadata` and `FetchPackage` out of a bundle; blobs go to `blobs`, each checked on its way."""

    def __init__(self, bundle: BundleFile, blobs: Path) -> None:
        self._bundle = bundle
        self._blobs = blobs

    async def request(self, command: Command[R]) -> R:
        """Raises `NotFound` for a root that is not there, `TrustRefused` for other metadata that is missing,
        `DiskFull`, and `TemporaryError` while the bundle does not hold the package or cannot be read."""
        answer: Any
        match command:
            case FetchMetadata():
                answer = await asyncio.to_thread(self._metadata, command.file)
            case FetchPackage():
                answer = await asyncio.to_thread(self._package, command.manifest, command.have)
            case _:
                raise NotFound(f"a bundle does not answer {command.name}", where=str(self._bundle.path))
        return answer  # type: ignore[no-any-return]

    def _metadata(self, file: str) -> MetadataFile:
        name = metadata_name(file)
        if name not in self._bundle and file.endswith(".root.json"):
            raise NotFound("there is no newer root", where=name)
        if name not in self._bundle:
            what = f"the bundle does not hold {file}, which its own state names"
            raise refused(Attack.MIX_AND_MATCH, what, where=str(self._bundle.path), fix="Export it again.")
        data = self._bundle.read(name, METADATA_LIMIT_BYTES)
        return MetadataFile(file=file, content=b64encode(data).decode())

    def _package(self, manifest: Digest, have: tuple[Digest, ...]) -> PackageFiles:
        try:
            found = next(one for one in self._bundle.index.packages if one.manifest.digest == manifest)
            with raise_disk_full("for what the bundle holds", self._blobs):
                return self._laid_out(found, have)
        except StopIteration as error:
            raise self._lacks(manifest) from error
        except (InvalidBundle, OSError) as error:
            # It was whole when it was taken: the stick was pulled out or is failing, which is no fault of the release.
            where = str(self._bundle.path)
            raise Unreachable(f"the bundle can no longer be read: {error}", where=where) from error

    def _laid_out(self, package: BundledPackage, have: tuple[Digest, ...]) -> PackageFiles:
        manifest = Manifest.decode(self._bundle.read(blob_name(package.manifest.digest), MANIFEST_LIMIT_BYTES))
        layers = layers_by_path(manifest)
        route = package.route if package.route and package.route[0].base in have else ()
        for blob in (package.manifest, package.signature, *layers.values(), *(step.delta for step in route)):
            self._lay(blob)
        missing = [layer.digest for layer in layers.values() if not blob_path(self._blobs, layer.digest).exists()]
        if missing and not route:
            raise self._lacks(missing[0])
        return PackageFiles(
            manifest=_file(MANIFEST_PATH, package.manifest),
            signature=_file(SIGNATURE_PATH, package.signature),
            files=tuple(_file(path, layer) for path, layer in layers.items()),
            route=tuple(DeltaStep(**step.model_dump(), url=_NOWHERE) for step in route),
        )

    def _lay(self, blob: Descriptor) -> None:
        path = blob_path(self._blobs, blob.digest)
        if path.exists() or blob_name(blob.digest) not in self._bundle:
            return
        self._blobs.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out, self._bundle.chunks(blob_name(blob.digest)) as (_, chunks):
            for chunk in chunks:
                out.write(chunk)

    def _lacks(self, what: Digest) -> TemporaryError:
        return TemporaryError(
            "the bundle does not hold what this gateway lacks",
            where=what,
            fix="Export it without --from, so that it holds the whole files.",
            delay=timedelta(minutes=1),
        )


class Bundles:
    """Takes each bundle that appears in `folder`, once. `source` answers out of the last that was accepted."""

    def __init__(self, folder: Path, blobs: Path, blueprint: str, trust: Trust, twin: Twin, every: timedelta) -> None:
        self._folder = folder
        self._blobs = blobs
        self._blueprint = blueprint
        self._trust = trust
        self._twin = twin
        self._every = every
        self._seen: set[tuple[str, int, int]] = set()
        self.source: BundleSource | None = None

    async def watch(self) -> None:
        """Runs until cancelled. The folder may come and go: it may be a stick."""
        while True:
            for path, state in await asyncio.to_thread(self._new):
                await self._look(path, state)
            await asyncio.sleep(self._every.total_seconds())

    def _new(self) -> list[tuple[Path, tuple[str, int, int]]]:
        """In the order in which they came."""
        found = []
        try:
            for path in self._folder.glob(f"*{BUNDLE_SUFFIX}"):
                stat = path.stat()
                state = (path.name, stat.st_mtime_ns, stat.st_size)
                if not path.name.startswith(".") and state not in self._seen:
                    found.append((path, state))
        except OSError as error:
            log.warning("%s cannot be read: %s", self._folder, error)
        return sorted(found, key=lambda one: one[1][1])

    async def _look(self, path: Path, state: tuple[str, int, int]) -> None:
        try:
            plan = await self._take(path)
            log.info("%s is taken: generation %d of the plan of %s", path, plan.generation, plan.blueprint)
        except TemporaryError as error:
            log.warning("%s waits: %s", path, error)
            return
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            return
        except PermanentError as error:
            log.error("%s is refused", path)
            self._twin.refused(error)
        self._seen.add(state)

    async def _take(self, path: Path) -> Plan:
        """Metadata, then the plan, then whoever follows it. Raises `InvalidBundle`, `TrustRefused`, `OSError`."""
        bundle = await asyncio.to_thread(_checked, path)
        if bundle.index.blueprint != self._blueprint:
            what = f"this is a bundle for gateways of {bundle.index.blueprint}"
            raise refused(Attack.MIX_AND_MATCH, what, where=str(path))
        source = BundleSource(bundle, self._blobs)
        data = await asyncio.to_thread(bundle.read, PLAN_NAME, PLAN_LIMIT_BYTES)
        await self._trust.refresh(source)
        plan = await self._trust.plan(data, source)
        self.source = source
        await self._twin.adopt(plan)
        return plan


def _checked(path: Path) -> BundleFile:
    bundle = BundleFile(path)
    bundle.check()
    return bundle


def _file(path: str, descriptor: Descriptor) -> PackageFile:
    return PackageFile(path=path, descriptor=descriptor, url=_NOWHERE)

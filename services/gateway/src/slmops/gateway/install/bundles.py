"""Updates without a network: watches a folder for bundles, and serves metadata and packages from an accepted bundle.

Metadata, plan and package of a bundle pass the same verification as those from the network. If a bundle is rejected,
the trusted metadata, the installed releases and the serving release stay as they were.
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
from slmops.contracts.tuf_names import METADATA_LIMIT_BYTES, Attack, refused
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.install.download import blob_path
from slmops.gateway.twin import Twin
from slmops.kit.atomic_write import atomic_write
from slmops.kit.bundle import BundleFile

log = logging.getLogger(__name__)
R = TypeVar("R", bound=BaseModel)
_NO_URL = "bundle:"
"""Stands in for a URL. The files of a bundle are extracted to the blobs folder first, so none is downloaded."""


class BundleSource:
    """Answers `FetchMetadata` and `FetchPackage` from a bundle. Extracts blobs to `blobs` and verifies each."""

    def __init__(self, bundle: BundleFile, blobs: Path) -> None:
        self._bundle = bundle
        self._blobs = blobs

    async def request(self, command: Command[R]) -> R:
        """Answers the command from the bundle.

        Raises `NotFound` for a missing root, `TrustRefused` for other missing metadata, `DiskFull`, and
        `TemporaryError` while the bundle does not hold the package or cannot be read.
        """
        answer: Any
        match command:
            case FetchMetadata():
                answer = await asyncio.to_thread(self._metadata, command.file)
            case FetchPackage():
                answer = await asyncio.to_thread(self._package, command.manifest, command.have)
            case _:
                raise NotFound(f"a bundle cannot answer {command.name}", where=str(self._bundle.path))
        return answer  # type: ignore[no-any-return]

    def _metadata(self, file: str) -> MetadataFile:
        name = metadata_name(file)
        if name not in self._bundle and file.endswith(".root.json"):
            raise NotFound("there is no newer root", where=name)
        if name not in self._bundle:
            what = f"{file} is missing in the bundle although its metadata names it"
            raise refused(Attack.MIX_AND_MATCH, what, where=str(self._bundle.path), fix="Export the bundle again.")
        data = self._bundle.read(name, METADATA_LIMIT_BYTES)
        return MetadataFile(file=file, content=b64encode(data).decode())

    def _package(self, manifest: Digest, have: tuple[Digest, ...]) -> PackageFiles:
        try:
            found = next(one for one in self._bundle.index.packages if one.manifest.digest == manifest)
            with raise_disk_full("to extract the bundle", self._blobs):
                return self._extract_package(found, have)
        except StopIteration as error:
            raise self._missing_error(manifest) from error
        except (InvalidBundle, OSError) as error:
            # The bundle was intact when it was accepted. The stick was removed or fails; the release is not at fault.
            where = str(self._bundle.path)
            raise Unreachable(f"cannot read the bundle any more: {error}", where=where) from error

    def _extract_package(self, package: BundledPackage, have: tuple[Digest, ...]) -> PackageFiles:
        manifest = Manifest.decode(self._bundle.read(blob_name(package.manifest.digest), MANIFEST_LIMIT_BYTES))
        layers = layers_by_path(manifest)
        route = package.route if package.route and package.route[0].base in have else ()
        for blob in (package.manifest, package.signature, *layers.values(), *(step.delta for step in route)):
            self._extract_blob(blob)
        missing = [layer.digest for layer in layers.values() if not blob_path(self._blobs, layer.digest).exists()]
        if missing and not route:
            raise self._missing_error(missing[0])
        return PackageFiles(
            manifest=_file(MANIFEST_PATH, package.manifest),
            signature=_file(SIGNATURE_PATH, package.signature),
            files=tuple(_file(path, layer) for path, layer in layers.items()),
            route=tuple(DeltaStep(**step.model_dump(), url=_NO_URL) for step in route),
        )

    def _extract_blob(self, blob: Descriptor) -> None:
        path = blob_path(self._blobs, blob.digest)
        if path.exists() or blob_name(blob.digest) not in self._bundle:
            return
        self._blobs.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out, self._bundle.chunks(blob_name(blob.digest)) as (_, chunks):
            for chunk in chunks:
                out.write(chunk)

    def _missing_error(self, what: Digest) -> TemporaryError:
        return TemporaryError(
            "the bundle lacks a file that this gateway needs",
            where=what,
            fix="Export the bundle without --from, so that it contains the whole files.",
            delay=timedelta(minutes=1),
        )


class Bundles:
    """Processes each bundle that appears in `folder` once. `source` is the last accepted bundle."""

    def __init__(
        self, folder: Path, blobs: Path, blueprint: str, trust: Authorization, twin: Twin, every: timedelta
    ) -> None:
        self._folder = folder
        self._blobs = blobs
        self._blueprint = blueprint
        self._trust = trust
        self._twin = twin
        self._every = every
        self._seen: set[tuple[str, int, int]] = set()
        self.source: BundleSource | None = None

    def move_to(self, blueprint: str) -> None:
        """Accepts bundles for this blueprint from now on, also those that were rejected before."""
        self._blueprint, self.source = blueprint, None
        self._seen.clear()

    async def watch(self) -> None:
        """Processes new bundles until cancelled. The folder may disappear and come back: it may be a USB stick."""
        while True:
            for path, state in await asyncio.to_thread(self._new_bundles):
                await self._process(path, state)
            await asyncio.sleep(self._every.total_seconds())

    def _new_bundles(self) -> list[tuple[Path, tuple[str, int, int]]]:
        """Returns the unprocessed bundles, oldest first, each with its name, modification time and size."""
        found = []
        try:
            for path in self._folder.glob(f"*{BUNDLE_SUFFIX}"):
                stat = path.stat()
                state = (path.name, stat.st_mtime_ns, stat.st_size)
                if not path.name.startswith(".") and state not in self._seen:
                    found.append((path, state))
        except OSError as error:
            log.warning("cannot read %s: %s", self._folder, error)
        return sorted(found, key=lambda one: one[1][1])

    async def _process(self, path: Path, state: tuple[str, int, int]) -> None:
        try:
            plan = await self._accept(path)
            log.info("accepted %s: plan generation %d of %s", path, plan.generation, plan.blueprint)
        except TemporaryError as error:
            log.warning("could not process %s, retrying: %s", path, error)
            return
        except OSError as error:
            log.warning("cannot read %s: %s", path, error)
            return
        except PermanentError as error:
            log.error("rejected %s", path)
            self._twin.refused(error)
        self._seen.add(state)

    async def _accept(self, path: Path) -> Plan:
        """Verifies the bundle's metadata, then its plan, then follows the plan.

        Raises `InvalidBundle`, `TrustRefused`, `OSError`.
        """
        bundle = await asyncio.to_thread(_checked, path)
        if bundle.index.blueprint != self._blueprint:
            what = f"this bundle is for gateways of {bundle.index.blueprint}, not of {self._blueprint}"
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
    return PackageFile(path=path, descriptor=descriptor, url=_NO_URL)

"""Exports a package to the operator as presigned URLs of all its blobs, so no bytes pass through the packager."""

from __future__ import annotations

import asyncio

from slmops.contracts.commands import ExportPackage, PackageExport
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.manifest import FILE_PATH, MANIFEST_PATH, SIGNATURE_PATH, PackageFile
from slmops.kit.journal import Journal
from slmops.kit.objects.store import Objects
from slmops.packager import store
from slmops.packager.domain import newest_match

CONFIG_PATH = "config.json"


class Exporter:
    def __init__(self, journal: Journal, objects: Objects) -> None:
        self._journal = journal
        self._objects = objects

    async def export(self, command: ExportPackage) -> PackageExport:
        """Returns a presigned URL for every blob of the package. Raises `NotFound`, `InvalidMessage`."""
        package = newest_match(await self._journal.read(store.packages), command)
        manifest = await self._objects.get_manifest(package.manifest.digest)
        layers = [presigned_file(self._objects, layer.annotations[FILE_PATH], layer) for layer in manifest.layers]
        return PackageExport(
            **package.model_dump(exclude={"variant"}),
            manifest_file=await presigned_file(self._objects, MANIFEST_PATH, package.manifest),
            config_file=await presigned_file(self._objects, CONFIG_PATH, manifest.config),
            signature_file=await presigned_file(self._objects, SIGNATURE_PATH, package.signature),
            files=tuple(await asyncio.gather(*layers)),
        )


async def presigned_file(objects: Objects, path: str, descriptor: Descriptor) -> PackageFile:
    """Returns a file of a package with a presigned URL of its blob."""
    return PackageFile(path=path, descriptor=descriptor, url=await objects.presigned_get(descriptor.digest))

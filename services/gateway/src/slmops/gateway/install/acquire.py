"""Acquires the files of a release: downloads missing files, verifies the package and installs it in a slot."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

from slmops.contracts.commands import FetchPackage, PackageFiles
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import NotFound, NotReady
from slmops.contracts.manifest import DeltaStep
from slmops.contracts.plan import Release
from slmops.gateway.install.authorization import Authorization, ClientSource
from slmops.gateway.install.download import UrlSource, blob_path, fetch
from slmops.gateway.install.factory import Factory
from slmops.gateway.install.route import follow, missing_bytes
from slmops.gateway.install.slots import Slot, Slots
from slmops.kit.package import verify_package


class Acquirer:
    """Fetches packages without an S3 key: each file is downloaded by a short-lived URL, resumably, and verified."""

    def __init__(
        self,
        gateway_id: str,
        client: ClientSource,
        slots: Slots,
        blobs: Path,
        trusted_key: Path,
        trust: Authorization,
        factory: Factory | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._gateway_id = gateway_id
        self._client = client
        self._slots = slots
        self._blobs = blobs
        self._trusted_key = trusted_key
        self._trust = trust
        self._factory = factory
        self._tls = tls
        self.fetched_bytes = 0
        """Bytes downloaded for the last release: deltas and whole files, without manifest and signature."""

    async def acquire(self, release: Release) -> Slot:
        """Puts the release into the inactive slot and returns the slot.

        Raises what `Authorization.check`, `fetch` and `verify_package` raise.
        """
        digest = release.manifest.digest
        if (there := self._slots.candidate) is not None and there.digest == digest:
            await self._trust.check(release, installed=True)
            await self._verify(there.path, digest)
            return there
        # The factory release was trusted when the image was built, and must serve before there is a network.
        await self._trust.check(release, installed=self._factory_with(digest) is not None)
        files = await self._collect_files(digest)
        slot = await self._slots.disk.complete(partial(self._slots.install, digest, files))
        try:
            await self._verify(slot.path, digest)
        except Exception:
            await self._slots.disk.complete(self._slots.reject)
            raise
        return slot

    async def _collect_files(self, digest: Digest) -> list[tuple[Path, str]]:
        """Returns every file on this device with its path in the package. Downloads missing files."""
        if brought := self._factory_with(digest):
            return await asyncio.to_thread(brought.files)
        package = await self._request_package(digest)
        files = [package.manifest, package.signature, *package.files]
        urls = _urls(package)
        await asyncio.to_thread(self._blobs.mkdir, parents=True, exist_ok=True)
        delta_url = self._delta_url(digest, urls)
        self.fetched_bytes = await follow(package, self._slots.installed, self._blobs, delta_url, self._tls)
        self.fetched_bytes += await asyncio.to_thread(missing_bytes, package, self._blobs)
        for file in files:
            url = self._url(file.descriptor.digest, digest, urls)
            await fetch(file.descriptor, url, self._blobs, tls=self._tls)
        return [(blob_path(self._blobs, file.descriptor.digest), file.path) for file in files]

    def _factory_with(self, digest: Digest) -> Factory | None:
        """Returns the factory folder if it holds this release."""
        came = self._factory is not None and self._factory.release.manifest.digest == digest
        return self._factory if came else None

    def prune(self) -> None:
        """Deletes blobs without a hard link from a slot, unfinished downloads included."""
        for blob in self._blobs.glob("*"):
            if blob.stat().st_nlink == 1:
                blob.unlink()

    async def _verify(self, path: Path, digest: Digest) -> None:
        await asyncio.to_thread(verify_package, path, self._trusted_key, digest)

    async def _request_package(self, digest: Digest) -> PackageFiles:
        client = self._client()
        if client is None:
            raise NotReady("cannot fetch the package: no network yet")
        have = tuple(slot.digest for slot in self._slots.installed)
        return await client.request(FetchPackage(gateway_id=self._gateway_id, manifest=digest, have=have))

    def _url(self, blob: Digest, manifest: Digest, urls: dict[Digest, str]) -> UrlSource:
        async def source() -> str:
            """Returns the URL from the packager's answer the first time; later, requests a fresh one."""
            if url := urls.pop(blob, None):
                return url
            found = _urls(await self._request_package(manifest))
            if blob not in found:
                raise NotFound("the packager no longer offers this file", where=blob)
            return found[blob]

        return source

    def _delta_url(self, manifest: Digest, urls: dict[Digest, str]) -> Callable[[DeltaStep], UrlSource]:
        return lambda step: self._url(step.delta.digest, manifest, urls)


def _urls(package: PackageFiles) -> dict[Digest, str]:
    """Returns the URLs of all files and deltas by digest."""
    files = (package.manifest, package.signature, *package.files)
    return {file.descriptor.digest: file.url for file in files} | {
        step.delta.digest: step.url for step in package.route
    }

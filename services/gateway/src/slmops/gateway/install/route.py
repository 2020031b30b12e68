"""Makes the files of a package by deltas from an installed package, at best from a hundredth of the bytes.

Deltas are not trusted. A blob counts only if it has its digest, the manifest names the expected digests, and the
manifest's signature is verified over the installed files. If a delta fails, the whole files are fetched instead.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Collection
from pathlib import Path

from slmops.contracts.commands import PackageFiles
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidDelta, PermanentError
from slmops.contracts.manifest import MANIFEST_PATH, DeltaStep, Manifest, layers_by_path
from slmops.gateway.install.download import UrlSource, blob_path, fetch
from slmops.gateway.install.slots import Slot

log = logging.getLogger(__name__)
_TOO_LARGE = 4
"""Limits disk use: the files that one delta makes may have at most this many times the bytes of the target package."""


def missing_bytes(package: PackageFiles, blobs: Path) -> int:
    """Returns the total size of the package's files that are not among the blobs."""
    sizes = {file.descriptor.digest: file.descriptor.size for file in package.files}
    return sum(size for digest, size in sizes.items() if not blob_path(blobs, digest).exists())


async def follow(
    package: PackageFiles,
    slots: Collection[Slot],
    blobs: Path,
    url: Callable[[DeltaStep], UrlSource],
    tls: ssl.SSLContext | None = None,
) -> int:
    """Makes blobs of the package's files by its chain of deltas, if that is fewer bytes than fetching the files.

    Returns the bytes downloaded. Raises what `fetch` raises when the network or the disk fails. A problem with a delta
    is logged, and the remaining files are left to be fetched.
    """
    cost, missing = (
        sum(step.delta.size for step in package.route),
        await asyncio.to_thread(missing_bytes, package, blobs),
    )
    if not package.route or cost >= missing:
        return 0
    spent = 0
    try:
        _check_chain(package)
        bases = await asyncio.to_thread(_files_of, package.route[0].base, slots)
        for step in package.route:
            delta = await fetch(step.delta, url(step), blobs, tls=tls)
            spent += step.delta.size
            last = step is package.route[-1]
            bases = await asyncio.to_thread(_apply, delta, bases, blobs, package, last)
    except PermanentError as error:
        log.warning("a delta cannot be used, fetching the whole files: %s", error)
        return spent
    log.info("downloaded %d bytes in %d deltas instead of %d bytes", cost, len(package.route), missing)
    return spent


def _check_chain(package: PackageFiles) -> None:
    ends = [*(step.base for step in package.route[1:]), package.manifest.descriptor.digest]
    if [step.target for step in package.route] != ends:
        raise InvalidDelta("the deltas do not lead to the requested package")


def _files_of(base: Digest, slots: Collection[Slot]) -> dict[Digest, Path]:
    """Returns the files of an installed package by digest. Raises `InvalidDelta` if it is not installed."""
    slot = next((slot for slot in slots if slot.digest == base), None)
    if slot is None:
        raise InvalidDelta("the delta starts from a package that is not installed here", where=base)
    manifest = Manifest.decode((slot.path / MANIFEST_PATH).read_bytes())
    return {layer.digest: slot.path / path for path, layer in layers_by_path(manifest).items()}


def _apply(
    delta: Path, bases: dict[Digest, Path], blobs: Path, package: PackageFiles, last: bool
) -> dict[Digest, Path]:
    from slmops.kit.delta import DeltaFile, apply  # imports numpy, so only when needed

    wanted = {file.descriptor.digest: file.descriptor.size for file in package.files}
    # The signed sizes limit the last delta. The packages on the way are not known here, only that they are similar.
    limit = sum(wanted.values()) * (1 if last else _TOO_LARGE)

    def place(file: DeltaFile) -> Path | None:
        if wanted.get(file.digest, file.size_bytes) != file.size_bytes:
            raise InvalidDelta(f"the size of {file.path} in the delta differs from the manifest")
        if last and file.digest not in wanted:
            return None
        return blob_path(blobs, file.digest)

    made = apply(delta, bases, place, limit_bytes=limit)
    return {f"sha256:{path.name}": path for path in made}

"""The way by deltas from a package that is here to one that is wanted: a hundredth of the bytes, when it goes well.

Nothing on it is trusted. A blob has its name when it has its digest, and which digests are wanted the manifest says,
whose signature is verified over what is laid out. Whatever is wrong with a delta, the whole files are fetched instead.
"""

from __future__ import annotations

import asyncio
import logging
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
"""A package between two others may have so many times the bytes of the one that is wanted: a limit for the disk."""


def missing_bytes(package: PackageFiles, blobs: Path) -> int:
    """Of the files that are not here."""
    sizes = {file.descriptor.digest: file.descriptor.size for file in package.files}
    return sum(size for digest, size in sizes.items() if not blob_path(blobs, digest).exists())


async def follow(
    package: PackageFiles, slots: Collection[Slot], blobs: Path, url: Callable[[DeltaStep], UrlSource]
) -> int:
    """Make blobs of the package's files by its route, if that is cheaper than fetching them; the bytes it took.

    Raises what `fetch` raises while the network or the disk is at fault; what is wrong with the deltas is told, and
    leaves the rest to be fetched.
    """
    cost, missing = sum(step.delta.size for step in package.route), missing_bytes(package, blobs)
    if not package.route or cost >= missing:
        return 0
    spent = 0
    try:
        _check_chain(package)
        bases = await asyncio.to_thread(_files_of, package.route[0].base, slots)
        for step in package.route:
            delta = await fetch(step.delta, url(step), blobs)
            spent += step.delta.size
            last = step is package.route[-1]
            bases = await asyncio.to_thread(_apply, delta, bases, blobs, package, last)
    except PermanentError as error:
        log.warning("the whole files are fetched, for the delta is of no use: %s", error)
        return spent
    log.info("%d bytes of %d deltas instead of %d bytes", cost, len(package.route), missing)
    return spent


def _check_chain(package: PackageFiles) -> None:
    ends = [*(step.base for step in package.route[1:]), package.manifest.descriptor.digest]
    if [step.target for step in package.route] != ends:
        raise InvalidDelta("the deltas do not lead to the package that was asked for")


def _files_of(base: Digest, slots: Collection[Slot]) -> dict[Digest, Path]:
    """The files of an installed package by digest."""
    slot = next((slot for slot in slots if slot.digest == base), None)
    if slot is None:
        raise InvalidDelta("it starts from a package that is not installed here", where=base)
    manifest = Manifest.decode((slot.path / MANIFEST_PATH).read_bytes())
    return {layer.digest: slot.path / path for path, layer in layers_by_path(manifest).items()}


def _apply(
    delta: Path, bases: dict[Digest, Path], blobs: Path, package: PackageFiles, last: bool
) -> dict[Digest, Path]:
    from slmops.kit.delta import DeltaFile, apply  # brings numpy: loaded when there is something to apply

    wanted = {file.descriptor.digest: file.descriptor.size for file in package.files}
    room = _TOO_LARGE * sum(wanted.values())

    def place(file: DeltaFile) -> Path | None:
        nonlocal room
        if wanted.get(file.digest, file.size_bytes) != file.size_bytes:
            raise InvalidDelta(f"{file.path} has another size than the manifest says")
        if last and file.digest not in wanted:
            return None
        room -= file.size_bytes
        if room < 0:
            raise InvalidDelta("it makes far more bytes than the package has")
        return blob_path(blobs, file.digest)

    made = apply(delta, bases, place)
    return {f"sha256:{path.name}": path for path in made}

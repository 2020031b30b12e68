"""Writes a package from the store to disk as an OCI layout: the verified blobs first, the index last.

An interrupted export continues where it stopped: complete files are not fetched again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from slmops.console.commands.uploading import VERIFY_STORE
from slmops.contracts.addresses import blob_key
from slmops.contracts.commands import PackageExport
from slmops.contracts.descriptor import Descriptor, digest_of_chunks
from slmops.contracts.errors import AlreadyExists, Denied, DigestMismatch, Unreachable
from slmops.contracts.manifest import PackageFile
from slmops.kit.oci_layout import layout_files
from slmops.kit.tls import untrusted

OnBytes = Callable[[str, int, int], None]
"""Called with the step, the bytes done and the total bytes."""
TIMEOUT = httpx.Timeout(60, connect=10)
_CHUNK_BYTES = 1 << 20


async def write_layout(
    package: PackageExport, directory: Path, on_progress: OnBytes, verify: ssl.SSLContext | bool = True
) -> None:
    """Writes the layout to `directory`. `verify` is httpx's.

    Raises `AlreadyExists` for a folder with other files, `Denied`, `Unreachable`, `DigestMismatch`.
    """
    written = layout_files(package.manifest, package.version, package.signature)
    blobs = {blob_key(file.descriptor.digest): file for file in _blobs(package)}
    with _translate_os_errors(directory):
        _check_empty(directory, {*written, *blobs})
        (directory / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        done, of = 0, sum(file.descriptor.size for file in blobs.values())
        async with httpx.AsyncClient(timeout=TIMEOUT, verify=verify) as http:
            for path, file in blobs.items():
                on_progress("fetch", done, of)
                if not await asyncio.to_thread(_is_complete, directory / path, file.descriptor):
                    await fetch(http, file, directory / path)
                done += file.descriptor.size
        on_progress("fetch", done, of)
        for path, data in written.items():
            (directory / path).write_bytes(data)


def _blobs(package: PackageExport) -> tuple[PackageFile, ...]:
    return (package.manifest_file, package.config_file, package.signature_file, *package.files)


def _check_empty(directory: Path, ours: set[str]) -> None:
    for path in directory.rglob("*"):
        relative = path.relative_to(directory).as_posix()
        if not path.is_dir() and relative.removesuffix(".part") not in ours:
            raise AlreadyExists("the folder contains other files", where=str(path), fix="Name a new or empty folder.")


def _is_complete(path: Path, descriptor: Descriptor) -> bool:
    if not path.is_file() or path.stat().st_size != descriptor.size:
        return False
    with path.open("rb") as source:
        return digest_of_chunks(iter(lambda: source.read(_CHUNK_BYTES), b""))[0] == descriptor.digest


async def fetch(http: httpx.AsyncClient, file: PackageFile, target: Path) -> None:
    """Downloads and verifies one blob. Raises `Unreachable`, `DigestMismatch`."""
    part, where = target.with_name(target.name + ".part"), file.url.partition("?")[0]  # without the URL's signature
    try:
        async with http.stream("GET", file.url, headers={"Accept-Encoding": "identity"}) as answer:
            if not answer.is_success:
                raise Unreachable(f"the object store answered {answer.status_code}", where=where, fix="Try again.")
            with part.open("wb") as out:
                async for chunk in answer.aiter_bytes(_CHUNK_BYTES):
                    if out.tell() + len(chunk) > file.descriptor.size:
                        break  # longer than the blob: the check below fails
                    out.write(chunk)
    except httpx.TransportError as error:
        refused = untrusted(error, where)
        raise refused or Unreachable(
            f"the object store does not answer: {type(error).__name__}", where=where
        ) from error
    if not await asyncio.to_thread(_is_complete, part, file.descriptor):
        part.unlink()
        what = f"the object store returned a different file than the package's {file.path}"
        raise DigestMismatch(what, where=where, fix=VERIFY_STORE)
    part.replace(target)


@contextmanager
def _translate_os_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Denied(f"cannot write the layout: {error.strerror}", where=str(directory)) from error

"""Downloads blobs by short-lived URLs. Downloads resume, and a blob gets its final name only after verification."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import httpx

from slmops.contracts.descriptor import Descriptor, Digest, digest_of_chunks
from slmops.contracts.errors import (
    DigestMismatch,
    DiskFull,
    NotEncrypted,
    NotFound,
    NotReady,
    ServerUntrusted,
    Unreachable,
)
from slmops.kit.threads import Threads
from slmops.kit.tls import untrusted

_CHUNK_BYTES = 2**18
_DISK = Threads("download", 4)
"""For downloads only: what a download writes must neither wait for another kind of work nor make it wait."""

UrlSource = Callable[[], Awaitable[str]]
"""Returns a fresh presigned URL of the blob. It is called again after `Unreachable` or `NotReady`."""

Progress = Callable[[int, int], None]
"""Called with the bytes on disk and the size of the blob."""


@dataclass(frozen=True, slots=True)
class Patience:
    """When a download gives up: after `stalls` attempts in a row without a new byte. The pause doubles each time."""

    stalls: int = 6
    pause: timedelta = timedelta(milliseconds=250)
    max_pause: timedelta = timedelta(seconds=30)
    read_timeout: timedelta = timedelta(seconds=30)


async def fetch(
    descriptor: Descriptor,
    url_source: UrlSource,
    blobs_dir: Path,
    on_progress: Progress = lambda have, size: None,
    *,
    patience: Patience | None = None,
    tls: ssl.SSLContext | None = None,
) -> Path:
    """Downloads a blob to `blobs_dir/<hex>`, verifies size and digest, fsyncs it and returns its path.

    Returns at once if the blob exists. Continues a `.part` file of this or an earlier process with a Range request.
    Only one `fetch` per blob may run at a time. `tls` is the context for https; with it, http is refused.
    Raises `Unreachable`, `ServerUntrusted`, `DiskFull`, `DigestMismatch`, `NotFound`, and a `PermanentError` of
    `url_source`.
    """
    patience = patience or Patience()
    path = blob_path(blobs_dir, descriptor.digest)
    if not await asyncio.to_thread(_holds, path, descriptor):
        part = await _DISK.complete(partial(_Part, path.with_suffix(".part"), descriptor))
        try:
            with _disk_full(part, blobs_dir):
                await asyncio.to_thread(_require_room, part, blobs_dir)
                timeout = httpx.Timeout(patience.read_timeout.total_seconds(), connect=10)
                hooks = {"request": [_encrypted]} if tls else {}
                async with httpx.AsyncClient(
                    timeout=timeout, follow_redirects=True, verify=tls or True, event_hooks=hooks
                ) as http:
                    await _Download(http, descriptor, url_source, part, on_progress, patience).run()
                await _DISK.complete(partial(part.finish, path))
        finally:
            await _DISK.complete(part.close)
    on_progress(descriptor.size, descriptor.size)
    return path


async def _encrypted(request: httpx.Request) -> None:
    if request.url.scheme != "https":
        fix = "Let the packager give https URLs: set its SLMOPS_S3_SECURE."
        raise NotEncrypted("a download would not be encrypted", where=request.url.host, fix=fix)


def blob_path(blobs_dir: Path, digest: Digest) -> Path:
    return blobs_dir / digest.removeprefix("sha256:")


class _Part:
    """The unfinished file and the hash of its content."""

    def __init__(self, path: Path, descriptor: Descriptor) -> None:
        self._path, self._descriptor = path, descriptor
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file: BinaryIO = path.open("r+b", buffering=0)
        self._hash, self.size = hashlib.sha256(), 0
        for chunk in iter(lambda: self._file.read(_CHUNK_BYTES), b""):
            self._hash.update(chunk)
            self.size += len(chunk)
        self.resumed = self.size > 0
        if self.size > descriptor.size:
            self.reset()

    @property
    def complete(self) -> bool:
        return self.size == self._descriptor.size

    @property
    def missing_bytes(self) -> int:
        return self._descriptor.size - self.size

    def append(self, data: bytes) -> None:
        """Raises `DigestMismatch` and deletes the file if more bytes arrive than the blob has."""
        if self.size + len(data) > self._descriptor.size:
            self._reject(f"it is longer than {self._descriptor.size} bytes")
        view = memoryview(data)
        while view:  # a raw write may be short just before the disk is full
            written = self._file.write(view)
            self._hash.update(view[:written])
            self.size += written
            view = view[written:]

    def reset(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._hash, self.size, self.resumed = hashlib.sha256(), 0, False

    def matches(self) -> bool:
        return "sha256:" + self._hash.hexdigest() == self._descriptor.digest

    def finish(self, path: Path) -> None:
        if not self.matches():
            self._reject("its digest is different")
        os.fsync(self._file.fileno())
        os.rename(self._path, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        self._file.close()

    def _reject(self, why: str) -> None:
        self._path.unlink()
        raise DigestMismatch(f"the downloaded file is not the expected blob: {why}", where=self._descriptor.digest)


class _Download:
    """Repeats attempts until the part is complete. Each attempt continues where the last one stopped."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        descriptor: Descriptor,
        url_source: UrlSource,
        part: _Part,
        on_progress: Progress,
        patience: Patience,
    ) -> None:
        self._http, self._descriptor, self._url_source = http, descriptor, url_source
        self._part, self._on_progress, self._patience = part, on_progress, patience
        self._url: str | None = None

    async def run(self) -> None:
        stalls = 0
        while not self._part.complete or await _DISK.complete(self._start_over):
            before, reason = self._part.size, "the connection closed early"
            try:
                self._url = self._url or await self._url_source()
                await self._attempt(self._url)
            except ServerUntrusted:
                raise
            except (httpx.TransportError, Unreachable, NotReady) as error:
                if impostor := untrusted(error, httpx.URL(self._url or "").host):
                    raise impostor from error
                reason = str(error) or type(error).__name__
            if self._part.complete:
                continue
            stalls = 0 if self._part.size > before else stalls + 1
            if stalls == self._patience.stalls:
                raise Unreachable(
                    f"a download makes no progress: {reason}",
                    where=f"{self._descriptor.digest} at byte {self._part.size} of {self._descriptor.size}",
                    fix="The next try continues from there.",
                )
            await asyncio.sleep(min(self._patience.pause * 2**stalls, self._patience.max_pause).total_seconds())

    async def _attempt(self, url: str) -> None:
        # Without compression: the digest is that of the blob's bytes.
        headers = {"Accept-Encoding": "identity"}
        if self._part.size:
            headers["Range"] = f"bytes={self._part.size}-"
        async with self._http.stream("GET", url, headers=headers) as response:
            await self._accept(response)
            # No chunk size: with one, httpx loses the buffered bytes when the connection breaks.
            async for data in response.aiter_raw():
                await _DISK.complete(partial(self._part.append, data))
                self._on_progress(self._part.size, self._descriptor.size)

    async def _accept(self, response: httpx.Response) -> None:
        """Checks that the response continues the part; otherwise empties the part.

        Raises `NotFound`, and `Unreachable` if the attempt has to be repeated.
        """
        status = response.status_code
        if status in (401, 403):
            self._url = None
            raise Unreachable(f"the object storage refused the URL ({status}); it may have expired")
        if status == 404:
            raise NotFound("the object storage does not have this blob", where=self._descriptor.digest)
        if status not in (200, 206, 416):
            raise Unreachable(f"the object storage answered with status {status}")
        continues = response.headers.get("content-range", "").startswith(f"bytes {self._part.size}-")
        if status == 206 and continues:
            return
        if self._part.size:
            await _DISK.complete(
                self._part.reset
            )  # the server ignored Range (200), sent another range, or the range is past the end (416)
        if status != 200:
            raise Unreachable(f"the object storage did not send the requested range (status {status})")

    def _start_over(self) -> bool:
        """Empties a complete part of an earlier process if its digest is wrong: a power cut may have lost a page.

        Returns whether the download has to start from the beginning.
        """
        if self._part.resumed and not self._part.matches():
            self._part.reset()
            return not self._part.complete
        return False


def _holds(path: Path, descriptor: Descriptor) -> bool:
    """Returns whether the file is the blob. Deletes a file with that name and a different size or digest."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        found = digest_of_chunks(iter(lambda: file.read(_CHUNK_BYTES), b""))
    if found != (descriptor.digest, descriptor.size):
        path.unlink()
        return False
    return True


def _require_room(part: _Part, folder: Path) -> None:
    """Raises `DiskFull` before the first byte is downloaded, so that a full disk causes no traffic."""
    missing = part.missing_bytes - shutil.disk_usage(folder).free
    if missing > 0:
        raise _full(missing, folder)


@contextmanager
def _disk_full(part: _Part, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(max(part.missing_bytes - shutil.disk_usage(folder).free, 1), folder) from error


def _full(missing_bytes: int, folder: Path) -> DiskFull:
    return DiskFull(
        f"not enough disk space for a download: {missing_bytes} bytes are missing",
        where=str(folder),
        fix=f"Free {missing_bytes} bytes; the bytes downloaded so far are kept.",
    )

"""The object store's interface for verification: lists blobs by page, reads them, and marks the corrupt ones.

Memory is bounded by a page of the listing and a chunk of one blob.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import urllib3
from minio.error import S3Error

from slmops.contracts.addresses import blob_key
from slmops.contracts.commands import Damage
from slmops.contracts.descriptor import Digest, digest_of_chunks
from slmops.contracts.errors import Unreachable
from slmops.kit.objects.collecting import BLOBS, UPLOADS
from slmops.kit.objects.quarantine import CHUNK_BYTES, QUARANTINE, Quarantine
from slmops.kit.objects.s3 import DATA, INTERNAL, LOOK, MISSING, Stored, answered, listed, minio, opened, stat
from slmops.kit.settings import ObjectSettings

_ATTEMPTS = 2
"""How often a blob is read before it counts as unreadable."""


class Pace:
    """Limits a rate of reading by waiting after each chunk. For one reader at a time; `stop` ends its wait and
    reading."""

    def __init__(
        self,
        bytes_per_s: int | None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._began, self._done = clock(), 0

    def over(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self._stopped.is_set():
                raise Unreachable("the verification was stopped")
            yield chunk
            self._done += len(chunk)
            if self._bytes_per_s:
                early_s = self._done / self._bytes_per_s - (self._clock() - self._began)
                if early_s > 0:
                    self._wait(early_s)

    def stop(self) -> None:
        self._stopped.set()


@dataclass(frozen=True)
class Finding:
    """What is wrong with a blob, None if nothing is. `copy` is the copy that was read, `found` the digest of its
    bytes."""

    damage: Damage | None
    copy: Stored | None = None
    found: Digest | None = None


class Verifying:
    """The store's interface for verifications. Every method raises `Unreachable`."""

    def __init__(self, settings: ObjectSettings) -> None:
        self._endpoint, self._bucket = settings.s3_endpoint, settings.s3_bucket
        self._client = minio(settings, LOOK, retries=1)
        self._data = minio(settings, DATA, retries=1)
        self._quarantine = Quarantine(self._client, self._data, self._bucket)

    async def page(self, after: Digest | None, at_most: int) -> dict[Digest, Stored]:
        """Returns up to `at_most` stored blobs in the order of their digests, from the first one after `after`."""

        def look() -> dict[Digest, Stored]:
            start = blob_key(after) if after else None
            found = self._client.list_objects(self._bucket, BLOBS, recursive=True, start_after=start)
            return {
                f"sha256:{(one.object_name or '').removeprefix(BLOBS)}": Stored(
                    one.object_name or "", one.size or 0, one.last_modified, (one.etag or "").strip('"')
                )
                for one in islice(found, at_most)
                if one.last_modified
            }

        return await answered(self._endpoint, look)

    async def check(self, digest: Digest, pace: Pace) -> Finding:
        """Reads a blob. A blob that is right leaves the quarantine."""
        try:
            return await answered(self._endpoint, lambda: self._check(digest, pace))
        except asyncio.CancelledError:
            pace.stop()  # else its thread would read on
            raise

    async def mark(self, digest: Digest, finding: Finding) -> None:
        """Puts the copy that was read into quarantine."""
        copy = finding.copy
        if copy is not None:
            await answered(self._endpoint, lambda: self._quarantine.add(digest, copy, finding.found))

    async def quarantined(self) -> list[Digest]:
        """Returns the blobs whose present copy is in quarantine. Costs two requests for each."""

        def look() -> list[Digest]:
            names = [mark.key.removeprefix(QUARANTINE) for mark in listed(self._client, self._bucket, QUARANTINE)]
            return [digest for digest in map("sha256:{}".format, names) if self._quarantine.marked(digest)]

        return await answered(self._endpoint, look)

    async def usable(self, digest: Digest) -> bool:
        """Returns whether the store has the blob and it is not in quarantine."""

        def look() -> bool:
            copy = stat(self._client, self._bucket, blob_key(digest))
            return copy is not None and not self._quarantine.holds(digest, copy)

        return await answered(self._endpoint, look)

    async def uploads_of(self, digest: Digest) -> list[tuple[str, int]]:
        """Returns the uploads that wait for this digest, with their sizes in bytes. Nobody has verified them."""

        def look() -> list[tuple[str, int]]:
            found = listed(self._client, self._bucket, UPLOADS)
            hexadecimal = digest.removeprefix("sha256:")
            parts = [(one.key.removeprefix(UPLOADS).partition("/"), one.size_bytes) for one in found]
            return [(upload, size) for (upload, _, name), size in parts if name == hexadecimal]

        return await answered(self._endpoint, look)

    def _check(self, digest: Digest, pace: Pace) -> Finding:
        for _ in range(_ATTEMPTS):
            try:
                with opened(self._data, self._bucket, blob_key(digest)) as (response, copy):
                    actual, _ = digest_of_chunks(pace.over(response.stream(CHUNK_BYTES)))
            except S3Error as error:
                if error.code in MISSING:
                    return Finding(Damage.MISSING)
                if error.code != INTERNAL:
                    raise
            except urllib3.exceptions.ProtocolError:  # the answer ended early
                continue
            else:
                return self._compared(digest, copy, actual)
        copy_there = stat(self._client, self._bucket, blob_key(digest))
        return Finding(Damage.UNREADABLE, copy_there) if copy_there else Finding(Damage.MISSING)

    def _compared(self, digest: Digest, copy: Stored, actual: Digest) -> Finding:
        if actual != digest:
            return Finding(Damage.CORRUPT, copy, actual)
        if self._quarantine.holds(digest, copy):
            self._quarantine.remove(digest)
        return Finding(None, copy, actual)

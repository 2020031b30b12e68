"""Content-addressed storage on S3: a blob is written once under its digest and verified on every read.

minio-py has no conditional put (a header passed as metadata overwrites silently), so small blobs are written by a
presigned PUT with `If-None-Match: *`: 412 means that the same bytes are already there. Large blobs go in parts.

A blob whose bytes are not its digest is marked by whoever reads it, and replaced by the next put of the right bytes
(`kit.objects.quarantine`). A put of bytes that are there compares size and ETag, without reading the blob.

A blob that was put, kept or adopted stays at least for the grace period of collections, also if it existed before and
nothing named it (`kit.sweeps`). An event must name it before the period ends.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from minio.commonconfig import CopySource
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor, Digest, digest_of, digest_of_chunks
from slmops.contracts.errors import DigestMismatch, DiskFull, Unreachable
from slmops.contracts.manifest import MANIFEST_LIMIT_BYTES, Manifest
from slmops.kit.objects.quarantine import CHUNK_BYTES, Quarantine
from slmops.kit.objects.s3 import DATA, LOOK, Stored, answered, listed, minio, opened, pool, read, stat
from slmops.kit.objects.sweeps import Sweeps
from slmops.kit.settings import ObjectSettings

T = TypeVar("T")
MULTIPART_FROM_BYTES = 64 << 20
PART_BYTES = 16 << 20
PRESIGNED_FOR = timedelta(minutes=15)


class Objects:
    """The blobs of one bucket. Every method raises `Unreachable` if the store does not answer."""

    def __init__(self, settings: ObjectSettings) -> None:
        self.endpoint = settings.s3_endpoint
        self.bucket = settings.s3_bucket
        self._client = minio(settings, DATA, retries=2)
        self._looking = minio(settings, LOOK, retries=1)
        self._http = pool(settings, DATA, retries=2)
        self._sweeps = Sweeps(self._looking, self.bucket)
        self._quarantine = Quarantine(self._looking, self._client, self.bucket)

    async def open(self) -> None:
        """Creates the bucket if it is missing."""

        def make() -> None:
            try:
                if not self._looking.bucket_exists(self.bucket):
                    self._client.make_bucket(self.bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):  # another service was faster
                    raise

        await self._guarded(make)

    async def put_bytes(self, data: bytes, media_type: str) -> Descriptor:
        """Stores a small blob once, and again if the stored copy is corrupt."""
        found = Descriptor(media_type=media_type, digest=digest_of(data), size=len(data))
        await self._guarded(lambda: self._sweeps.put(found.digest, lambda: self._put_small(found.digest, data)))
        return found

    async def put_file(self, path: Path, media_type: str) -> Descriptor:
        """Stores a file once, in parts if it is large, and again if the stored copy is corrupt."""

        def put() -> Descriptor:
            digest, size = digest_of_path(path)
            self._sweeps.put(digest, lambda: self._put_file(digest, path, size))
            return Descriptor(media_type=media_type, digest=digest, size=size)

        return await self._guarded(put)

    async def get_bytes(self, digest: Digest, limit_bytes: int = 64 << 20) -> bytes:
        """Returns a small blob after verifying it. Raises `NotFound`, `CorruptBlob`, and `DigestMismatch` for a blob
        with more than `limit_bytes`."""

        def get() -> bytes:
            with opened(self._client, self.bucket, blob_key(digest)) as (response, copy):
                data = response.read(limit_bytes + 1)
            if len(data) > limit_bytes:
                where = f"{self.bucket}/{blob_key(digest)}"
                raise DigestMismatch(f"the blob has more than {limit_bytes} bytes", where=where)
            if (actual := digest_of(data)) != digest:
                raise self._quarantine.corrupt(digest, copy, actual)
            return data

        return await self._guarded(get)

    async def get_manifest(self, digest: Digest) -> Manifest:
        """Returns the manifest of a package. Raises the errors of `get_bytes`, and `InvalidMessage`."""
        return Manifest.decode(await self.get_bytes(digest, MANIFEST_LIMIT_BYTES))

    async def get_file(self, digest: Digest, target: Path) -> None:
        """Fetches a blob and verifies it before it gets the name `target`. Raises `NotFound`, `CorruptBlob`,
        `DiskFull`."""

        def get() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with opened(self._client, self.bucket, blob_key(digest)) as (response, copy):
                try:
                    with part.open("wb") as out:
                        actual = _write(response.stream(CHUNK_BYTES), out)
                    if actual != digest:
                        raise self._quarantine.corrupt(digest, copy, actual)
                    part.replace(target)
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        raise DiskFull("no space left", where=str(target), fix="Free disk space.") from error
                    raise
                finally:
                    part.unlink(missing_ok=True)

        await self._guarded(get)

    async def exists(self, digest: Digest) -> bool:
        return await self._guarded(lambda: self._copy(digest)) is not None

    async def keep(self, digest: Digest, size_bytes: int | None = None, md5: str | None = None) -> bool:
        """Returns whether the blob exists and is not known to be corrupt. If so, collections treat it as if it were put
        now. `size_bytes` and `md5` (hex) are those of the right bytes: a stored copy that differs is read and
        checked."""

        def keep() -> bool:
            copy = self._copy(digest)
            return (
                copy is not None
                and self._quarantine.usable(digest, copy, size_bytes, md5)
                and self._sweeps.keep(digest)
            )

        return await self._guarded(keep)

    async def presigned_get(self, digest: Digest, valid_for: timedelta = PRESIGNED_FOR) -> str:
        """Returns an expiring URL that fetches the blob, also by range."""
        return await self._guarded(lambda: self._client.presigned_get_object(self.bucket, blob_key(digest), valid_for))

    async def presigned_upload(self, upload: str, digest: Digest, valid_for: timedelta = PRESIGNED_FOR) -> str:
        """Returns a URL for uploading unverified bytes. They wait under `uploads/` until `adopt` has verified them."""
        key = _upload_key(upload, digest)
        return await self._guarded(lambda: self._client.presigned_put_object(self.bucket, key, valid_for))

    async def adopt(self, upload: str, digest: Digest, size_bytes: int) -> None:
        """Verifies uploaded bytes and makes them a blob; removes wrong ones. Raises `NotFound`, `DigestMismatch`."""

        def adopt() -> None:
            waiting = _upload_key(upload, digest)
            self._sweeps.put(digest, lambda: self._adopt_new(waiting, digest, size_bytes))
            self._client.remove_object(self.bucket, waiting)

        await self._guarded(adopt)

    async def get_object(self, key: str) -> bytes | None:
        """Returns an object that is not a blob (a cache entry), or None if it does not exist."""

        def get() -> bytes | None:
            return read(self._client, self.bucket, key)

        return await self._guarded(get)

    async def put_object(self, key: str, data: bytes) -> None:
        """Writes an object that is not a blob, replacing an existing one."""
        await self._guarded(lambda: self._client.put_object(self.bucket, key, BytesIO(data), len(data)))

    async def remove_old(self, prefix: str, before: datetime) -> int:
        """Removes the objects below `prefix`, which are not blobs, that were last written before then. Returns how
        many."""

        def remove() -> int:
            found = [one.key for one in listed(self._looking, self.bucket, prefix) if one.modified < before]
            for error in self._client.remove_objects(self.bucket, map(DeleteObject, found)):
                raise Unreachable(f"the object store did not delete: {error.code}", where=self._where(error.name or ""))
            return len(found)

        return await self._guarded(remove)

    async def keys(self, prefix: str = "") -> list[str]:
        return await self._guarded(
            lambda: [o.object_name or "" for o in self._client.list_objects(self.bucket, prefix, recursive=True)]
        )

    def _put_small(self, digest: Digest, data: bytes) -> bool:
        """Writes a blob unless the store has it. Returns whether it was written."""
        key = blob_key(digest)
        url = self._client.presigned_put_object(self.bucket, key, PRESIGNED_FOR)
        answer = self._http.request("PUT", url, body=data, headers={"If-None-Match": "*"})
        if answer.status not in (200, 412):
            raise Unreachable(f"the object store answered {answer.status} to a write", where=self._where(key))
        return answer.status == 200 or self._replaced(
            digest, len(data), _md5(data), lambda: self._client.put_object(self.bucket, key, BytesIO(data), len(data))
        )

    def _put_file(self, digest: Digest, path: Path, size_bytes: int) -> bool:
        if size_bytes < MULTIPART_FROM_BYTES:
            data = path.read_bytes()
            known = self._copy(digest)
            if known and self._quarantine.usable(digest, known, size_bytes, _md5(data)):
                return False  # without sending megabytes
            return self._put_small(digest, data)

        def put() -> object:
            return self._client.fput_object(self.bucket, blob_key(digest), str(path), part_size=PART_BYTES)

        if self._copy(digest) is None:
            put()
        else:
            self._replaced(digest, size_bytes, None, put)
        return False  # S3 dates it by the start of the upload, so it needs a claim that shows its real age

    def _replaced(self, digest: Digest, size_bytes: int, md5: str | None, put: Callable[[], object]) -> bool:
        """Overwrites the stored copy of a blob if it is corrupt. `put` must write the right bytes. Returns whether it
        did."""
        known = self._copy(digest)
        if known is None or self._quarantine.usable(digest, known, size_bytes, md5):
            return False  # if it was deleted meanwhile, the sweep's protocol starts again
        put()
        self._quarantine.remove(digest)
        return True

    def _adopt_new(self, waiting: str, digest: Digest, size_bytes: int) -> bool:
        """Copies a verified upload to its blob unless the store has it. Returns whether it was copied. Raises
        `DigestMismatch`."""
        known = self._copy(digest)
        if known and self._quarantine.usable(digest, known, size_bytes):
            if known.size_bytes != size_bytes:
                self._client.remove_object(self.bucket, waiting)
                raise DigestMismatch(f"{digest} has {known.size_bytes} bytes, not {size_bytes}", fix="Push again.")
            return False
        etag = self._looking.stat_object(self.bucket, waiting).etag
        actual, size = self._digest(waiting)
        if (actual, size) != (digest, size_bytes):
            self._client.remove_object(self.bucket, waiting)
            raise DigestMismatch(
                f"the uploaded bytes are {actual} ({size} bytes), not {digest} ({size_bytes} bytes)",
                fix="Push again. If it happens again, the file changes while it is read.",
            )
        try:
            # The uploader's URL still works, so only the verified bytes may be copied.
            source = CopySource(self.bucket, waiting, match_etag=etag)
            self._client.copy_object(self.bucket, blob_key(digest), source)
        except S3Error as error:
            if error.code != "PreconditionFailed":
                raise
            self._client.remove_object(self.bucket, waiting)
            raise DigestMismatch("the upload changed while it was verified", fix="Push again.") from error
        if known:
            self._quarantine.remove(digest)
        return True

    def _copy(self, digest: Digest) -> Stored | None:
        """Returns the stored copy of a blob, if there is one."""
        return stat(self._looking, self.bucket, blob_key(digest))

    def _digest(self, key: str) -> tuple[Digest, int]:
        with opened(self._client, self.bucket, key) as (response, _):
            return digest_of_chunks(response.stream(CHUNK_BYTES))

    def _where(self, key: str) -> str:
        return f"{self.endpoint}/{self.bucket}/{key}"

    async def _guarded(self, work: Callable[[], T]) -> T:
        return await answered(self.endpoint, work)


def _write(chunks: Iterable[bytes], out: BinaryIO) -> Digest:
    """Writes chunks, flushes them to the disk and returns their digest."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
        out.write(chunk)
    out.flush()
    os.fsync(out.fileno())
    return "sha256:" + state.hexdigest()


def _md5(data: bytes) -> str:
    """Returns the ETag that S3 gives to an object that was written at once: a checksum, no protection against
    people."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _upload_key(upload: str, digest: Digest) -> str:
    return f"uploads/{upload}/{digest.removeprefix('sha256:')}"


def digest_of_path(path: Path) -> tuple[Digest, int]:
    """Returns the digest and the size in bytes of a file."""
    with path.open("rb") as source:
        return digest_of_chunks(iter(lambda: source.read(CHUNK_BYTES), b""))

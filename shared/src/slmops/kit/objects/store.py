"""Content-addressed storage on S3: a blob is written once under its digest and verified on every read.

minio-py has no conditional put (a header passed as metadata overwrites silently), so small blobs are written by a
presigned PUT with `If-None-Match: *`: 412 means that the same bytes are already there. Large blobs go in parts.

A blob that was put, kept or adopted stays at least for the grace period of collections, also if it existed before and
nothing named it (`kit.sweeps`). An event must name it before the period ends.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from minio.commonconfig import CopySource
from minio.error import S3Error

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor, Digest, digest_of, digest_of_chunks
from slmops.contracts.errors import DigestMismatch, DiskFull, Unreachable
from slmops.contracts.manifest import MANIFEST_LIMIT_BYTES, Manifest
from slmops.kit.objects.s3 import DATA, LOOK, answered, minio, pool, stat
from slmops.kit.objects.sweeps import Sweeps
from slmops.kit.settings import ObjectSettings

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
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
        """Stores a small blob once."""
        found = Descriptor(media_type=media_type, digest=digest_of(data), size=len(data))
        await self._guarded(lambda: self._sweeps.put(found.digest, lambda: self._put_new(blob_key(found.digest), data)))
        return found

    async def put_file(self, path: Path, media_type: str) -> Descriptor:
        """Stores a file once, in parts if it is large."""

        def put() -> Descriptor:
            digest, size = digest_of_path(path)
            self._sweeps.put(digest, lambda: self._put_new_file(blob_key(digest), path, size))
            return Descriptor(media_type=media_type, digest=digest, size=size)

        return await self._guarded(put)

    async def get_bytes(self, digest: Digest, limit_bytes: int = 64 << 20) -> bytes:
        """Returns a small blob after verifying it. Raises `NotFound`, `DigestMismatch`."""

        def get() -> bytes:
            response = self._client.get_object(self.bucket, blob_key(digest))
            try:
                data = response.read(limit_bytes + 1)
            finally:
                response.close()
                response.release_conn()
            if len(data) > limit_bytes or digest_of(data) != digest:
                raise DigestMismatch(f"the store's bytes are not {digest}", where=f"{self.bucket}/{blob_key(digest)}")
            return data

        return await self._guarded(get)

    async def get_manifest(self, digest: Digest) -> Manifest:
        """Returns the manifest of a package. Raises the errors of `get_bytes`, and `InvalidMessage`."""
        return Manifest.decode(await self.get_bytes(digest, MANIFEST_LIMIT_BYTES))

    async def get_file(self, digest: Digest, target: Path) -> None:
        """Fetches a blob and verifies it before it gets the name `target`. Raises `NotFound`, `DigestMismatch`,
        `DiskFull`."""

        def get() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            response = self._client.get_object(self.bucket, blob_key(digest))
            try:
                with part.open("wb") as out:
                    actual = _copy(response.stream(CHUNK_BYTES), out)
                if actual != digest:
                    where = f"{self.bucket}/{blob_key(digest)}"
                    raise DigestMismatch(f"the store's bytes are not {digest}", where=where)
                part.replace(target)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise DiskFull("no space left", where=str(target), fix="Free disk space.") from error
                raise
            finally:
                part.unlink(missing_ok=True)
                response.close()
                response.release_conn()

        await self._guarded(get)

    async def exists(self, digest: Digest) -> bool:
        return await self._guarded(lambda: self._size(blob_key(digest))) is not None

    async def keep(self, digest: Digest) -> bool:
        """Returns whether the blob exists. If so, collections treat it as if it were put now."""
        return await self._guarded(lambda: self._sweeps.keep(digest))

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
            if self._size(key) is None:
                return None
            response = self._client.get_object(self.bucket, key)
            try:
                return bytes(response.read())
            finally:
                response.close()
                response.release_conn()

        return await self._guarded(get)

    async def put_object(self, key: str, data: bytes) -> None:
        """Writes an object that is not a blob, replacing an existing one."""
        await self._guarded(lambda: self._client.put_object(self.bucket, key, BytesIO(data), len(data)))

    async def keys(self, prefix: str = "") -> list[str]:
        return await self._guarded(
            lambda: [o.object_name or "" for o in self._client.list_objects(self.bucket, prefix, recursive=True)]
        )

    def _put_new(self, key: str, data: bytes) -> bool:
        """Writes an object unless it exists. Returns whether it was written."""
        url = self._client.presigned_put_object(self.bucket, key, PRESIGNED_FOR)
        answer = self._http.request("PUT", url, body=data, headers={"If-None-Match": "*"})
        if answer.status not in (200, 412):
            raise Unreachable(f"the object store answered {answer.status} to a write", where=self._where(key))
        return bool(answer.status == 200)

    def _put_new_file(self, key: str, path: Path, size_bytes: int) -> bool:
        if self._size(key) is not None:
            return False
        if size_bytes < MULTIPART_FROM_BYTES:
            return self._put_new(key, path.read_bytes())
        self._client.fput_object(self.bucket, key, str(path), part_size=PART_BYTES)
        return False  # S3 dates it by the start of the upload, so it needs a claim that shows its real age

    def _adopt_new(self, waiting: str, digest: Digest, size_bytes: int) -> bool:
        """Copies a verified upload to its blob unless it exists. Returns whether it was copied. Raises
        `DigestMismatch`."""
        key = blob_key(digest)
        if (known := self._size(key)) is not None:
            if known != size_bytes:
                self._client.remove_object(self.bucket, waiting)
                raise DigestMismatch(f"{digest} has {known} bytes, not {size_bytes}", fix="Push again.")
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
            self._client.copy_object(self.bucket, key, CopySource(self.bucket, waiting, match_etag=etag))
        except S3Error as error:
            if error.code != "PreconditionFailed":
                raise
            self._client.remove_object(self.bucket, waiting)
            raise DigestMismatch("the upload changed while it was verified", fix="Push again.") from error
        return True

    def _size(self, key: str) -> int | None:
        found = stat(self._looking, self.bucket, key)
        return found.size_bytes if found else None

    def _digest(self, key: str) -> tuple[Digest, int]:
        response = self._client.get_object(self.bucket, key)
        try:
            return digest_of_chunks(response.stream(CHUNK_BYTES))
        finally:
            response.close()
            response.release_conn()

    def _where(self, key: str) -> str:
        return f"{self.endpoint}/{self.bucket}/{key}"

    async def _guarded(self, work: Callable[[], T]) -> T:
        return await answered(self.endpoint, work)


def _copy(chunks: Iterable[bytes], out: BinaryIO) -> Digest:
    """Writes chunks, flushes them to the disk and returns their digest."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
        out.write(chunk)
    out.flush()
    os.fsync(out.fileno())
    return "sha256:" + state.hexdigest()


def _upload_key(upload: str, digest: Digest) -> str:
    return f"uploads/{upload}/{digest.removeprefix('sha256:')}"


def digest_of_path(path: Path) -> tuple[Digest, int]:
    """Returns the digest and the size in bytes of a file."""
    with path.open("rb") as source:
        return digest_of_chunks(iter(lambda: source.read(CHUNK_BYTES), b""))

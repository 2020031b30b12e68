"""Content-addressed S3: a blob is written once under its digest and verified whenever it is read.

minio-py has no conditional put (a header passed as metadata overwrites silently), so small blobs go through a presigned
PUT with `If-None-Match: *`: 412 means that the very same bytes are there already. Large blobs go in parts.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.error import S3Error

from slmops.contracts.descriptor import Descriptor, Digest, blob_key, digest_of, digest_of_chunks
from slmops.contracts.errors import DigestMismatch, DiskFull, NotFound, Unreachable
from slmops.kit.settings import ObjectSettings

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
MULTIPART_FROM_BYTES = 64 << 20
PART_BYTES = 16 << 20
PRESIGNED_FOR = timedelta(minutes=15)
_DATA = urllib3.Timeout(connect=5, read=120)  # a store may be silent while it copies gigabytes
_LOOK = urllib3.Timeout(connect=5, read=5)
"""For questions about an object: a store that hangs is told to whoever asks before they give up asking us."""


class Objects:
    """One bucket. Every method raises `Unreachable` when the store does not answer."""

    def __init__(self, settings: ObjectSettings) -> None:
        self.endpoint = settings.s3_endpoint
        self.bucket = settings.s3_bucket
        self._client = _minio(settings, _DATA, retries=2)
        self._looking = _minio(settings, _LOOK, retries=1)
        self._http = _pool(_DATA, retries=2)

    async def open(self) -> None:
        """Make the bucket if it is missing."""

        def make() -> None:
            try:
                if not self._looking.bucket_exists(self.bucket):
                    self._client.make_bucket(self.bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):  # another service was faster
                    raise

        await self._guarded(make)

    async def put_bytes(self, data: bytes, media_type: str) -> Descriptor:
        """Store a small blob once."""
        found = Descriptor(media_type=media_type, digest=digest_of(data), size=len(data))
        await self._guarded(lambda: self._put_new(blob_key(found.digest), data))
        return found

    async def put_file(self, path: Path, media_type: str) -> Descriptor:
        """Store a file once, in parts when it is large."""

        def put() -> Descriptor:
            digest, size = digest_of_path(path)
            key = blob_key(digest)
            if self._size(key) is None:
                if size >= MULTIPART_FROM_BYTES:
                    self._client.fput_object(self.bucket, key, str(path), part_size=PART_BYTES)
                else:
                    self._put_new(key, path.read_bytes())
            return Descriptor(media_type=media_type, digest=digest, size=size)

        return await self._guarded(put)

    async def get_bytes(self, digest: Digest, limit_bytes: int = 64 << 20) -> bytes:
        """A small blob, verified. Raises `NotFound`, `DigestMismatch`."""

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

    async def get_file(self, digest: Digest, target: Path) -> None:
        """Fetch a blob, verified before it is called `target`. Raises `NotFound`, `DigestMismatch`, `DiskFull`."""

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

    async def presigned_get(self, digest: Digest, valid_for: timedelta = PRESIGNED_FOR) -> str:
        """A URL that fetches the blob, also by range, until it expires."""
        return await self._guarded(lambda: self._client.presigned_get_object(self.bucket, blob_key(digest), valid_for))

    async def presigned_upload(self, upload: str, digest: Digest, valid_for: timedelta = PRESIGNED_FOR) -> str:
        """A URL for bytes that we do not trust yet: they wait under `uploads/` until `adopt` has verified them."""
        key = _upload_key(upload, digest)
        return await self._guarded(lambda: self._client.presigned_put_object(self.bucket, key, valid_for))

    async def adopt(self, upload: str, digest: Digest, size_bytes: int) -> None:
        """Verify uploaded bytes and make them a blob; refused ones are removed. Raises `NotFound`, `DigestMismatch`."""

        def adopt() -> None:
            key, waiting = blob_key(digest), _upload_key(upload, digest)
            if (known := self._size(key)) is not None:
                self._client.remove_object(self.bucket, waiting)
                if known != size_bytes:
                    raise DigestMismatch(f"{digest} has {known} bytes, not {size_bytes}", fix="Push again.")
                return
            etag = self._looking.stat_object(self.bucket, waiting).etag
            actual, size = self._digest(waiting)
            if (actual, size) != (digest, size_bytes):
                self._client.remove_object(self.bucket, waiting)
                raise DigestMismatch(
                    f"the uploaded bytes are {actual} ({size} bytes), not {digest} ({size_bytes} bytes)",
                    fix="Push again; if it repeats, the file changes while it is read.",
                )
            try:
                # The uploader's URL still works: what is copied must be what was verified.
                self._client.copy_object(self.bucket, key, CopySource(self.bucket, waiting, match_etag=etag))
            except S3Error as error:
                if error.code != "PreconditionFailed":
                    raise
                self._client.remove_object(self.bucket, waiting)
                raise DigestMismatch("the upload changed while it was verified", fix="Push again.") from error
            self._client.remove_object(self.bucket, waiting)

        await self._guarded(adopt)

    async def get_object(self, key: str) -> bytes | None:
        """An object that is no blob (a cache entry); None when there is none."""

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
        """Write an object that is no blob, over what was there."""
        await self._guarded(lambda: self._client.put_object(self.bucket, key, BytesIO(data), len(data)))

    async def keys(self, prefix: str = "") -> list[str]:
        return await self._guarded(
            lambda: [o.object_name or "" for o in self._client.list_objects(self.bucket, prefix, recursive=True)]
        )

    def _put_new(self, key: str, data: bytes) -> None:
        url = self._client.presigned_put_object(self.bucket, key, PRESIGNED_FOR)
        answer = self._http.request("PUT", url, body=data, headers={"If-None-Match": "*"})
        if answer.status not in (200, 412):
            raise Unreachable(f"the object store answered {answer.status} to a write", where=self._where(key))

    def _size(self, key: str) -> int | None:
        try:
            return self._looking.stat_object(self.bucket, key).size
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject"):
                return None
            raise

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
        try:
            return await asyncio.to_thread(work)
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket", "NoSuchObject"):
                raise NotFound("no such object in the store", where=f"{self.endpoint}{error.resource or ''}") from error
            raise Unreachable(f"the object store refused: {error.code}", where=self.endpoint) from error
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(
                f"the object store does not answer: {type(error).__name__}",
                where=self.endpoint,
                fix="Check that it runs and that SLMOPS_S3_ENDPOINT names it.",
            ) from error


def _minio(settings: ObjectSettings, timeout: urllib3.Timeout, retries: int) -> Minio:
    return Minio(
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        region="us-east-1",  # given, so that presigning needs no round trip
        http_client=_pool(timeout, retries),
    )


def _pool(timeout: urllib3.Timeout, retries: int) -> urllib3.PoolManager:
    return urllib3.PoolManager(timeout=timeout, retries=urllib3.Retry(total=retries, backoff_factor=0.2))


def _copy(chunks: Iterable[bytes], out: BinaryIO) -> Digest:
    """Write, flush to the disk, and say what was written."""
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
    """Digest and size in bytes of a file."""
    with path.open("rb") as source:
        return digest_of_chunks(iter(lambda: source.read(CHUNK_BYTES), b""))

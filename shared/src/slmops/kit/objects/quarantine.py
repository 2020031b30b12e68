"""Marks blobs whose bytes are not their digest, so that the next put of the right bytes replaces them.

A mark is the object `quarantine/<hex>`. It names one copy of the blob by ETag and time. No blob is ever deleted or
moved: S3 deletes unconditionally, so whoever deletes a bad copy may delete the good one that somebody has just put. A
writer that has the right bytes finds the mark and overwrites the copy. Two such writers write the same bytes. The new
copy has another time, so a mark that a slow reader writes afterwards names a copy that is gone, and means nothing.

S3's times are whole seconds. If a blob is written, found corrupt and replaced within one second, the mark may fit the
good copy too. Then the next put writes the same bytes once more, and the next verification removes the mark.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from io import BytesIO

from minio import Minio
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Digest, digest_of_chunks
from slmops.contracts.errors import CorruptBlob
from slmops.kit.clock import utc_now
from slmops.kit.objects.s3 import Stored, opened, read, stat

QUARANTINE = "quarantine/"
CHUNK_BYTES = 1 << 20


class Mark(BaseModel):
    """Which copy of a blob is corrupt. `found` is the digest of its bytes; None if the store cannot return them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    etag: str
    modified: AwareDatetime
    size_bytes: int
    found: Digest | None = None
    at: AwareDatetime

    def names(self, copy: Stored) -> bool:
        return (self.etag, self.modified) == (copy.etag, copy.modified)


def mark_key(digest: Digest) -> str:
    return QUARANTINE + digest.removeprefix("sha256:")


class Quarantine:
    """The marks in one bucket. Methods block. `client` is for requests without data, `data` for reading blobs."""

    def __init__(self, client: Minio, data: Minio, bucket: str, clock: Callable[[], datetime] = utc_now) -> None:
        self._client, self._data, self._bucket, self._clock = client, data, bucket, clock

    def usable(self, digest: Digest, copy: Stored, size_bytes: int | None = None, md5: str | None = None) -> bool:
        """Returns whether a stored copy is not known to be corrupt. Costs one request.

        `size_bytes` and `md5` (hex) are those of the right bytes. If the store's size or ETag differs, the copy is read
        and, if it is corrupt, marked. An ETag that is no MD5 (large objects, some encrypted ones) costs the same
        reading."""
        if self.holds(digest, copy):
            return False
        if size_bytes in (None, copy.size_bytes) and (md5 is None or "-" in copy.etag or md5 == copy.etag):
            return True
        return self.verified(digest) is None

    def verified(self, digest: Digest) -> Mark | None:
        """Reads a blob. Returns None if it has the right bytes; otherwise marks it and returns the mark."""
        with opened(self._data, self._bucket, blob_key(digest)) as (response, copy):
            actual, _ = digest_of_chunks(response.stream(CHUNK_BYTES))
        return None if actual == digest else self.add(digest, copy, actual)

    def holds(self, digest: Digest, copy: Stored) -> bool:
        mark = self.find(digest)
        return mark is not None and mark.names(copy)

    def marked(self, digest: Digest) -> bool:
        """Returns whether the stored copy of a blob is in quarantine. Costs two requests."""
        copy = stat(self._client, self._bucket, blob_key(digest))
        return copy is not None and self.holds(digest, copy)

    def find(self, digest: Digest) -> Mark | None:
        data = read(self._client, self._bucket, mark_key(digest))
        try:
            return Mark.model_validate_json(data) if data is not None else None
        except ValidationError:  # nobody but us writes there; a mark that names no copy means nothing
            return None

    def add(self, digest: Digest, copy: Stored, actual: Digest | None) -> Mark:
        mark = Mark(etag=copy.etag, modified=copy.modified, size_bytes=copy.size_bytes, found=actual, at=self._clock())
        data = mark.model_dump_json().encode()
        self._client.put_object(self._bucket, mark_key(digest), BytesIO(data), len(data))
        return mark

    def remove(self, digest: Digest) -> None:
        """Removes a mark, after the copy was replaced or found to be right. Another writer may have removed it."""
        self._client.remove_object(self._bucket, mark_key(digest))

    def corrupt(self, digest: Digest, copy: Stored, actual: Digest) -> CorruptBlob:
        """Marks a copy that was just read, and returns the error for its reader."""
        self.add(digest, copy, actual)
        return CorruptBlob(
            f"the object store holds {actual} under {digest}; the blob is now in quarantine",
            where=f"{self._bucket}/{blob_key(digest)}",
            fix="List what needs it and restore it: slmops storage verify --repair. A push of the same file does too.",
        )

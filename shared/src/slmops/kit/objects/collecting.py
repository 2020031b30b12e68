"""The object store's interface for garbage collection: lists objects with their ages and deletes blobs in sweeps
(`kit.sweeps`).

This module does not decide what is garbage. All ages are measured by the store's own clock.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from io import BytesIO
from uuid import uuid4

from minio.deleteobjects import DeleteObject

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Unreachable
from slmops.kit.objects import sweeps
from slmops.kit.objects.quarantine import QUARANTINE, Quarantine
from slmops.kit.objects.s3 import LOOK, Stored, answered, listed, minio, stat
from slmops.kit.objects.sweeps import CLAIMS, SWEEPS, claim_key
from slmops.kit.settings import ObjectSettings

UPLOADS = "uploads/"
BLOBS = "blobs/sha256/"
SWEEP_OF = 32
"""Blobs in one sweep: few enough that all are checked well within the lease and that writers do not wait long."""


class Collecting:
    """The store's interface for collections. Every method raises `Unreachable`."""

    def __init__(self, settings: ObjectSettings) -> None:
        self._endpoint, self._bucket = settings.s3_endpoint, settings.s3_bucket
        self._client = minio(settings, LOOK, retries=1)
        # One attempt of a few seconds: a deletion must not arrive after the lease of its sweep.
        self._deleting = minio(settings, LOOK, retries=0)
        self._quarantine = Quarantine(self._client, self._client, self._bucket)

    async def now(self) -> datetime:
        """Returns the current time of the store's clock, which sets the times of `Stored`."""

        def ask() -> datetime:
            sweep = self._begin(())
            found = stat(self._client, self._bucket, sweep)
            self._client.remove_object(self._bucket, sweep)
            if found is None:
                raise Unreachable("the store does not show an object that was just written", where=sweep)
            return found.modified

        return await answered(self._endpoint, ask)

    async def blobs(self) -> dict[Digest, Stored]:
        return await self._by_digest(BLOBS)

    async def claims(self) -> dict[Digest, Stored]:
        return await self._by_digest(CLAIMS)

    async def uploads(self) -> list[Stored]:
        return await answered(self._endpoint, lambda: listed(self._client, self._bucket, UPLOADS))

    async def sweep(self, condemned: Sequence[Digest], live: Collection[Digest], before: datetime) -> list[Digest]:
        """Deletes condemned blobs and claims that are still older than `before`; of `live` blobs only the claims.

        Returns the deleted blobs. Raises `Unreachable` also if the store is too slow for a safe deletion; then nothing
        is deleted.
        """
        return await answered(self._endpoint, lambda: self._sweep(condemned, live, before))

    async def remove_uploads(self, keys: Sequence[str]) -> None:
        """Removes uploads that nobody registered."""
        await answered(self._endpoint, lambda: self._delete(keys))

    async def abort_parts(self, before: datetime) -> int:
        """Aborts multipart uploads that started before `before`; returns their number. No listing shows them."""
        return await answered(self._endpoint, lambda: self._abort_parts(before))

    async def end_dead_sweeps(self, now: datetime) -> None:
        """Removes the sweeps of crashed collectors, whose lease is over."""

        def end() -> None:
            limit = now - timedelta(seconds=2 * sweeps.LEASE_S)
            found = listed(self._client, self._bucket, SWEEPS)
            self._delete([sweep.key for sweep in found if sweep.modified < limit])

        await answered(self._endpoint, end)

    async def remove_marks(self, before: datetime) -> int:
        """Removes old marks of the quarantine whose corrupt copy is gone: deleted, or replaced by a writer that died
        then.

        Returns how many. A mark whose copy is there stays.
        """

        def remove() -> int:
            old = [mark for mark in listed(self._client, self._bucket, QUARANTINE) if mark.modified < before]
            digests = [f"sha256:{mark.key.removeprefix(QUARANTINE)}" for mark in old]
            gone = [mark.key for mark, digest in zip(old, digests, strict=True) if not self._quarantine.marked(digest)]
            self._delete(gone)
            return len(gone)

        return await answered(self._endpoint, remove)

    async def _by_digest(self, prefix: str) -> dict[Digest, Stored]:
        found = await answered(self._endpoint, lambda: listed(self._client, self._bucket, prefix))
        return {f"sha256:{stored.key.removeprefix(prefix)}": stored for stored in found}

    def _begin(self, condemned: Sequence[Digest]) -> str:
        sweep, data = SWEEPS + uuid4().hex, "\n".join(condemned).encode()
        self._client.put_object(self._bucket, sweep, BytesIO(data), len(data))
        return sweep

    def _sweep(self, condemned: Sequence[Digest], live: Collection[Digest], before: datetime) -> list[Digest]:
        safe_until = time.monotonic() + sweeps.LEASE_S / 2  # the other half is for the deletion's arrival
        sweep = self._begin(condemned)
        blobs, claims = self._old(condemned, live, before)
        if time.monotonic() > safe_until:
            self._client.remove_object(self._bucket, sweep)
            raise Unreachable("the object store is too slow to delete safely", where=self._endpoint, fix="Try later.")
        # If this fails, the store may still delete later. Then the sweep stays, and writers of these blobs wait.
        self._delete([*map(blob_key, blobs), *map(claim_key, claims)])
        self._client.remove_object(self._bucket, sweep)
        return blobs

    def _old(
        self, condemned: Sequence[Digest], live: Collection[Digest], before: datetime
    ) -> tuple[list[Digest], list[Digest]]:
        """Returns the blobs and claims that may be deleted, checked now."""
        blobs, claims = [], []
        for digest in condemned:
            blob = stat(self._client, self._bucket, blob_key(digest))
            claim = stat(self._client, self._bucket, claim_key(digest))
            if claim and claim.modified >= before:
                continue
            if blob and blob.modified < before and digest not in live:
                blobs.append(digest)
            if claim:
                claims.append(digest)
        return blobs, claims

    def _delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; missing ones are not an error."""
        for error in self._deleting.remove_objects(self._bucket, [DeleteObject(key) for key in keys]):
            raise Unreachable(f"the object store did not delete: {error.code}", where=f"{self._bucket}/{error.name}")

    def _abort_parts(self, before: datetime) -> int:
        aborted, marks = 0, ("", "")
        while True:
            # Private methods of minio-py for S3's ListMultipartUploads and AbortMultipartUpload.
            found = self._client._list_multipart_uploads(
                self._bucket, key_marker=marks[0] or None, upload_id_marker=marks[1] or None
            )
            for upload in found.uploads:
                if upload.initiated_time and upload.initiated_time < before:
                    self._client._abort_multipart_upload(self._bucket, upload.object_name, upload.upload_id or "")
                    aborted += 1
            if not found.is_truncated:
                return aborted
            marks = (found.next_key_marker or "", found.next_upload_id_marker or "")

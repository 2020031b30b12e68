"""Puts blobs while a collection may delete them. Writers and collectors do not wait for each other's messages: each
writes first and checks afterwards.

    a writer                                        a collector (`kit.collecting`)
    1. writes the blob, or a claim if the blob      1. writes a sweep: an object that lists condemned blobs
       exists                                       2. checks each blob and claim and spares young ones
    2. waits while a sweep condemns the blob,       3. deletes the rest, then the sweep
       then starts again
    3. checks that the blob exists; if not,
       starts again

S3 deletes unconditionally, so a blob or claim that is written between steps 2 and 3 of a collection is deleted with the
rest. But the sweep existed before that write and is not over: the writer sees it, waits, and writes again. A blob or
claim written before step 2 is seen and spared. This holds for any number of writers and collectors, on a store whose
reads and listings show every finished write (S3 since 2020).

A collector deletes nothing later than `LEASE_S` after it wrote its sweep. So a crashed collector blocks no writer for
longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO

from minio import Minio

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Conflict
from slmops.kit.objects.s3 import listed, read, stat

LEASE_S = 60.0
CLAIMS, SWEEPS = "claims/", "sweeps/"
_LOOK_EVERY_S = 0.2
_ATTEMPTS = 20


def claim_key(digest: Digest) -> str:
    """Returns the key of a blob's claim: an empty object whose age shows when a service last needed the blob, which is
    written only once. Copying the blob onto itself would move gigabytes."""
    return CLAIMS + digest.removeprefix("sha256:")


class Sweeps:
    """The writers' side of the protocol. Methods block."""

    def __init__(self, client: Minio, bucket: str) -> None:
        self._client, self._bucket = client, bucket

    def put(self, digest: Digest, write: Callable[[], bool]) -> None:
        """Puts a blob that stays for the grace period. `write` returns whether the blob was missing.

        Raises `Conflict` if the blob is deleted after every attempt.
        """
        seen: dict[str, float] = {}
        for _ in range(_ATTEMPTS):
            if not write():
                self._claim(digest)
            if not self._waited(digest, seen) and self._there(digest):
                return
        raise Conflict("the blob is deleted each time it is written", where=digest)

    def keep(self, digest: Digest) -> bool:
        """Returns whether the blob exists. If so, it stays for the grace period, as if it were put now."""
        seen: dict[str, float] = {}
        while self._there(digest):
            self._claim(digest)
            if not self._waited(digest, seen):
                return self._there(digest)
        return False

    def _there(self, digest: Digest) -> bool:
        return stat(self._client, self._bucket, blob_key(digest)) is not None

    def _claim(self, digest: Digest) -> None:
        self._client.put_object(self._bucket, claim_key(digest), BytesIO(), 0)

    def _waited(self, digest: Digest, seen: dict[str, float]) -> bool:
        """Waits until no sweep condemns the blob; returns whether it waited. `seen`: when we first saw each sweep, by
        our own clock."""
        waited = False
        while any(self._condemns(sweep.key, digest, seen) for sweep in listed(self._client, self._bucket, SWEEPS)):
            waited = True
            time.sleep(_LOOK_EVERY_S)
        return waited

    def _condemns(self, sweep: str, digest: Digest, seen: dict[str, float]) -> bool:
        known_s = time.monotonic() - seen.setdefault(sweep, time.monotonic())
        return known_s < LEASE_S and digest.encode() in self._condemned(sweep)

    def _condemned(self, sweep: str) -> bytes:
        return read(self._client, self._bucket, sweep) or b""  # otherwise it is over

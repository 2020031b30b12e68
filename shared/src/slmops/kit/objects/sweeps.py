"""How a blob is put while a collection may be deleting it. Neither asks the other: both look after they wrote.

    who puts                                        who collects (`kit.collecting`)
    1. writes the blob, or a claim on the blob      1. writes a sweep: an object that lists what it condemns
       if that is there already                     2. looks at each blob and claim: a young one is spared
    2. waits while a sweep condemns it, and then    3. deletes the rest, and then the sweep
       begins again
    3. sees the blob, else begins again

S3 deletes whatever is there, so a blob or claim that is written between 2 and 3 of a collection is deleted with the
rest. But that sweep was there before it was written and is not over: its writer sees it, waits, and writes again. What
was written before 2 is seen and spared. This holds for any number of either, on a store whose reads and lists show
every finished write (S3 since 2020).

A collector deletes nothing later than `LEASE_S` after it wrote its sweep. So one that died keeps nobody for longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO

from minio import Minio
from minio.error import S3Error

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import Conflict
from slmops.kit.objects.s3 import listed, stat

LEASE_S = 60.0
CLAIMS, SWEEPS = "claims/", "sweeps/"
_LOOK_EVERY_S = 0.2
_ATTEMPTS = 20


def claim_key(digest: Digest) -> str:
    """Its age says when somebody last wanted the blob, which is written only once: an empty object, whatever the
    blob's size, where copying the blob onto itself would move gigabytes."""
    return CLAIMS + digest.removeprefix("sha256:")


class Sweeps:
    """As whoever puts blobs sees them. Blocks."""

    def __init__(self, client: Minio, bucket: str) -> None:
        self._client, self._bucket = client, bucket

    def put(self, digest: Digest, write: Callable[[], bool]) -> None:
        """Have a blob that stays for the grace period. `write` answers whether it was not there.

        Raises `Conflict` when it does not stay.
        """
        seen: dict[str, float] = {}
        for _ in range(_ATTEMPTS):
            if not write():
                self._claim(digest)
            if not self._waited(digest, seen) and self._there(digest):
                return
        raise Conflict("the blob is deleted each time it is written", where=digest)

    def keep(self, digest: Digest) -> bool:
        """Whether there is such a blob. If so, it stays for the grace period, as if it had been put now."""
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
        """Wait until no sweep condemns it; `seen`: since when we know which sweep, by our own clock."""
        waited = False
        while any(self._condemns(sweep.key, digest, seen) for sweep in listed(self._client, self._bucket, SWEEPS)):
            waited = True
            time.sleep(_LOOK_EVERY_S)
        return waited

    def _condemns(self, sweep: str, digest: Digest, seen: dict[str, float]) -> bool:
        known_s = time.monotonic() - seen.setdefault(sweep, time.monotonic())
        return known_s < LEASE_S and digest.encode() in self._condemned(sweep)

    def _condemned(self, sweep: str) -> bytes:
        try:
            response = self._client.get_object(self._bucket, sweep)
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject"):  # it is over
                return b""
            raise
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()

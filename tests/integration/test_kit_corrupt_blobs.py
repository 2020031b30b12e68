"""Blobs whose bytes are not their digest, on a real S3 server: who reads one marks it, and the next put replaces it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from integration.test_kit_objects import KIND, replace, settings_of, small, upload
from minio import Minio

from slmops.contracts.addresses import blob_key
from slmops.contracts.commands import Damage
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import CorruptBlob, DigestMismatch
from slmops.kit.objects import store, verifying
from slmops.kit.objects.quarantine import QUARANTINE
from slmops.kit.objects.s3 import stat
from slmops.kit.objects.store import Objects
from slmops.kit.objects.verifying import Pace, Verifying
from slmops.local.layout import Layout

if TYPE_CHECKING:
    from servers import S3


@pytest.fixture
async def objects(s3: S3) -> Objects:
    objects = Objects(settings_of(s3, s3_bucket=f"corrupt-{uuid4().hex}"))
    await objects.open()
    return objects


@pytest.fixture
def behind(s3: S3) -> Minio:
    return Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False)


async def rotten(objects: Objects, behind: Minio, data: bytes = b"weights", stored: bytes = b"rotten!") -> Descriptor:
    """A blob whose bytes changed to as many others, which nobody has noticed yet."""
    put = await objects.put_bytes(data, KIND)
    replace(behind, objects, put.digest, stored)
    return put


async def test_a_reader_reports_a_corrupt_blob_and_marks_it(objects: Objects, behind: Minio, tmp_path: Path) -> None:
    put = await rotten(objects, behind)
    assert await objects.keep(put.digest), "nobody has read it yet"
    for read in (objects.get_bytes(put.digest), objects.get_file(put.digest, tmp_path / "f")):
        with pytest.raises(CorruptBlob) as caught:
            await read
        assert digest_of(b"rotten!") in caught.value.what
        assert "slmops storage verify --repair" in str(caught.value.fix)
        assert not await objects.keep(put.digest), "whoever needs it must make it again"
        [mark] = await objects.keys(QUARANTINE)
        behind.remove_object(objects.bucket, mark)


@pytest.mark.parametrize("how", ["bytes", "file", "large file", "upload"])
async def test_a_put_of_the_right_bytes_heals(
    objects: Objects, behind: Minio, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MULTIPART_FROM_BYTES", 5 if how == "large file" else 1 << 20)
    put = await rotten(objects, behind)
    if how in ("large file", "upload"):  # its ETag is no MD5, or nobody knows it: it was found by a reader
        with pytest.raises(CorruptBlob):
            await objects.get_bytes(put.digest)
    match how:
        case "bytes":
            await objects.put_bytes(b"weights", KIND)
        case "upload":
            await upload(objects, put.digest, b"weights")
            await objects.adopt("u-1", put.digest, 7)
        case _:
            await objects.put_file(small(tmp_path), KIND)
    assert await objects.get_bytes(put.digest) == b"weights"
    assert await objects.keep(put.digest)
    assert await objects.keys(QUARANTINE) == []


async def test_an_upload_of_wrong_bytes_does_not_replace_a_corrupt_blob(objects: Objects, behind: Minio) -> None:
    put = await rotten(objects, behind, stored=b"short")
    await upload(objects, put.digest, b"damaged")
    with pytest.raises(DigestMismatch):
        await objects.adopt("u-1", put.digest, 7)
    assert await objects.keys(QUARANTINE), "its size gave it away"


@pytest.mark.parametrize(("size", "md5"), [(None, "0" * 32), (99, None)], ids=["etag", "size"])
async def test_a_wrong_claim_about_a_blob_costs_a_look_and_changes_nothing(
    objects: Objects, size: int | None, md5: str | None
) -> None:
    put = await objects.put_bytes(b"weights", KIND)
    assert await objects.keep(put.digest, size, md5)
    assert await objects.keys(QUARANTINE) == []


async def test_a_slow_reader_cannot_condemn_the_copy_that_replaced_what_it_read(
    objects: Objects, behind: Minio
) -> None:
    put = await rotten(objects, behind)
    copy = stat(behind, objects.bucket, blob_key(put.digest))
    assert copy
    await asyncio.sleep(1.1)  # S3 tells seconds
    await objects.put_bytes(b"weights", KIND)
    objects._quarantine.add(put.digest, copy, digest_of(b"rotten!"))  # only now does it say what it saw
    assert await objects.keep(put.digest)
    assert await objects.get_bytes(put.digest) == b"weights"


async def test_readers_and_writers_at_once_end_with_the_right_bytes(objects: Objects, behind: Minio) -> None:
    put = await rotten(objects, behind)

    async def read() -> bytes | None:
        try:
            return await objects.get_bytes(put.digest)
        except CorruptBlob:
            return None

    writes = [objects.put_bytes(b"weights", KIND) for _ in range(8)]
    seen = await asyncio.gather(*(read() for _ in range(8)), *writes)
    assert set(seen[:8]) <= {None, b"weights"}
    assert await objects.get_bytes(put.digest) == b"weights"


async def test_bits_that_changed_on_the_stores_disk_are_found_and_healed(
    s3: S3, objects: Objects, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's ETag is that of the right bytes, before and after."""
    monkeypatch.setattr(verifying, "_ATTEMPTS", 1)
    data = os.urandom(160)  # the store compresses what can be compressed, and then these bytes are nowhere on its disk
    put = await objects.put_bytes(data, KIND)
    async with asyncio.timeout(60):
        while not damage(layout.home("s3"), data):  # noqa: ASYNC110 - the store writes its volumes when it likes
            await asyncio.sleep(0.1)
    store_view = Verifying(settings_of(s3, s3_bucket=objects.bucket))
    finding = await store_view.check(put.digest, Pace(None))
    assert finding.damage is Damage.UNREADABLE
    assert await objects.keep(put.digest, put.size), "it is not in quarantine yet"
    await store_view.mark(put.digest, finding)
    assert await store_view.quarantined() == [put.digest]
    await objects.put_bytes(data, KIND)
    assert await objects.get_bytes(put.digest) == data
    assert (await store_view.check(put.digest, Pace(None))).damage is None
    assert await store_view.quarantined() == []


def damage(home: Path, data: bytes) -> int:
    """Changes some bytes of an object in the files of SeaweedFS. Returns in how many places it was."""
    places = 0
    for volume in home.glob("*.dat"):
        if (at := volume.read_bytes().find(data)) >= 0:
            places += 1
            with volume.open("r+b") as file:
                file.seek(at + 3)
                file.write(b"ROT")
    return places

"""Blobs on a real S3 server: written once and verified on every read."""

from __future__ import annotations

import asyncio
import json
import threading
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest
from integration.kit_small_disk import PASSED, run_on_a_small_disk
from minio import Minio

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import DigestMismatch, NotFound, Unreachable
from slmops.kit.objects.store import MULTIPART_FROM_BYTES, Objects, digest_of_path
from slmops.kit.settings import ObjectSettings

if TYPE_CHECKING:
    from servers import S3

KIND = "application/octet-stream"
MISSING = "sha256:" + "0" * 64


def settings_of(s3: S3, **changes: str) -> ObjectSettings:
    values = {"s3_endpoint": s3.endpoint, "s3_bucket": s3.bucket, "s3_access_key": s3.access_key}
    return ObjectSettings(**(values | {"s3_secret_key": s3.secret_key} | changes))  # type: ignore[arg-type]


@pytest.fixture
async def objects(s3: S3) -> Objects:
    objects = Objects(settings_of(s3, s3_bucket=f"test-{uuid4().hex}"))
    await objects.open()
    return objects


@pytest.fixture
def minio(s3: S3) -> Minio:
    """Returns a client that can change stored objects without our code."""
    return Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False)


def replace(minio: Minio, objects: Objects, digest: Digest, data: bytes) -> None:
    minio.put_object(objects.bucket, blob_key(digest), BytesIO(data), len(data))


def small(tmp_path: Path, data: bytes = b"weights") -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    return path


# ---- writing ----------------------------------------------------------------------------------------------


async def test_a_blob_is_stored_and_read_by_its_digest(objects: Objects, tmp_path: Path) -> None:
    put = await objects.put_bytes(b"hello", "text/plain")
    assert (put.digest, put.size, put.media_type) == (digest_of(b"hello"), 5, "text/plain")
    assert await objects.get_bytes(put.digest) == b"hello"
    assert await objects.exists(put.digest)
    assert not await objects.exists(MISSING)
    assert await objects.keys() == [blob_key(put.digest)]
    file = await objects.put_file(small(tmp_path), KIND)
    assert await objects.get_bytes(file.digest) == b"weights"
    assert await objects.get_bytes((await objects.put_bytes(b"", KIND)).digest) == b""


async def test_putting_a_stored_blob_again_writes_nothing(objects: Objects, minio: Minio, tmp_path: Path) -> None:
    first = await objects.put_bytes(b"weights", KIND)
    written = minio.stat_object(objects.bucket, blob_key(first.digest)).last_modified
    await asyncio.sleep(1.1)  # S3 rounds its times to seconds
    assert await objects.put_bytes(b"weights", KIND) == first
    assert (await objects.put_file(small(tmp_path), KIND)).digest == first.digest
    assert minio.stat_object(objects.bucket, blob_key(first.digest)).last_modified == written


async def test_the_s3_server_refuses_a_conditional_second_write(objects: Objects, minio: Minio) -> None:
    put = await objects.put_bytes(b"weights", KIND)
    url = minio.presigned_put_object(objects.bucket, blob_key(put.digest))
    async with httpx.AsyncClient() as client:
        answer = await client.put(url, content=b"others", headers={"If-None-Match": "*"})
    assert answer.status_code == 412
    assert await objects.get_bytes(put.digest) == b"weights"


async def test_concurrent_writers_of_one_blob_all_succeed(objects: Objects) -> None:
    found = await asyncio.gather(*(objects.put_bytes(b"weights", KIND) for _ in range(8)))
    assert found == found[:1] * 8
    assert await objects.get_bytes(found[0].digest) == b"weights"


async def test_a_large_file_is_uploaded_in_parts_and_read_back_unchanged(
    objects: Objects, minio: Minio, tmp_path: Path
) -> None:
    large = tmp_path / "large.bin"
    with large.open("wb") as out:
        out.write(b"first")
        out.truncate(MULTIPART_FROM_BYTES + 5)
        out.seek(MULTIPART_FROM_BYTES)
        out.write(b"last!")
    put = await objects.put_file(large, KIND)
    assert (put.digest, put.size) == digest_of_path(large) == digest_of_path(large)
    etag = minio.stat_object(objects.bucket, blob_key(put.digest)).etag
    assert str(etag).endswith("-5"), "four parts of 16 MiB and the rest"
    target = tmp_path / "fetched" / "large.bin"
    await objects.get_file(put.digest, target)
    assert digest_of_path(target) == (put.digest, put.size)
    assert [p.name for p in target.parent.iterdir()] == ["large.bin"]


async def test_an_object_outside_the_blobs_may_be_overwritten(objects: Objects) -> None:
    assert await objects.get_object("cache/x") is None
    for data in (b"one", b"two"):
        await objects.put_object("cache/x", data)
        assert await objects.get_object("cache/x") == data


# ---- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [b"changed", b"weight", b"weights and more", b""])
async def test_a_blob_that_was_changed_in_the_store_is_refused(
    objects: Objects, minio: Minio, tmp_path: Path, stored: bytes
) -> None:
    put = await objects.put_bytes(b"weights", KIND)
    replace(minio, objects, put.digest, stored)
    with pytest.raises(DigestMismatch) as caught:
        await objects.get_bytes(put.digest)
    assert blob_key(put.digest) in str(caught.value.where)
    with pytest.raises(DigestMismatch):
        await objects.get_file(put.digest, tmp_path / "fetched")
    assert list(tmp_path.iterdir()) == []


async def test_a_missing_blob_or_bucket_is_not_found(objects: Objects, s3: S3, tmp_path: Path) -> None:
    for attempt in (
        objects.get_bytes(MISSING),
        objects.get_file(MISSING, tmp_path / "x"),
        objects.adopt("u", MISSING, 1),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFound):
        await Objects(settings_of(s3, s3_bucket="no-such-bucket")).get_bytes(MISSING)


async def test_an_existing_file_is_replaced_only_after_the_new_content_is_verified(
    objects: Objects, minio: Minio, tmp_path: Path
) -> None:
    target = small(tmp_path, b"old")
    put = await objects.put_bytes(b"weights", KIND)
    replace(minio, objects, put.digest, b"changed")
    with pytest.raises(DigestMismatch):
        await objects.get_file(put.digest, target)
    assert target.read_bytes() == b"old"


async def test_a_presigned_url_gives_the_whole_blob_or_a_range_without_keys(objects: Objects) -> None:
    put = await objects.put_bytes(bytes(range(100)), KIND)
    url = await objects.presigned_get(put.digest)
    async with httpx.AsyncClient() as client:
        assert (await client.get(url)).content == bytes(range(100))
        part = await client.get(url, headers={"Range": "bytes=90-"})
        without = await client.get(url.partition("?")[0])
    assert (part.status_code, part.content) == (206, bytes(range(90, 100)))
    assert part.headers["Content-Range"] == "bytes 90-99/100"
    assert without.status_code == 403


# ---- uploads by clients -----------------------------------------------------------------------------------


async def upload(objects: Objects, digest: Digest, data: bytes, name: str = "u-1") -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.put(await objects.presigned_upload(name, digest), content=data)
    assert answer.status_code == 200


async def test_an_upload_becomes_a_blob_after_it_is_verified(objects: Objects) -> None:
    digest = digest_of(b"weights")
    await upload(objects, digest, b"weights")
    assert not await objects.exists(digest)
    await objects.adopt("u-1", digest, 7)
    assert await objects.keys() == [blob_key(digest)]
    assert await objects.get_bytes(digest) == b"weights"


@pytest.mark.parametrize(("data", "size_bytes"), [(b"damaged", 7), (b"weights", 8)], ids=["bytes", "size"])
async def test_an_upload_with_another_digest_or_size_is_refused_and_deleted(
    objects: Objects, data: bytes, size_bytes: int
) -> None:
    await upload(objects, digest_of(b"weights"), data)
    with pytest.raises(DigestMismatch) as caught:
        await objects.adopt("u-1", digest_of(b"weights"), size_bytes)
    assert caught.value.fix
    assert await objects.keys() == []


async def test_an_upload_of_a_stored_blob_is_discarded(objects: Objects) -> None:
    digest = (await objects.put_bytes(b"weights", KIND)).digest
    await upload(objects, digest, b"damaged")
    await objects.adopt("u-1", digest, 7)
    assert await objects.get_bytes(digest) == b"weights"
    assert await objects.keys("blobs/") == [blob_key(digest)]
    assert await objects.keys("uploads/") == []


async def test_two_uploads_of_the_same_blob_are_independent(objects: Objects) -> None:
    digest = digest_of(b"weights")
    await upload(objects, digest, b"damaged", "u-1")
    await upload(objects, digest, b"weights", "u-2")
    await objects.adopt("u-2", digest, 7)
    assert await objects.get_bytes(digest) == b"weights"


async def test_an_upload_that_changes_after_it_was_verified_is_not_adopted(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(b"weights")
    await upload(objects, digest, b"weights")
    url = await objects.presigned_upload("u-1", digest)
    verify = objects._digest
    overwritten = threading.Event()

    def verify_then_change(key: str) -> object:
        found = verify(key)
        if not overwritten.is_set():
            assert httpx.put(url, content=b"damaged").status_code == 200
            overwritten.set()
        return found

    monkeypatch.setattr(objects, "_digest", verify_then_change)
    with pytest.raises(DigestMismatch):
        await objects.adopt("u-1", digest, 7)
    assert overwritten.is_set()
    assert await objects.keys() == []


# ---- faults -----------------------------------------------------------------------------------------------


async def test_an_unreachable_store_is_an_error_with_a_fix(s3: S3, tmp_path: Path) -> None:
    unreachable = Objects(settings_of(s3, s3_endpoint="127.0.0.1:1"))
    for attempt in (
        unreachable.open(),
        unreachable.put_bytes(b"x", KIND),
        unreachable.put_file(small(tmp_path), KIND),
        unreachable.get_bytes(MISSING),
        unreachable.get_file(MISSING, tmp_path / "x"),
        unreachable.adopt("u-1", MISSING, 1),
    ):
        async with asyncio.timeout(10):
            with pytest.raises(Unreachable) as caught:
                await attempt
        assert caught.value.where == "127.0.0.1:1"
        assert "SLMOPS_S3_ENDPOINT" in str(caught.value.fix)


async def test_the_error_for_refused_keys_does_not_contain_the_secret(s3: S3) -> None:
    refused = Objects(settings_of(s3, s3_access_key="AKIAEXAMPLE", s3_secret_key="hunter2"))
    for attempt in (refused.get_bytes(MISSING), refused.put_bytes(b"x", KIND)):
        with pytest.raises(Unreachable) as caught:
            await attempt
        assert "hunter2" not in str(caught.value)


async def test_a_full_disk_is_an_error_and_leaves_no_partial_file(objects: Objects, s3: S3, tmp_path: Path) -> None:
    put = await objects.put_bytes(bytes(2 << 20), KIND)
    keys = {"s3_access_key": s3.access_key, "s3_secret_key": s3.secret_key}
    settings = json.dumps({"s3_endpoint": s3.endpoint, "s3_bucket": objects.bucket} | keys)
    disk = tmp_path / "disk"
    done = await asyncio.to_thread(run_on_a_small_disk, disk, "objects", put.digest, stdin=settings)
    assert done.strip() == PASSED

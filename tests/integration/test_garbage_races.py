"""Uploads and garbage collection at the same time on a real S3 server: no live blob is lost, no orphan stays."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from integration.test_kit_objects import settings_of
from minio import Minio

from slmops.contracts.addresses import blob_key
from slmops.contracts.commands import CollectGarbage, GarbageReport
from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.errors import Unreachable
from slmops.kit.objects import sweeps
from slmops.kit.objects.collecting import Collecting
from slmops.kit.objects.store import Objects
from slmops.kit.objects.sweeps import SWEEPS
from slmops.optimizer.store import Outcome, Results
from slmops.registry.garbage import Collector

if TYPE_CHECKING:
    from servers import S3

KIND = "application/octet-stream"
GRACE = timedelta(seconds=1)
OLD_S = 3.1
"""Seconds after which a blob is older than `GRACE`, although S3 rounds its times to seconds."""


class ShiftedClock(Collecting):
    """A store whose collector reads a clock that is `by` ahead."""

    by = timedelta(0)

    async def now(self) -> datetime:
        return await super().now() + self.by


@dataclass
class Bucket:
    """A bucket of its own. `live` counts the references to each digest, as a registry would."""

    objects: Objects
    store: ShiftedClock
    minio: Minio
    live: Counter[Digest] = field(default_factory=Counter)

    async def marked(self, _since: datetime) -> Collection[Digest]:
        return {digest for digest, names in self.live.items() if names > 0}

    async def collect(self, **how: Any) -> GarbageReport:
        return await Collector(self.store, self.marked).collect(CollectGarbage(**({"grace": GRACE} | how)))

    async def put(self, text: str) -> Descriptor:
        return await self.objects.put_bytes(text.encode(), KIND)

    async def old(self, text: str) -> Digest:
        """Puts a blob without references whose last use is an hour ago for the collector."""
        self.store.by = timedelta(hours=1)
        return (await self.put(text)).digest


@pytest.fixture
async def bucket(s3: S3) -> Bucket:
    # A push waits for a sweep in a thread of this executor: each of the many pushers needs one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(40))
    settings = settings_of(s3, s3_bucket=f"garbage-{uuid4().hex}")
    objects = Objects(settings)
    await objects.open()
    return Bucket(objects, ShiftedClock(settings), Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False))


class Paused:
    """Pauses a collector between its last check of the garbage and the deletion, until `resume` is set."""

    def __init__(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checked, self.resume = threading.Event(), threading.Event()
        delete = bucket.store._delete

        def later(keys: list[str]) -> None:
            if keys:
                self.checked.set()
                assert self.resume.wait(30)
            delete(keys)

        monkeypatch.setattr(bucket.store, "_delete", later)


# ---- one at a time ----------------------------------------------------------------------------------------


async def test_only_old_blobs_without_references_and_recent_use_are_removed(bucket: Bucket, tmp_path: Path) -> None:
    texts = ("named", "forgotten", "put", "filed", "kept", "pushed")
    digests = {text: (await bucket.put(text)).digest for text in texts}
    bucket.live[digests["named"]] += 1
    await asyncio.sleep(OLD_S)
    young = await bucket.put("young")
    dry = await bucket.collect(dry_run=True)
    assert (dry.live.objects, dry.young.objects, dry.garbage.objects, dry.removed) == (1, 1, 5, None)
    assert dry.garbage.size_bytes == sum(map(len, texts[1:]))

    await bucket.put("put")
    (tmp_path / "file").write_text("filed")
    await bucket.objects.put_file(tmp_path / "file", KIND)
    assert await bucket.objects.keep(digests["kept"])
    await bucket.objects.adopt("u-1", digests["pushed"], len("pushed"))
    report = await bucket.collect()
    assert (report.live.objects, report.young.objects) == (1, 5)
    assert report.removed == report.garbage
    left = {digest for text, digest in digests.items() if text != "forgotten"} | {young.digest}
    assert await bucket.objects.keys("blobs/") == sorted(map(blob_key, left))
    assert not await bucket.objects.keep(digests["forgotten"])
    assert (await bucket.put("forgotten")).digest == digests["forgotten"]
    assert await bucket.objects.get_bytes(digests["forgotten"]) == b"forgotten"


async def test_expired_claims_are_removed_and_referenced_blobs_stay(bucket: Bucket) -> None:
    kept, gone = [(await bucket.put(text)).digest for text in ("kept", "gone")]
    for text in ("kept", "gone"):
        await bucket.put(text)  # again: now each has a claim
    assert len(await bucket.objects.keys("claims/")) == 2
    bucket.live[kept] += 1
    bucket.store.by = timedelta(hours=1)
    await bucket.collect()
    assert await bucket.objects.keys() == [blob_key(kept)]
    assert not await bucket.objects.exists(gone)


@pytest.mark.parametrize("how", ["put", "pushed"])
async def test_a_blob_that_is_put_during_its_deletion_exists_afterwards(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    digest = await bucket.old("wanted")
    paused = Paused(bucket, monkeypatch)
    collecting = asyncio.create_task(bucket.collect())
    assert await asyncio.to_thread(paused.checked.wait, 10)
    if how == "put":
        putting: asyncio.Task[object] = asyncio.create_task(bucket.put("wanted"))
    else:
        bucket.minio.put_object(bucket.objects.bucket, f"uploads/u-1/{digest[7:]}", BytesIO(b"wanted"), 6)
        putting = asyncio.create_task(bucket.objects.adopt("u-1", digest, 6))
    await asyncio.sleep(0.5)
    assert not putting.done(), "a put must not return before the deletion ends"
    paused.resume.set()
    await putting
    report = await collecting
    assert report.removed and report.removed.objects == 1
    assert await bucket.objects.get_bytes(digest) == b"wanted"


async def test_a_paused_collector_does_not_delete_a_blob_that_was_deleted_and_put_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await bucket.old("wanted")
    paused = Paused(bucket, monkeypatch)
    first = asyncio.create_task(bucket.collect())
    assert await asyncio.to_thread(paused.checked.wait, 10)
    bucket.minio.remove_object(bucket.objects.bucket, blob_key(digest))  # as another collector does
    putting = asyncio.create_task(bucket.put("wanted"))
    await asyncio.sleep(0.5)
    paused.resume.set()
    await asyncio.gather(first, putting)
    assert await bucket.objects.get_bytes(digest) == b"wanted"


async def test_a_collector_that_crashes_before_deleting_leaves_a_consistent_store(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, wanted = (await bucket.put("named")).digest, await bucket.old("wanted")
    bucket.live[named] += 1

    def crash(keys: list[str]) -> None:
        if keys:
            raise Unreachable("killed")

    with monkeypatch.context() as patch:
        patch.setattr(bucket.store, "_delete", crash)
        with pytest.raises(Unreachable):
            await bucket.collect()
    [sweep] = await bucket.objects.keys(SWEEPS)
    monkeypatch.setattr(sweeps, "LEASE_S", 1.0)
    began = time.monotonic()
    await bucket.put("wanted")  # waits for the lease of the crashed collector, which may still be alive
    assert time.monotonic() - began >= 1
    assert await bucket.objects.get_bytes(wanted) == b"wanted"
    await bucket.collect()
    assert await bucket.objects.keys() == [blob_key(named)], f"{sweep} and every other temporary object is removed"


async def test_nothing_is_deleted_when_the_store_is_slower_than_the_lease(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await bucket.old("forgotten")
    monkeypatch.setattr(sweeps, "LEASE_S", 0.0)
    with pytest.raises(Unreachable, match="too slow"):
        await bucket.collect()
    assert await bucket.objects.keys() == [blob_key(digest)]


async def test_unregistered_uploads_are_removed_when_they_are_old(bucket: Bucket) -> None:
    name, wanted = bucket.objects.bucket, digest_of(b"upload")
    bucket.minio.put_object(name, f"uploads/u-1/{wanted[7:]}", BytesIO(b"upload"), 6)
    parts = bucket.minio._create_multipart_upload(name, blob_key(wanted), {})
    bucket.minio._upload_part(name, blob_key(wanted), bytes(5 << 20), {}, parts, 1)
    await asyncio.sleep(OLD_S)
    fresh = f"uploads/u-2/{wanted[7:]}"
    bucket.minio.put_object(name, fresh, BytesIO(b"upload"), 6)
    unfinished = bucket.minio._create_multipart_upload(name, blob_key(wanted), {})
    report = await bucket.collect()
    assert (report.uploads.objects, report.uploads.size_bytes) == (1, 6)
    assert await bucket.objects.keys() == [fresh]
    assert [u.upload_id for u in bucket.minio._list_multipart_uploads(name).uploads] == [unfinished]


async def test_a_cached_optimizer_result_is_forgotten_when_its_blobs_are_collected(bucket: Bucket) -> None:
    results = Results(bucket.objects, lambda: digest_of(b"here"))
    report, picture = await bucket.put("report"), await bucket.put("picture")
    outcome = Outcome(variants=(), reason="none passed", report=report, pictures=(picture,))
    await results.put_outcome("work", outcome)
    bucket.live.update({report.digest: 1, picture.digest: 1})
    bucket.store.by = timedelta(hours=1)
    await bucket.collect()
    assert await results.outcome("work") == outcome
    bucket.live.clear()  # its version is retired

    bucket.store.by = timedelta(0)
    await bucket.collect()
    assert await results.outcome("work") == outcome, "a job that reads it has the grace period to reference it"
    bucket.store.by = timedelta(hours=1)
    await bucket.collect()
    assert await bucket.objects.keys("blobs/") == []
    assert await results.outcome("work") is None


async def test_a_collection_removes_at_most_the_requested_number_of_blobs(bucket: Bucket) -> None:
    await asyncio.gather(*(bucket.old(f"blob {number}") for number in range(70)))
    first = await bucket.collect(at_most=40)
    assert first.garbage.objects == 70
    assert first.removed and first.removed.objects == 40
    second = await bucket.collect(at_most=40)
    assert second.removed and second.removed.objects == second.garbage.objects == 30


# ---- many at the same time --------------------------------------------------------------------------------


@dataclass
class Pusher:
    """Puts blobs from a small set, references each within the grace period, and later drops the reference."""

    bucket: Bucket
    rng: random.Random
    universe: int
    done: int = 0

    async def run(self, going: Callable[[], bool]) -> None:
        while going():
            digest = await self.named(f"blob {self.rng.randrange(self.universe)}")
            if self.rng.random() < 0.7:
                await asyncio.sleep(self.rng.uniform(0, 0.1))
                await self.bucket.objects.get_bytes(digest)  # a live blob is complete
                self.bucket.live[digest] -= 1
            self.done += 1

    async def named(self, text: str) -> Digest:
        """Puts a blob and references it. Repeats a put that is slower than the grace period, as real clients must."""
        while True:
            began = time.monotonic()
            put = await self.wanted(text)
            if time.monotonic() - began < GRACE.total_seconds():
                self.bucket.live[put] += 1
                return put

    async def wanted(self, text: str) -> Digest:
        digest = digest_of(text.encode())
        match self.rng.randrange(8):
            case 0 | 1 if await self.bucket.objects.keep(digest):
                return digest
            case 2:
                upload = uuid4().hex
                async with httpx.AsyncClient() as http:
                    url = await self.bucket.objects.presigned_upload(upload, digest)
                    assert (await http.put(url, content=text.encode())).status_code == 200
                await self.bucket.objects.adopt(upload, digest, len(text))
                return digest
        return (await self.bucket.put(text)).digest


async def push_and_collect(
    bucket: Bucket, seconds: float, pushers: int, collectors: int, universe: int, least: int
) -> None:
    """Pushes and collects for `seconds`, and on a slow machine until `least` pushes and some removals are done."""
    until = time.monotonic() + seconds
    pushing = [Pusher(bucket, random.Random(seed), universe) for seed in range(pushers)]
    removed = 0

    def going() -> bool:
        return time.monotonic() < until or sum(p.done for p in pushing) < least or removed <= universe / 4

    async def collecting() -> None:
        nonlocal removed
        while going():
            report = await bucket.collect()
            assert report.removed is not None
            assert report.missing == 0
            removed += report.removed.objects

    await asyncio.gather(*(p.run(going) for p in pushing), *(collecting() for _ in range(collectors)))
    print(f"{sum(pusher.done for pusher in pushing)} pushes, {removed} blobs removed")


async def assert_only_live_blobs_remain(bucket: Bucket) -> None:
    """Asserts that every referenced blob is complete, and that a collection after the grace period removes the rest."""
    live = await bucket.marked(datetime.max)
    assert live
    for digest in live:
        await bucket.objects.get_bytes(digest)
    await asyncio.sleep(OLD_S)
    await bucket.collect()
    assert await bucket.objects.keys() == sorted(map(blob_key, live))


async def test_concurrent_pushers_and_collectors_lose_no_live_blob_and_leave_no_orphan(bucket: Bucket) -> None:
    await push_and_collect(bucket, seconds=4, pushers=8, collectors=2, universe=150, least=60)
    await assert_only_live_blobs_remain(bucket)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_concurrent_pushers_and_collectors_for_four_minutes(bucket: Bucket) -> None:
    await push_and_collect(bucket, seconds=240, pushers=16, collectors=3, universe=1500, least=2_000)
    await assert_only_live_blobs_remain(bucket)

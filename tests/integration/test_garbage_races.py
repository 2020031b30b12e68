"""Putting and collecting at once, on a real S3 server: nothing that somebody needs is lost, nothing else stays."""

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
"""After so long a blob is older than `GRACE`, whichever seconds S3 tells."""


class Ahead(Collecting):
    """For who collects, so much time has passed."""

    by = timedelta(0)

    async def now(self) -> datetime:
        return await super().now() + self.by


@dataclass
class Yard:
    """A bucket of its own. `live` is what a registry would say: digests, as often as something names them."""

    objects: Objects
    store: Ahead
    behind: Minio
    live: Counter[Digest] = field(default_factory=Counter)

    async def marked(self, _since: datetime) -> Collection[Digest]:
        return {digest for digest, names in self.live.items() if names > 0}

    async def collect(self, **how: Any) -> GarbageReport:
        return await Collector(self.store, self.marked).collect(CollectGarbage(**({"grace": GRACE} | how)))

    async def put(self, text: str) -> Descriptor:
        return await self.objects.put_bytes(text.encode(), KIND)

    async def old(self, text: str) -> Digest:
        """A blob that nobody names or has wanted for an hour."""
        self.store.by = timedelta(hours=1)
        return (await self.put(text)).digest


@pytest.fixture
async def yard(s3: S3) -> Yard:
    # Who waits for a sweep does so in a thread, which here all pushers share.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(40))
    settings = settings_of(s3, s3_bucket=f"yard-{uuid4().hex}")
    objects = Objects(settings)
    await objects.open()
    return Yard(objects, Ahead(settings), Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False))


class Paused:
    """A collector that has looked at what it condemned and deletes it only when it is told to."""

    def __init__(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked, self.go_on = threading.Event(), threading.Event()
        delete = yard.store._delete

        def later(keys: list[str]) -> None:
            if keys:
                self.looked.set()
                assert self.go_on.wait(30)
            delete(keys)

        monkeypatch.setattr(yard.store, "_delete", later)


# ---- one by one -------------------------------------------------------------------------------------------


async def test_only_what_nobody_names_and_wanted_goes(yard: Yard, tmp_path: Path) -> None:
    texts = ("named", "forgotten", "put", "filed", "kept", "pushed")
    digests = {text: (await yard.put(text)).digest for text in texts}
    yard.live[digests["named"]] += 1
    await asyncio.sleep(OLD_S)
    young = await yard.put("young")
    dry = await yard.collect(dry_run=True)
    assert (dry.live.objects, dry.young.objects, dry.garbage.objects, dry.removed) == (1, 1, 5, None)
    assert dry.garbage.size_bytes == sum(map(len, texts[1:]))

    await yard.put("put")
    (tmp_path / "file").write_text("filed")
    await yard.objects.put_file(tmp_path / "file", KIND)
    assert await yard.objects.keep(digests["kept"])
    await yard.objects.adopt("u-1", digests["pushed"], len("pushed"))
    report = await yard.collect()
    assert (report.live.objects, report.young.objects) == (1, 5)
    assert report.removed == report.garbage
    left = {digest for text, digest in digests.items() if text != "forgotten"} | {young.digest}
    assert await yard.objects.keys("blobs/") == sorted(map(blob_key, left))
    assert not await yard.objects.keep(digests["forgotten"])
    assert (await yard.put("forgotten")).digest == digests["forgotten"]
    assert await yard.objects.get_bytes(digests["forgotten"]) == b"forgotten"


async def test_a_claim_is_tidied_away_and_a_named_blob_stays(yard: Yard) -> None:
    kept, gone = [(await yard.put(text)).digest for text in ("kept", "gone")]
    for text in ("kept", "gone"):
        await yard.put(text)  # again: now each has a claim
    assert len(await yard.objects.keys("claims/")) == 2
    yard.live[kept] += 1
    yard.store.by = timedelta(hours=1)
    await yard.collect()
    assert await yard.objects.keys() == [blob_key(kept)]
    assert not await yard.objects.exists(gone)


@pytest.mark.parametrize("how", ["put", "pushed"])
async def test_a_blob_that_is_put_while_it_is_being_deleted_is_there_afterwards(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    digest = await yard.old("wanted")
    paused = Paused(yard, monkeypatch)
    collecting = asyncio.create_task(yard.collect())
    assert await asyncio.to_thread(paused.looked.wait, 10)
    if how == "put":
        putting: asyncio.Task[object] = asyncio.create_task(yard.put("wanted"))
    else:
        yard.behind.put_object(yard.objects.bucket, f"uploads/u-1/{digest[7:]}", BytesIO(b"wanted"), 6)
        putting = asyncio.create_task(yard.objects.adopt("u-1", digest, 6))
    await asyncio.sleep(0.5)
    assert not putting.done(), "who puts it must not say that it is there"
    paused.go_on.set()
    await putting
    report = await collecting
    assert report.removed and report.removed.objects == 1
    assert await yard.objects.get_bytes(digest) == b"wanted"


async def test_a_blob_that_another_collector_deleted_and_somebody_put_again_is_safe_from_the_first(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await yard.old("wanted")
    paused = Paused(yard, monkeypatch)
    first = asyncio.create_task(yard.collect())
    assert await asyncio.to_thread(paused.looked.wait, 10)
    yard.behind.remove_object(yard.objects.bucket, blob_key(digest))  # as another collector does
    putting = asyncio.create_task(yard.put("wanted"))
    await asyncio.sleep(0.5)
    paused.go_on.set()
    await asyncio.gather(first, putting)
    assert await yard.objects.get_bytes(digest) == b"wanted"


async def test_a_collector_that_dies_half_way_leaves_a_sound_store(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    named, wanted = (await yard.put("named")).digest, await yard.old("wanted")
    yard.live[named] += 1

    def die(keys: list[str]) -> None:
        if keys:
            raise Unreachable("killed")

    with monkeypatch.context() as dying:
        dying.setattr(yard.store, "_delete", die)
        with pytest.raises(Unreachable):
            await yard.collect()
    [sweep] = await yard.objects.keys(SWEEPS)
    monkeypatch.setattr(sweeps, "LEASE_S", 1.0)
    began = time.monotonic()
    await yard.put("wanted")  # waits for the dead: it may not be dead
    assert time.monotonic() - began >= 1
    assert await yard.objects.get_bytes(wanted) == b"wanted"
    await yard.collect()
    assert await yard.objects.keys() == [blob_key(named)], f"{sweep} is over, and so is everything else"


async def test_a_store_that_is_too_slow_to_delete_safely_is_left_alone(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await yard.old("forgotten")
    monkeypatch.setattr(sweeps, "LEASE_S", 0.0)
    with pytest.raises(Unreachable, match="too slow"):
        await yard.collect()
    assert await yard.objects.keys() == [blob_key(digest)]


async def test_uploads_that_nobody_registered_go_when_they_are_old(yard: Yard) -> None:
    bucket, wanted = yard.objects.bucket, digest_of(b"upload")
    yard.behind.put_object(bucket, f"uploads/u-1/{wanted[7:]}", BytesIO(b"upload"), 6)
    parts = yard.behind._create_multipart_upload(bucket, blob_key(wanted), {})
    yard.behind._upload_part(bucket, blob_key(wanted), bytes(5 << 20), {}, parts, 1)
    await asyncio.sleep(OLD_S)
    fresh = f"uploads/u-2/{wanted[7:]}"
    yard.behind.put_object(bucket, fresh, BytesIO(b"upload"), 6)
    going_on = yard.behind._create_multipart_upload(bucket, blob_key(wanted), {})
    report = await yard.collect()
    assert (report.uploads.objects, report.uploads.size_bytes) == (1, 6)
    assert await yard.objects.keys() == [fresh]
    assert [u.upload_id for u in yard.behind._list_multipart_uploads(bucket).uploads] == [going_on]


async def test_what_the_optimizer_remembers_of_collected_blobs_is_no_longer_known(yard: Yard) -> None:
    results = Results(yard.objects, lambda: digest_of(b"here"))
    report, picture = await yard.put("report"), await yard.put("picture")
    outcome = Outcome(variants=(), reason="none passed", report=report, pictures=(picture,))
    await results.put_outcome("work", outcome)
    yard.live.update({report.digest: 1, picture.digest: 1})
    yard.store.by = timedelta(hours=1)
    await yard.collect()
    assert await results.outcome("work") == outcome
    yard.live.clear()  # its version is retired

    yard.store.by = timedelta(0)
    await yard.collect()
    assert await results.outcome("work") == outcome, "a job that finds it has the grace period to tell of it"
    yard.store.by = timedelta(hours=1)
    await yard.collect()
    assert await yard.objects.keys("blobs/") == []
    assert await results.outcome("work") is None


async def test_as_much_is_removed_as_was_asked_for(yard: Yard) -> None:
    await asyncio.gather(*(yard.old(f"blob {number}") for number in range(70)))
    first = await yard.collect(at_most=40)
    assert first.garbage.objects == 70
    assert first.removed and first.removed.objects == 40
    second = await yard.collect(at_most=40)
    assert second.removed and second.removed.objects == second.garbage.objects == 30


# ---- many at once -----------------------------------------------------------------------------------------


@dataclass
class Pusher:
    """Puts blobs out of few different ones, names each within the grace period, and gives it up after a while."""

    yard: Yard
    chance: random.Random
    universe: int
    done: int = 0

    async def run(self, going: Callable[[], bool]) -> None:
        while going():
            digest = await self.named(f"blob {self.chance.randrange(self.universe)}")
            if self.chance.random() < 0.7:
                await asyncio.sleep(self.chance.uniform(0, 0.1))
                await self.yard.objects.get_bytes(digest)  # a live blob is there, whole
                self.yard.live[digest] -= 1
            self.done += 1

    async def named(self, text: str) -> Digest:
        """As the protocol asks: what took longer than the grace period is put again."""
        while True:
            began = time.monotonic()
            put = await self.wanted(text)
            if time.monotonic() - began < GRACE.total_seconds():
                self.yard.live[put] += 1
                return put

    async def wanted(self, text: str) -> Digest:
        digest = digest_of(text.encode())
        match self.chance.randrange(8):
            case 0 | 1 if await self.yard.objects.keep(digest):
                return digest
            case 2:
                upload = uuid4().hex
                async with httpx.AsyncClient() as http:
                    url = await self.yard.objects.presigned_upload(upload, digest)
                    assert (await http.put(url, content=text.encode())).status_code == 200
                await self.yard.objects.adopt(upload, digest, len(text))
                return digest
        return (await self.yard.put(text)).digest


async def press(yard: Yard, seconds: float, pushers: int, collectors: int, universe: int, least: int) -> None:
    """Push and collect for so long, and on a slow machine until `least` pushes and some removals were done."""
    until = time.monotonic() + seconds
    pushing = [Pusher(yard, random.Random(seed), universe) for seed in range(pushers)]
    removed = 0

    def going() -> bool:
        return time.monotonic() < until or sum(p.done for p in pushing) < least or removed <= universe / 4

    async def collecting() -> None:
        nonlocal removed
        while going():
            report = await yard.collect()
            assert report.removed is not None
            assert report.missing == 0
            removed += report.removed.objects

    await asyncio.gather(*(p.run(going) for p in pushing), *(collecting() for _ in range(collectors)))
    print(f"{sum(pusher.done for pusher in pushing)} pushes, {removed} blobs removed")


async def settle(yard: Yard) -> None:
    """Everything that is named is there, whole; after a grace period and a collection nothing else is."""
    live = await yard.marked(datetime.max)
    assert live
    for digest in live:
        await yard.objects.get_bytes(digest)
    await asyncio.sleep(OLD_S)
    await yard.collect()
    assert await yard.objects.keys() == sorted(map(blob_key, live))


async def test_pushers_and_collectors_at_once_lose_no_live_blob_and_leave_no_orphan(yard: Yard) -> None:
    await press(yard, seconds=4, pushers=8, collectors=2, universe=150, least=60)
    await settle(yard)


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_the_same_for_minutes(yard: Yard) -> None:
    await press(yard, seconds=240, pushers=16, collectors=3, universe=1500, least=2_000)
    await settle(yard)

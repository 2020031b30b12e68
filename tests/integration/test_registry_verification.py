"""Damaged blobs are found, named with what needs them, and healed: by hand, by a push, and by the registry's
schedule."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.artifact_world import GOLDEN
from integration.console_cli import Cli
from integration.garbage_world import Site, registry_settings, running_site
from integration.kit_world import World, world_on
from minio import Minio
from tiny_model import make_gguf

from slmops.contracts.addresses import blob_key
from slmops.contracts.commands import DescribeStorage, ListVersions, StorageStatus, VerifyStorage
from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import CorruptBlob, Unreachable
from slmops.kit.journal import Journal
from slmops.kit.objects.collecting import Collecting
from slmops.kit.objects.quarantine import QUARANTINE
from slmops.kit.objects.store import Objects
from slmops.kit.objects.verifying import Verifying
from slmops.kit.settings import ObjectSettings
from slmops.registry.chores import AGAIN_AFTER, HELD, Chore, Chores
from slmops.registry.garbage import Collector
from slmops.registry.marker import Marker
from slmops.registry.settings import Settings
from slmops.registry.storage import COLLECT, FORGET, VERIFY, Storage
from slmops.registry.store import MIGRATIONS, project, schema
from slmops.registry.verification import Verifier

if TYPE_CHECKING:
    from servers import S3, NatsServer

T0 = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def settings(world: World, s3: S3, tmp_path: Path) -> Settings:
    return registry_settings(world, s3, tmp_path)


@pytest.fixture
async def site(world: World, settings: Settings) -> AsyncIterator[Site]:
    async with running_site(world, settings) as site:
        yield site


@pytest.fixture
def behind(s3: S3) -> Minio:
    return Minio(s3.endpoint, s3.access_key, s3.secret_key, secure=False)


def spoil(behind: Minio, objects: Objects, digest: Digest, data: bytes = b"rotten") -> None:
    behind.put_object(objects.bucket, blob_key(digest), BytesIO(data), len(data))


async def test_a_push_of_the_same_files_heals_what_nobody_had_noticed(
    site: Site, behind: Minio, tmp_path: Path
) -> None:
    path, slmops = make_gguf(tmp_path / "tiny.gguf", rows=400), Cli(site.world)
    push = ("model", "push", str(path), "--name", "pushed", "--version", "1.0.0")
    assert (await slmops(*push)).exit_code == 0
    digest = digest_of(path.read_bytes())
    size = path.stat().st_size
    spoil(behind, site.objects, digest, b"x" * size)  # only its ETag gives it away
    again = await slmops(*push)
    assert again.exit_code == 0
    assert "upload" in again.err
    assert await site.objects.get_bytes(digest) == path.read_bytes()

    behind.remove_object(site.objects.bucket, blob_key(digest))
    assert (await slmops(*push)).exit_code == 0
    assert await site.objects.get_bytes(digest) == path.read_bytes()
    third = await slmops(*push)
    assert "upload" not in third.err, "nothing is sent that is there"
    assert len((await site.operator.client.request(ListVersions(model="pushed"))).versions) == 1


async def test_damaged_blobs_are_listed_with_what_needs_them_and_restored_from_copies(
    site: Site, behind: Minio, tmp_path: Path
) -> None:
    await site.operator.push("1.0.0", {"model.gguf": b"GGUF whole", "tokenizer.json": b"{}"}, GOLDEN)
    package = await site.package(variant := await site.variant("1.0.0", b"int4"))
    layer, config = variant.files[0].digest, digest_of(f"config {variant.digest}".encode())
    pushed, report = digest_of(b"GGUF whole"), variant.report.digest
    orphan = (await site.objects.put_bytes(b"nobody's", "x/y")).digest
    for digest in (pushed, layer, orphan):
        spoil(behind, site.objects, digest)
    for digest in (config, report):
        behind.remove_object(site.objects.bucket, blob_key(digest))
    copies = tmp_path / "layout" / "blobs" / "sha256"
    copies.mkdir(parents=True)
    (copies / layer.removeprefix("sha256:")).write_bytes(b"int4")
    (copies / config.removeprefix("sha256:")).write_bytes(b"not the config")
    (copies / orphan.removeprefix("sha256:")).write_bytes(b"nobody's")
    (tmp_path / "layout" / "any name.json").write_bytes(b'{"kl": 0.25}')
    behind.put_object(site.objects.bucket, f"uploads/u-1/{pushed[7:]}", BytesIO(b"GGUF whole"), 10)

    slmops = Cli(site.world)
    seen = await slmops("storage", "verify", "--json")
    assert seen.exit_code == 1
    found = {blob["digest"]: blob for blob in seen.json["damaged"]}
    assert {digest: blob["damage"] for digest, blob in found.items()} == {
        **dict.fromkeys((pushed, layer, orphan), "corrupt"),
        **dict.fromkeys((config, report), "missing"),
    }
    assert found[layer]["needed_by"] == ["smollm2:1.0.0 (packages)", "smollm2:1.0.0 (variants)"]
    assert found[config]["needed_by"] == ["smollm2:1.0.0 (packages)"], "only the manifest names it"
    assert "slmops model push PATH --name smollm2 --version 1.0.0" in found[pushed]["fix"]
    assert "--from" in found[config]["fix"]
    assert (found[orphan]["needed_by"], found[orphan]["quarantined"]) == ([], False)
    assert await site.objects.keys(QUARANTINE) == [], "it changes nothing"

    done = await slmops("storage", "verify", "--repair", "--from", str(tmp_path / "layout"), "--json")
    left = {blob["digest"]: blob for blob in done.json["damaged"] if not blob["restored"]}
    assert set(left) == {config, orphan}
    assert left[orphan]["quarantined"], "nothing needs it, so it is not restored"
    attention = [item for item in (await slmops("attention", "--json")).json if item["kind"] == "blobs_corrupt"]
    assert orphan in attention[0]["what"]
    for digest, data in ((pushed, b"GGUF whole"), (layer, b"int4"), (report, b'{"kl": 0.25}')):
        assert await site.objects.get_bytes(digest) == data
    again = await slmops("storage", "verify")
    assert config in again.out and layer not in again.out
    assert package.manifest.digest not in again.out


async def test_a_verification_goes_on_where_it_was_interrupted(site: Site, behind: Minio) -> None:
    digests = sorted([(await site.objects.put_bytes(f"{n}".encode(), "x/y")).digest for n in range(7)])
    spoil(behind, site.objects, digests[5])
    client, after = site.operator.client, None
    parts: list[tuple[int, list[Digest]]] = []
    while not parts or after:
        part = await client.request(VerifyStorage(after=after, at_most=3))
        parts.append((part.checked.objects, [blob.digest for blob in part.damaged]))
        after = part.after
    assert parts == [(3, []), (3, [digests[5]]), (1, [])]
    assert (await client.request(VerifyStorage(at_most_bytes=1))).after == digests[0]
    resumed = await Cli(site.world)("storage", "verify", "--after", digests[4], "--json")
    assert resumed.json["checked"]["objects"] == 2


# ---- by schedule ------------------------------------------------------------------------------------------


class Ahead(Collecting):
    """For who collects, so much time has passed."""

    by = timedelta(0)

    async def now(self) -> datetime:
        return await super().now() + self.by


@dataclass
class Process:
    """The scheduled work of one registry process, with a clock that the test moves."""

    settings: Settings
    journal: Journal
    collecting: Ahead
    storage: Storage
    now: list[datetime]

    def chores(self) -> Chores:
        return Chores(self.journal, lambda: self.now[0], self.storage.chores())

    def chore(self, name: str) -> Chore:
        return next(chore for chore in self.storage.chores() if chore.name == name)

    async def turn(self, name: str, by: timedelta = timedelta(0)) -> bool:
        self.now[0] += by
        return await self.chores().turn(self.chore(name))

    async def status(self) -> StorageStatus:
        return await self.storage.describe(DescribeStorage())


@pytest.fixture
async def process(world: World, settings: Settings, tmp_path: Path) -> AsyncIterator[Process]:
    client, now = await world.connect("registry"), [T0]
    journal = Journal(
        f"sqlite:///{tmp_path}/chores.db",
        service="registry",
        metadata=schema(),
        migrations=MIGRATIONS,
        project=project,
        clock=lambda: now[0],
    )
    await journal.open()
    own = ObjectSettings.model_validate(settings.model_dump())
    objects, verifying, collecting = Objects(own), Verifying(own), Ahead(own)
    await objects.open()

    async def complete() -> None:
        """No fact is missing."""

    marker = Marker(journal, objects, lambda: client, complete)
    verifier = Verifier(verifying, objects, marker, lambda: now[0])
    collector = Collector(collecting, marker.mark)
    storage = Storage(settings, journal, objects, verifying, collector, verifier, lambda: now[0], lambda: "u" * 32)
    yield Process(settings, journal, collecting, storage, now)
    await journal.close()


async def test_garbage_and_abandoned_uploads_go_by_schedule_and_only_then(process: Process, behind: Minio) -> None:
    bucket, day = process.settings.s3_bucket, timedelta(days=1)
    objects = process.storage._objects
    garbage = (await objects.put_bytes(b"nobody's", "x/y")).digest
    spoil(behind, objects, garbage)
    with pytest.raises(CorruptBlob):
        await objects.get_bytes(garbage)
    behind.put_object(bucket, f"uploads/u-1/{garbage[7:]}", BytesIO(b"upload"), 6)
    behind._create_multipart_upload(bucket, blob_key(garbage), {})
    assert not await process.turn(COLLECT)
    assert await process.turn(COLLECT, day)
    assert await objects.exists(garbage), "it is young"
    assert len(await objects.keys(QUARANTINE)) == 1
    process.collecting.by = timedelta(days=8)
    assert not await process.turn(COLLECT, day - timedelta(seconds=1))
    assert await process.turn(COLLECT, timedelta(seconds=1))
    assert await objects.keys() == []
    assert list(behind._list_multipart_uploads(bucket).uploads) == []
    status = await process.status()
    assert (status.collected.objects, status.collected_at, status.problems) == (1, T0 + 2 * day, {})


async def test_one_process_does_a_chore_and_another_after_it_died(process: Process) -> None:
    done: list[str] = []

    async def work(state: str) -> tuple[str, timedelta]:
        done.append(state)
        await asyncio.sleep(0)
        return json.dumps({"times": len(done)}), timedelta(hours=1)

    chore = Chore("test", timedelta(0), work)
    one, other = process.chores(), process.chores()
    assert sorted(await asyncio.gather(one.turn(chore), other.turn(chore))) == [False, True]
    process.now[0] += timedelta(hours=1)
    assert await one._claim(chore) is not None, "and it is killed"
    assert not await other.turn(chore)
    process.now[0] += HELD
    assert await other.turn(chore)
    assert done == ["{}", '{"times": 1}']


async def test_a_chore_that_fails_is_tried_again_and_says_why(process: Process) -> None:
    broken = [True]

    async def work(state: str) -> tuple[str, timedelta]:
        if broken[0]:
            raise Unreachable("the store is gone")
        return state, timedelta(days=1)

    chore, chores = Chore(COLLECT, timedelta(0), work), process.chores()
    assert await chores.turn(chore)
    assert (await process.status()).problems == {COLLECT: "the store is gone"}
    broken[0] = False
    process.now[0] += AGAIN_AFTER
    assert await chores.turn(chore)
    assert (await process.status()).problems == {}


async def test_every_blob_is_verified_within_the_period_across_restarts(process: Process, behind: Minio) -> None:
    objects = process.storage._objects
    digests = sorted([(await objects.put_bytes(f"{n}".encode(), "x/y")).digest for n in range(12)])
    spoil(behind, objects, digests[0])
    spoil(behind, objects, digests[-1])
    seen: list[int] = []
    hours = 0
    while (await process.status()).verification_ended is None:
        hours += 1
        await process.turn(VERIFY, timedelta(hours=1))  # a new `Chores` each time: nothing is kept in memory
        seen.append((await process.status()).verified.objects)
    assert hours <= 30 * 24 + 1
    assert seen[-1] == 12
    status = await process.status()
    assert (status.corrupt, set(status.damaged)) == (2, {digests[0], digests[-1]})
    assert not await process.turn(VERIFY, timedelta(hours=1)), "it rests until the period is over"


async def test_the_verification_keeps_its_pace(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.registry.storage._PART", 1)
    objects = process.storage._objects
    for number in range(40):
        await objects.put_bytes(f"{number}".encode(), "x/y")
    await process.turn(VERIFY)
    for day in range(1, 30):
        for _ in range(2):
            await process.turn(VERIFY, timedelta(hours=12))
        share = (await process.status()).verified.objects / 40
        assert share <= day / 30 + 0.2, f"day {day}"
    await process.turn(VERIFY, timedelta(days=1))
    assert (await process.status()).verified.objects == 40


async def test_handled_events_are_forgotten_when_no_dead_letter_can_bring_them_again(process: Process) -> None:
    assert await process.journal.transact(lambda unit: unit.first_time("registry", "1"))
    await process.turn(FORGET)
    assert await process.turn(FORGET, timedelta(days=90))
    assert not await process.journal.transact(lambda unit: unit.first_time("registry", "1"))
    assert await process.turn(FORGET, timedelta(days=11))
    assert await process.journal.transact(lambda unit: unit.first_time("registry", "1"))

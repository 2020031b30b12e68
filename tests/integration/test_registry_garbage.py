"""Garbage collection by the registry: blobs named by events stay, and the command line shows the report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.artifact_world import GOLDEN, Operator
from integration.console_cli import Cli
from integration.garbage_world import OLD_S, Site, registry_settings, running_site
from integration.kit_world import World, envelope, world_on

from slmops.contracts.commands import GarbageReport, RetireVersion
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.events import VariantOptimized
from slmops.contracts.manifest import Manifest
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.registry.marker import Marker
from slmops.registry.settings import Settings
from slmops.registry.store import MIGRATIONS, project, schema

if TYPE_CHECKING:
    from servers import S3, NatsServer


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


async def test_blobs_of_a_retired_version_are_collected_except_those_of_its_packages(site: Site) -> None:
    shared, own = b"GGUF shared", b"GGUF of 1.0.1"
    await site.operator.push("1.0.0", {"model.gguf": shared}, GOLDEN)
    await site.operator.push("1.0.1", {"model.gguf": own, "tokenizer.json": shared})
    packed, unpacked = await site.variant("1.0.1", b"packed"), await site.variant("1.0.1", b"unpacked")
    package = await site.package(packed)
    orphan = (await site.objects.put_bytes(b"unnamed!", "x/y")).digest
    await asyncio.sleep(OLD_S)

    report = await site.collect()
    assert report.removed == report.garbage
    assert (report.garbage.objects, report.garbage.size_bytes, report.missing) == (1, 8, 0)
    assert not await site.objects.exists(orphan)
    kept = await site.objects.keys("blobs/")
    assert report.live.objects == len(kept)

    await site.operator.client.request(RetireVersion(model="smollm2", version="1.0.1"))
    assert (await site.collect()).garbage.objects == 0, "a package of it may still be published"
    await asyncio.sleep(OLD_S)
    assert (await site.collect()).missing == 0
    files = [variant.files[0].digest for variant in (packed, unpacked)]
    assert await site.exist(digest_of(own), digest_of(shared), *files) == [False, True, True, False]
    manifest = Manifest.decode(await site.objects.get_bytes(package.manifest.digest))
    assert all(await site.exist(package.signature.digest, manifest.config.digest, manifest.layers[0].digest))
    assert await site.exist(digest_of(b"picture packed"), packed.report.digest) == [False, False]
    left = {digest_of(shared), digest_of(GOLDEN), manifest.config.digest, manifest.layers[0].digest}
    left |= {package.signature.digest, package.manifest.digest}
    assert {f"sha256:{key.rpartition('/')[2]}" for key in await site.objects.keys()} == left

    again = await site.operator.push("1.0.2", {"model.gguf": own, "tokenizer.json": shared})
    assert await site.objects.get_bytes(again.files[0].digest) == own


async def no_missing_events() -> None:
    """A check of a marker that finds no missing events."""


async def test_blobs_named_by_events_that_the_registry_has_not_processed_are_live(site: Site, tmp_path: Path) -> None:
    """Such events are unread, are dead letters, or are older than the table."""
    variant = await site.variant("1.0.0", b"made")
    package = await site.package(variant)
    await site.world.client.store(VariantOptimized.type, b"{}", envelope(variant, id="broken").headers())
    journal = Journal(
        f"sqlite:///{tmp_path}/new.db", service="registry", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    await journal.open()
    client = await site.world.connect("registry")
    marker = Marker(journal, site.objects, lambda: client, no_missing_events)
    live = await marker.mark(utc_now())
    assert variant.job_report
    named = {variant.files[0].digest, variant.report.digest, variant.job_report.digest, package.manifest.digest}
    assert named | {package.signature.digest, digest_of(b"picture made")} <= live
    later = await site.variant("1.0.0", b"made later")
    assert await marker.mark(utc_now()) > live | {later.files[0].digest}
    await journal.close()


async def test_pushes_succeed_while_garbage_is_collected(site: Site) -> None:
    removed, done = 0, asyncio.Event()
    grace = timedelta(seconds=3)  # on a busy machine a push takes longer than one

    async def collecting() -> None:
        nonlocal removed
        while not done.is_set():
            report = await site.collect(grace=grace)
            removed += report.removed.objects if report.removed else 0

    async def push(model: str) -> None:
        operator = Operator(await site.world.connect("console"), model)
        for number in range(5):
            content = {"model.gguf": f"GGUF {model} {number}".encode(), "tokenizer.json": f"{number % 3}".encode()}
            view = await operator.push(f"1.0.{number}", content)
            assert all(await site.exist(*(file.digest for file in view.files)))
            await operator.client.request(RetireVersion(model=model, version=f"1.0.{number}"))
            await asyncio.sleep(1)

    async def pushing() -> None:
        try:
            await asyncio.gather(*(push(model) for model in ("one", "two", "three")))
        finally:
            done.set()

    await asyncio.gather(pushing(), collecting())
    await asyncio.sleep(OLD_S)
    last = await site.collect()
    assert removed, "nothing was collected while they pushed"
    assert last.removed and removed + last.removed.objects >= 15
    assert await site.objects.keys() == []


async def test_a_grace_period_shorter_than_the_minimum_is_refused(site: Site) -> None:
    with pytest.raises(InvalidMessage, match="shorter than"):
        await site.collect(grace=timedelta(0))


async def test_the_command_line_collects_garbage_and_prints_the_report(site: Site) -> None:
    slmops = Cli(site.world)
    await site.operator.push("1.0.0", {"model.gguf": b"GGUF x"})
    await asyncio.gather(*(site.objects.put_bytes(f"unnamed {n}".encode(), "x/y") for n in range(3)))
    written = time.monotonic()
    assert (await slmops("storage", "usage", "--json")).json["young"]["objects"] == 3
    await asyncio.sleep(OLD_S - (time.monotonic() - written))
    dry = await slmops("storage", "gc", "--grace", "1s", "--dry-run")
    rows = [line.split()[0] for line in dry.out.splitlines() if line]
    assert "garbage" in rows and "removed" not in rows
    done = await slmops("storage", "gc", "--grace", "1s", "--json")
    report = GarbageReport.model_validate_json(done.out)
    assert report.removed and (report.removed.objects, report.live.objects) == (3, 1)
    assert (await slmops("storage", "gc", "--grace", "soon")).exit_code == InvalidMessage.exit_code

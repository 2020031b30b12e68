"""A registry that may have missed events collects no garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from integration.artifact_world import Operator, running, settings_of
from integration.console_cli import Cli
from integration.garbage_world import GRACE, OLD_S, Site
from integration.kit_world import World, world_on

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import FactsMissing
from slmops.contracts.events import PackagePublished
from slmops.contracts.manifest import Manifest
from slmops.kit.bus.provision import provision
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.registry.app import build
from slmops.registry.settings import Settings

if TYPE_CHECKING:
    from servers import S3, NatsServer

PUBLISHED = "registry-slmops_package_published_v1"


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def settings(world: World, s3: S3, tmp_path: Path) -> Settings:
    own = {"s3_bucket": f"registry-{uuid4().hex}", "shortest_grace": GRACE}
    return Settings.model_validate(settings_of(world, s3, "registry", tmp_path) | own)


@asynccontextmanager
async def registry(world: World, settings: Settings) -> AsyncIterator[Site]:
    async with running(build(settings)):
        objects = Objects(ObjectSettings.model_validate(settings.model_dump()))
        yield Site(world, objects, Operator(await world.connect("console")))


async def publish_package(site: Site) -> list[Digest]:
    """Publishes a package that the registry does not receive. Returns the digests of its blobs."""
    package: PackagePublished = await site.package(await site.variant("1.0.0", b"made"))
    manifest = Manifest.decode(await site.objects.get_bytes(package.manifest.digest))
    return [package.manifest.digest, package.signature.digest, manifest.config.digest, manifest.layers[0].digest]


async def assert_nothing_is_collected(site: Site, blobs: list[Digest], match: str) -> None:
    for dry_run in (True, False):
        with pytest.raises(FactsMissing, match=match) as caught:
            await site.collect(dry_run=dry_run)
        assert "slmops stream accept EVENTS" in str(caught.value.fix)
    assert all(await site.exist(*blobs))


async def test_nothing_is_collected_after_unread_events_were_purged_until_an_operator_accepts_the_gap(
    world: World, settings: Settings
) -> None:
    async with registry(world, settings) as site:
        assert (await site.collect()).garbage.objects == 0
    blobs = await publish_package(site)
    await world.client.js.purge_stream("EVENTS")
    await asyncio.sleep(OLD_S)
    async with registry(world, settings) as site:
        await assert_nothing_is_collected(site, blobs, "1 to 2 of EVENTS for registry-")
        accepted = await Cli(world)("stream", "accept", "EVENTS", "--json")
        assert accepted.exit_code == 0
        assert {(gap["first"], gap["last"]) for gap in accepted.json["accepted"]} == {(1, 2)}
        report = await site.collect()
        assert report.removed == report.garbage
        assert not any(await site.exist(*blobs)), "after the gap is accepted, the package is garbage"


async def test_a_purge_while_the_registry_runs_is_detected_by_the_next_collection(
    world: World, settings: Settings
) -> None:
    async with registry(world, settings) as site:
        later = (utc_now() + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
        await world.client.js.pause_consumer("EVENTS", PUBLISHED, later)
        blobs = await publish_package(site)
        await world.client.js.purge_stream("EVENTS")
        await asyncio.sleep(OLD_S)
        await assert_nothing_is_collected(site, blobs, f"for {PUBLISHED}")


async def test_nothing_is_collected_after_the_stream_was_recreated(world: World, settings: Settings) -> None:
    async with registry(world, settings) as site:
        assert (await site.collect()).garbage.objects == 0
    blobs = await publish_package(site)
    await world.client.js.delete_stream("EVENTS")
    await provision(world.client.js)
    await asyncio.sleep(OLD_S)
    async with registry(world, settings) as site:
        await assert_nothing_is_collected(site, blobs, "recreated")
    async with registry(world, settings) as site:
        await assert_nothing_is_collected(site, blobs, "recreated")
        await Cli(world)("stream", "accept", "EVENTS")
        again = await publish_package(site)
        await asyncio.sleep(OLD_S)
        await site.collect()
        assert all(await site.exist(*again)), "the new stream is read from its beginning"

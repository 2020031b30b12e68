"""From a fine-tuned version to a small update, on a real registry, optimizer and packager."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.artifact_world import eventually, published
from integration.gateway_site import site_on
from integration.kit_world import envelope
from integration.optimizer_world import factory_on
from tiny_model import make_tiny_llama, make_tuned

from slmops.contracts.events import GatewayReported, PackageDeltaPublished, UpdatePhase, VariantOptimized
from slmops.contracts.jobs import JobState
from slmops.contracts.manifest import Manifest
from slmops.kit.clock import utc_now

if TYPE_CHECKING:
    from integration.optimizer_world import Factory
    from servers import S3, NatsServer


@pytest.mark.timeout(400)
async def test_a_fine_tuned_version_is_quantized_on_the_grids_of_the_running_release_and_has_a_small_delta(
    nats_server: NatsServer, s3: S3, tmp_path: Path
) -> None:
    base = make_tiny_llama(tmp_path / "llama-200", 200)
    make_tuned(tmp_path / "llama-201", base)
    async with site_on(nats_server, s3, tmp_path) as site, factory_on(site.rollout.world, s3, tmp_path) as factory:
        await factory.start("one", recipes='["int4"]')
        first = await made(factory, "1.0.0", 200, "int4")
        [before] = await published(factory.world)
        await report(factory, before.manifest.digest)
        second = await made(factory, "1.0.1", 201, "int4-anchored")
        assert second.reason.startswith("int4-anchored: on its predecessor's grids")
        after = (await published(factory.world, 2))[-1]
        manifest = Manifest.decode(await site.optimizer.objects.get_bytes(after.manifest.digest))
        assert manifest.annotations["io.slmops.anchored-on"] == first.digest

        async def delta() -> PackageDeltaPublished | None:
            return next(iter(await factory.events(PackageDeltaPublished)), None)

        made_delta = await eventually(delta)
        assert (made_delta.base, made_delta.target) == (before.manifest.digest, after.manifest.digest)
        assert made_delta.delta.size < 0.4 * made_delta.full_bytes  # the graph is a large part of a model this small


async def made(factory: Factory, version: str, seed: int, recipe: str) -> VariantOptimized:
    await factory.push(version, seed)
    job = await factory.reached((await factory.job_of(version)).job, JobState.DONE)
    [chosen] = [event for event in await factory.events(VariantOptimized, job.job) if event.chosen]
    assert chosen.recipe == recipe, job.reason
    return chosen


SEQUENCE = itertools.count(1)


async def report(factory: Factory, running: str) -> None:
    world = factory.world
    client = await world.connect("console")
    event = GatewayReported(
        gateway_id="gw-1",
        blueprint="edge-chat",
        sequence=next(SEQUENCE),
        phase=UpdatePhase.COMMITTED,
        running=running,
        at=utc_now(),
    )
    await client.publish(event, envelope(event))

    async def received() -> bool | None:
        left = await world.unsettled("GATEWAYS", "packager-slmops_gateway_reported_v1_each")
        return True if left == 0 else None

    await eventually(received)

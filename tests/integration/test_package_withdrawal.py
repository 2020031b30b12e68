"""An unused package is withdrawn: from the command line to the deletion of its blobs, on real NATS and S3."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from integration.artifact_world import eventually, running, settings_of
from integration.console_cli import Cli
from integration.gateway_site import Site, site_on
from integration.test_deltas import Versions, deltas, install_and_commit, report

from slmops.contracts.commands import CollectGarbage, GarbageReport
from slmops.contracts.errors import IllegalTransition, NotFound, TrustRefused
from slmops.contracts.events import Event, PackageDeltaWithdrawn, PackageWithdrawn
from slmops.contracts.tuf_names import Attack
from slmops.registry.app import build as build_registry
from slmops.registry.settings import Settings as RegistrySettings

if TYPE_CHECKING:
    from servers import S3, NatsServer

GRACE = timedelta(seconds=1)
OLD_S = 3.1


@pytest.fixture
async def site(nats_server: NatsServer, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    """Yields a site with a bucket of its own and a registry that collects garbage."""
    bucket = f"withdrawal-{uuid4().hex}"
    own = type(s3)(**(vars(s3) | {"bucket": bucket}))
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(site_on(nats_server, own, tmp_path, delta_bases=1))
        settings = settings_of(site.rollout.world, own, "registry", tmp_path) | {"shortest_grace": GRACE}
        await stack.enter_async_context(running(build_registry(RegistrySettings.model_validate(settings))))
        yield site


async def stored_events(site: Site, kind: type[Event]) -> list[Any]:
    return [
        kind.model_validate_json(m.data) for m in await site.rollout.world.stored("EVENTS") if m.subject == kind.type
    ]


async def test_a_withdrawn_package_cannot_be_installed_and_its_blobs_are_collected(site: Site) -> None:
    slmops, versions, objects = Cli(site.rollout.world), Versions(site), site.optimizer.objects
    first = await versions.publish()
    await install_and_commit(site, first)
    await report(site, first)
    second = await versions.publish()
    [delta] = await deltas(site, 1)
    names = ("package", "withdraw", "smollm2:1.0.0", "--json")

    stable = await slmops(*names)
    assert (stable.exit_code, stable.problem["code"]) == (1, IllegalTransition.code)
    assert "needed by the plan of edge-chat" in stable.problem["what"]
    await install_and_commit(site, second)
    running_it = await slmops(*names)
    assert "1 gateway last reported running smollm2:1.0.0" in running_it.problem["what"]

    dry = await slmops(*names, "--even-if-running", "--dry-run")
    found = {"running": 1, "deltas": 1, "deltas_bytes": delta.delta.size, "dry_run": True}
    assert found.items() <= dry.json.items()
    assert await stored_events(site, PackageWithdrawn) == []
    await report(site, second)
    done = await slmops(*names, "--reason", "superseded")
    assert (done.exit_code, done.json["running"], done.json["dry_run"]) == (0, 0, False)
    again = await slmops(*names)
    assert (again.exit_code, again.json["manifest"]["digest"]) == (0, first.manifest.digest)

    async def withdrawals() -> tuple[list[Any], list[Any]] | None:
        package, delta = [await stored_events(site, kind) for kind in (PackageWithdrawn, PackageDeltaWithdrawn)]
        return (package, delta) if package and delta else None

    [event], [of_delta] = await eventually(withdrawals)
    assert (event.manifest, event.signature) == (first.manifest.digest, first.signature.digest)
    assert (event.reason, of_delta.delta) == ("superseded", delta.delta.digest)
    await site.rollout.plan(first)
    with pytest.raises(TrustRefused) as refusal:
        await site.acquirer.acquire(first)
    assert refusal.value.attack == Attack.ARBITRARY_PACKAGE
    with pytest.raises(NotFound):
        await site.acquirer._request_package(first.manifest.digest)
    assert (await slmops("package", "show", "smollm2:1.0.0")).exit_code == 1

    kept = [layer.digest for layer in (await objects.get_manifest(second.manifest.digest)).layers]
    await asyncio.sleep(OLD_S)
    client = await site.rollout.world.connect("console")
    collected: GarbageReport = await client.request(CollectGarbage(grace=GRACE))
    assert collected.missing == 0
    gone = [first.manifest.digest, first.signature.digest, delta.delta.digest]
    assert [await objects.exists(digest) for digest in gone] == [False, False, False]
    assert all([await objects.exists(digest) for digest in (second.manifest.digest, second.signature.digest, *kept)])

"""Delta updates: planned from what the fleet reports, followed by a gateway, and always verified."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from disk_calls import DiskCalls, calls_of_this_thread
from integration.artifact_world import eventually
from integration.gateway_site import Site, site_on
from integration.kit_world import envelope

from slmops.contracts.addresses import blob_key
from slmops.contracts.events import GatewayReported, PackageDeltaPublished, PackageDeltaWithdrawn, UpdatePhase
from slmops.contracts.plan import Release
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.slots import Slot
from slmops.kit.clock import utc_now
from slmops.kit.delta import make
from slmops.packager import deltas as planning

if TYPE_CHECKING:
    from servers import S3, NatsServer

WEIGHTS = random.Random(7).randbytes(400_000)


def changed(data: bytes, number: int) -> bytes:
    """Returns a copy of `data` with a few hundred changed bytes."""
    found = bytearray(data)
    places = random.Random(number)
    for _ in range(300):
        found[places.randrange(len(found))] ^= 1
    return bytes(found)


@dataclass
class Versions:
    """Versions of one model, new to the store; each one differs a little from the previous one."""

    site: Site
    weights: list[bytes] = field(default_factory=lambda: [uuid4().bytes + WEIGHTS])

    async def publish(self) -> Release:
        if len(self.published) == len(self.weights):
            self.weights.append(changed(self.weights[-1], len(self.weights)))
        content = {"model.onnx": b"graph", "model.onnx.data": self.weights[-1], "genai_config.json": b"{}"}
        self.published.append(await self.site.publish(f"1.0.{len(self.published)}", content=content))
        return self.published[-1]

    published: list[Release] = field(default_factory=list)


@pytest.fixture
async def site(nats_server: NatsServer, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_on(nats_server, s3, tmp_path, delta_bases=1) as site:
        yield site


@pytest.fixture
def versions(site: Site) -> Versions:
    return Versions(site)


async def report(site: Site, running: Release, gateway: str = "gw-1") -> None:
    """Publishes a report of what a gateway runs, and waits until the packager has received it."""
    bus = site.bus if gateway == "gw-1" else await site.rollout.enrol(gateway)
    event = GatewayReported(
        gateway_id=gateway,
        blueprint="edge-chat",
        sequence=next(SEQUENCE),
        phase=UpdatePhase.COMMITTED,
        running=running.manifest.digest,
        at=utc_now(),
    )
    await bus.publish(event, envelope(event))

    async def received() -> bool | None:
        return True if await site.rollout.world.unsettled("GATEWAYS", CONSUMER) == 0 else None

    await eventually(received)


SEQUENCE = itertools.count(1)
CONSUMER = "packager-slmops_gateway_reported_v1_each"


async def deltas(site: Site, count: int) -> list[PackageDeltaPublished]:
    async def look() -> list[PackageDeltaPublished] | None:
        stored = await site.rollout.world.stored("EVENTS")
        found = [m.data for m in stored if m.subject == PackageDeltaPublished.type]
        return [PackageDeltaPublished.model_validate_json(data) for data in found] if len(found) >= count else None

    return await eventually(look)


def weights(slot: Slot) -> bytes:
    return (slot.path / "model.onnx.data").read_bytes()


async def install_and_commit(site: Site, wanted: Release) -> Slot:
    """Installs a release and makes its slot the active one, so that the next release goes to the other slot."""
    slot = await site.install(wanted)
    site.slots.activate()
    site.slots.commit()
    return slot


async def test_a_delta_is_made_from_the_release_that_the_fleet_runs_and_a_gateway_fetches_only_the_delta(
    site: Site, versions: Versions
) -> None:
    first = await versions.publish()
    await install_and_commit(site, first)
    assert site.acquirer.fetched_bytes > len(versions.weights[0])
    await report(site, first)
    second = await versions.publish()
    [made] = await deltas(site, 1)
    assert (made.base, made.target) == (first.manifest.digest, second.manifest.digest)
    assert made.delta.size < len(versions.weights[1]) / 50 < made.full_bytes
    slot = await install_and_commit(site, second)
    assert weights(slot) == versions.weights[1]
    assert site.acquirer.fetched_bytes == made.delta.size
    site.acquirer.prune()
    assert not [path for path in (site.home / "blobs").iterdir() if path.name == made.delta.digest[7:]]


async def test_the_packagers_event_loop_waits_for_no_file(
    site: Site, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing or copying gigabytes on the loop would hold up fetches and the in-progress acknowledgements."""
    calls = DiskCalls(monkeypatch, site.home / "work", site.home / "deltas")
    made: list[str] = []
    first = await versions.publish()
    await install_and_commit(site, first)
    await report(site, first)
    on_the_loop = calls_of_this_thread(calls)
    seen = calls.before
    calls.before = lambda name, path: (made.append(name), seen(name, path))[1]
    await versions.publish()
    await deltas(site, 1)
    assert on_the_loop == []
    assert len(made) > 20


async def test_a_gateway_that_missed_a_version_follows_a_chain_of_deltas(site: Site, versions: Versions) -> None:
    first = await versions.publish()
    await install_and_commit(site, first)
    await report(site, first, "gw-2")
    second = await versions.publish()
    await deltas(site, 1)
    await report(site, second, "gw-2")
    third = await versions.publish()
    one, two = await deltas(site, 2)
    assert (two.base, two.target) == (second.manifest.digest, third.manifest.digest)
    assert weights(await site.install(third)) == versions.weights[2]
    assert site.acquirer.fetched_bytes == one.delta.size + two.delta.size


async def test_the_oldest_delta_is_withdrawn_when_the_space_for_deltas_is_used_up(
    nats_server: NatsServer, s3: S3, tmp_path: Path
) -> None:
    async with site_on(nats_server, s3, tmp_path, delta_bases=1, delta_space_bytes=3000) as site:
        versions = Versions(site)
        first = await versions.publish()
        await install_and_commit(site, first)
        await report(site, first)
        await versions.publish()
        [one] = await deltas(site, 1)
        await report(site, versions.published[1], "gw-2")
        await report(site, versions.published[1], "gw-3")
        third = await versions.publish()
        await deltas(site, 2)
        assert 1500 < one.delta.size < 3000, "two deltas do not fit"

        async def withdrawn() -> PackageDeltaWithdrawn | None:
            stored = [m for m in await site.rollout.world.stored("EVENTS") if m.subject == PackageDeltaWithdrawn.type]
            return PackageDeltaWithdrawn.model_validate_json(stored[0].data) if stored else None

        assert (await eventually(withdrawn)).delta == one.delta.digest
        assert weights(await site.install(third)) == versions.weights[2]
        assert site.acquirer.fetched_bytes >= len(versions.weights[2]), "no chain of deltas leads to this release"


@pytest.mark.parametrize("harm", ["the delta is damaged", "the delta is missing", "the base was changed on the device"])
async def test_an_unusable_delta_is_replaced_by_the_whole_files(site: Site, versions: Versions, harm: str) -> None:
    first = await versions.publish()
    slot = await install_and_commit(site, first)
    await report(site, first)
    second = await versions.publish()
    [made] = await deltas(site, 1)
    if harm == "the base was changed on the device":
        blob = slot.path / "model.onnx.data"
        blob.unlink()
        blob.write_bytes(changed(versions.weights[0], 9))
    else:
        await damage_delta(site, made, missing=harm == "the delta is missing")
    found = await site.install(second)
    assert weights(found) == versions.weights[1]
    assert site.acquirer.fetched_bytes >= len(versions.weights[1])


async def damage_delta(site: Site, made: PackageDeltaPublished, *, missing: bool) -> None:
    objects = site.optimizer.objects
    key = blob_key(made.delta.digest)
    if missing:
        objects._client.remove_object(objects.bucket, key)
    else:
        await objects.put_object(key, bytes(made.delta.size))


async def test_a_chain_of_deltas_to_another_release_is_not_followed(
    site: Site, versions: Versions, monkeypatch: Any
) -> None:
    first = await versions.publish()
    await install_and_commit(site, first)
    await report(site, first)
    second = await versions.publish()
    await deltas(site, 1)
    ask = Acquirer._request_package

    async def with_wrong_target(self: Acquirer, digest: Any) -> Any:
        package = await ask(self, digest)
        [step] = package.route
        return package.model_copy(update={"route": (step.model_copy(update={"target": first.manifest.digest}),)})

    monkeypatch.setattr(Acquirer, "_request_package", with_wrong_target)
    assert weights(await site.install(second)) == versions.weights[1]
    assert site.acquirer.fetched_bytes >= len(versions.weights[1])


async def test_a_gateway_that_asks_while_a_delta_is_made_gets_the_delta(
    site: Site, versions: Versions, monkeypatch: Any
) -> None:
    def slowly(*arguments: Any) -> Any:
        time.sleep(1.5)
        return make(*arguments)

    monkeypatch.setattr(planning, "make", slowly)
    first = await versions.publish()
    await install_and_commit(site, first)
    await report(site, first)
    second = await versions.publish()
    assert weights(await site.install(second)) == versions.weights[1]
    assert site.acquirer.fetched_bytes == (await deltas(site, 1))[0].delta.size

"""Bundles across an air gap: exported by the command line, copied as a file, installed by an offline gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from integration.artifact_world import eventually, published, release
from integration.console_cli import Cli
from integration.device import ANY_ANSWER, HELLO, Device
from integration.gateway_site import Site, site_on
from integration.kit_world import envelope
from integration.test_deltas import Versions, deltas, install_and_commit, report, weights

from slmops.console.commands.bundles import write
from slmops.contracts.blueprint import SoakPolicy
from slmops.contracts.errors import TemporaryError
from slmops.contracts.events import GatewayEnrolled, GatewayReported, UpdatePhase
from slmops.contracts.plan import Release
from slmops.gateway.install.acquire import Acquirer
from slmops.gateway.install.bundles import BundleSource
from slmops.gateway.install.slots import Slots
from slmops.kit.bundle import BundleFile
from slmops.kit.bus.nats_auth import new_user_seed, public_key
from slmops.kit.clock import utc_now
from slmops.kit.sealed_results import ResultsFile

if TYPE_CHECKING:
    from servers import S3, NatsServer


@pytest.fixture
async def site(nats_server: NatsServer, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_on(nats_server, s3, tmp_path, delta_bases=1) as site:
        yield site


@pytest.fixture
def device(site: Site, tmp_path: Path) -> Device:
    """Returns a device with its trusted keys and its folder for bundles, and without a factory release."""
    given = tmp_path / "given"
    given.mkdir()
    (given / "trusted.pem").write_bytes(site.keys.public.read_bytes())
    (given / "trusted-root.json").write_bytes(site.folder.first_root.read_bytes())
    drop = tmp_path / "drop"
    drop.mkdir()
    root = tmp_path / "device"
    root.mkdir()
    return Device(root, given, {"SLMOPS_BUNDLES": str(drop), "SLMOPS_BUNDLES_EVERY": "PT0.2S"})


async def publish(site: Site, model: Path, version: str) -> Release:
    """Publishes the tiny model as a release and writes a plan that names it."""
    content = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    content["README.md"] = f"{site.home} {version}".encode()  # differs from the package of every other test
    before = len(await published(site.rollout.world, 0))
    golden = await site.optimizer.objects.put_bytes(ANY_ANSWER, "application/jsonl")
    await site.optimizer.announce(
        (await site.optimizer.variant(content, version=version)).model_copy(update={"golden": golden})
    )
    made = release((await published(site.rollout.world, before + 1))[-1])
    wanted = made.model_copy(update={"soak": SoakPolicy(seconds=0.1, golden_every_s=0.05)})
    await site.rollout.plan(wanted)
    return wanted


async def wait_until_answered_by(api: httpx.AsyncClient, digest: str, log: Device) -> None:
    try:
        async with asyncio.timeout(30):
            while True:
                answer = await api.post("/v1/chat/completions", json=HELLO)
                if answer.status_code == 200 and answer.json()["system_fingerprint"] == digest:
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(log.log)


async def test_an_offline_gateway_is_updated_by_bundle_files(
    site: Site, device: Device, genai_model: Path, tmp_path: Path
) -> None:
    console, drop = Cli(site.rollout.world), device.settings["SLMOPS_BUNDLES"]
    file = tmp_path / "edge-chat.slmops"
    first = await publish(site, genai_model, "1.0.0")
    async with device.on() as api:
        assert (await api.post("/v1/chat/completions", json=HELLO)).status_code == 503
        for number, wanted in enumerate((first, None), start=1):
            wanted = wanted or await publish(site, genai_model, "1.0.1")
            done = await console("bundle", "export", "--for", "edge-chat", "--out", str(file), "--json")
            assert done.exit_code == 0, done.err
            assert done.json["generation"] == number
            assert [package["manifest"]["digest"] for package in done.json["packages"]] == [wanted.manifest.digest]
            done = await console("bundle", "import", str(file), "--to", drop)
            assert done.exit_code == 0, done.err
            await wait_until_answered_by(api, wanted.manifest.digest, device)
    async with device.on() as api:  # serves from its slot; the bundle is still in the folder
        await wait_until_answered_by(api, wanted.manifest.digest, device)
    refused = await console("bundle", "export", "--for", "kiosk", "--out", str(file), "--json")
    assert refused.problem["code"] == "not_ready"
    half = tmp_path / "half.slmops"
    half.write_bytes(file.read_bytes()[:-5000])
    done = await console("bundle", "import", str(half), "--to", drop, "--json")
    assert (done.exit_code, done.problem["code"]) == (65, "invalid_bundle")
    assert not (Path(drop) / half.name).exists()


async def test_sealed_results_of_an_offline_gateway_are_imported_if_their_key_is_trusted_or_enrolled(
    site: Site, device: Device, genai_model: Path, tmp_path: Path
) -> None:
    device.settings |= {"SLMOPS_GATEWAY_ID": "gw-9", "SLMOPS_RESULTS_EVERY": "PT0.2S"}
    console, drop = Cli(site.rollout.world), Path(device.settings["SLMOPS_BUNDLES"])
    wanted = await publish(site, genai_model, "1.0.0")
    done = await console("bundle", "export", "--for", "edge-chat", "--out", str(drop / "edge-chat.slmops"))
    assert done.exit_code == 0, done.err
    file = drop / "gw-9.slmops-results"
    async with device.on() as api:
        await wait_until_answered_by(api, wanted.manifest.digest, device)

        async def committed() -> bool | None:
            return (file.exists() and b'"phase\\":\\"committed' in file.read_bytes()) or None

        await eventually(committed)
    refused = await console("bundle", "results", str(file), "--json")
    assert (refused.exit_code, refused.problem["code"]) == (77, "denied")
    assert not await reports_of(site)
    key = ResultsFile(file).seal.public_key
    assert key in refused.problem["fix"]
    for options in (["--trust-key", key], []):
        if not options:
            await publish_enrolment(site, key)
        done = await console("bundle", "results", str(file), *options, "--json")
        assert done.exit_code == 0, done.err
        [found] = done.json["results"]
        assert (found["gateway_id"], found["running"]) == ("gw-9", wanted.manifest.digest)
        reports = await reports_of(site)
        assert len(reports) == found["reports"]
        assert UpdatePhase.COMMITTED in {one.phase for one in reports}
    await publish_enrolment(site, public_key(new_user_seed()))
    other = await console("bundle", "results", str(file), "--trust-key", key, "--json")
    assert (other.exit_code, other.problem["code"]) == (77, "denied")


async def publish_enrolment(site: Site, key: str) -> None:
    event = GatewayEnrolled(gateway_id="gw-9", blueprint="edge-chat", public_key=key, at=utc_now())
    await (await site.rollout.world.connect("rollout")).publish(event, envelope(event))


async def reports_of(site: Site) -> list[GatewayReported]:
    stored = await site.rollout.world.stored("GATEWAYS")
    data = [m.data for m in stored if m.subject == f"{GatewayReported.type}.gw-9"]
    return [GatewayReported.model_validate_json(one) for one in data]


async def test_a_bundle_of_deltas_installs_only_on_a_gateway_that_has_the_base(site: Site, tmp_path: Path) -> None:
    versions = Versions(site)
    first = await versions.publish()
    await install_and_commit(site, first)
    await report(site, first)
    second = await versions.publish()
    [made] = await deltas(site, 1)
    await site.rollout.plan(second)
    await site.trust.plan(await site.written())
    console = await site.rollout.world.connect("console")
    file = tmp_path / "deltas.slmops"
    await write(console, "edge-chat", (first.manifest.digest,), file)
    assert made.delta.size < file.stat().st_size < len(versions.weights[1]) / 4
    for home, slots in ((tmp_path, site.slots), (tmp_path / "other", Slots(tmp_path / "other"))):
        source = BundleSource(BundleFile(file), home / "blobs")
        acquirer = Acquirer("gw-1", lambda source=source: source, slots, home / "blobs", site.keys.public, site.trust)
        if slots is site.slots:
            assert weights(await acquirer.acquire(second)) == versions.weights[1]
            assert acquirer.fetched_bytes == made.delta.size
        else:
            with pytest.raises(TemporaryError, match="lacks a file that this gateway needs"):
                await acquirer.acquire(second)

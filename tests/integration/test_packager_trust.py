"""The packager's TUF repository on real NATS and S3: clients accept its metadata over the bus and over HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from integration.artifact_world import (
    Optimizer,
    Process,
    Rollout,
    eventually,
    open_store,
    published,
    running,
    settings_of,
)
from integration.kit_world import World, world_on
from trust_world import everything_below
from tuf.ngclient import Updater
from unit.packager.packager_examples import new_keys

from slmops.contracts.commands import DescribeTrust, FetchMetadata
from slmops.contracts.errors import InvalidMessage, NotFound, TrustRefused, Unreachable
from slmops.contracts.events import PackagePublished
from slmops.contracts.tuf_names import ROLLOUT_TARGET, Attack, package_target
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now
from slmops.kit.trust import ceremony
from slmops.kit.trust.bus import BusFetcher
from slmops.kit.trust.client import Target, TrustedState
from slmops.kit.trust.folder import Folder
from slmops.kit.trust.http import HttpClient
from slmops.kit.trust.keys import read_keys
from slmops.packager.app import build
from slmops.packager.settings import Settings

if TYPE_CHECKING:
    from servers import S3, NatsServer


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
async def optimizer(world: World, s3: S3) -> Optimizer:
    return Optimizer(world, await open_store(s3))


@pytest.fixture
def rollout(world: World, nats_server: NatsServer, folder: Folder) -> Rollout:
    return Rollout(world, nats_server, folder.plan_key)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "tuf")
    ceremony.ceremony(folder, utc_now()).apply()
    return folder


@pytest.fixture
def settings(world: World, s3: S3, tmp_path: Path, folder: Folder) -> dict[str, Any]:
    own = {"signing_key": new_keys(tmp_path / "keys").private, "trust_renew_every": "PT0.2S"}
    paths = {"trust_keys": folder.online, "trust_metadata": folder.metadata}
    return settings_of(world, s3, "packager", tmp_path) | own | paths


class Client:
    """The trusted metadata of a gateway, refreshed over its own connection."""

    def __init__(self, bus: BusClient, state: TrustedState) -> None:
        self.bus, self.state = bus, state

    async def find(self, package: PackagePublished) -> Target | None:
        path = package_target(package.model, package.version, package.manifest.digest)
        fetcher = BusFetcher(self.bus, "gw-1", asyncio.get_running_loop())
        return await asyncio.to_thread(self.state.refresh, fetcher, path)


@pytest.fixture
async def client(rollout: Rollout, folder: Folder, tmp_path: Path) -> Client:
    return Client(await rollout.enrol("gw-1"), TrustedState(tmp_path / "client", folder.first_root))


async def announce(optimizer: Optimizer, **changes: Any) -> None:
    content = {"model.onnx": uuid4().bytes, "genai_config.json": random.Random().randbytes(500)}
    await optimizer.announce(await optimizer.variant(content, **changes))


async def test_a_gateway_accepts_the_packages_of_two_models_and_no_others(
    settings: dict[str, Any], optimizer: Optimizer, client: Client, world: World
) -> None:
    async with running(build(Settings.model_validate(settings))):
        for model in ("smollm2", "other-model"):
            await announce(optimizer, model=model)
        packages = await published(world, 2)
        for package in packages:
            # Without waiting: the metadata is signed before the package is announced.
            assert await client.find(package) == Target(digest=package.manifest.digest, size=package.manifest.size)
        roles = {path.name for path in client.state.folder.glob("*.json")}
        assert {"model-smollm2.json", "model-other-model.json", "packages.json"} < roles
        foreign = packages[0].model_copy(update={"version": "6.6.6"})
        assert await client.find(foreign) is None
        keys = client.state.rollout_keys()
        assert keys is not None and len(keys.keys) == 1


async def test_a_gateway_reads_metadata_on_its_own_subject_only(
    settings: dict[str, Any], client: Client, rollout: Rollout
) -> None:
    async with running(build(Settings.model_validate(settings))):
        with pytest.raises(NotFound):
            await client.bus.request(FetchMetadata(gateway_id="gw-1", file="99.root.json"))
        ask = FetchMetadata(gateway_id="gw-1", file="timestamp.json")
        assert (await client.bus.request(ask)).file == "timestamp.json"
        with pytest.raises(Unreachable):  # nats-server refuses the subject
            await client.bus.request(ask.model_copy(update={"gateway_id": "gw-2"}), timeout=timedelta(seconds=1))
        traversal = ask.model_copy(update={"file": "../../trust-keys.json"})
        with pytest.raises(InvalidMessage):
            await client.bus.request(traversal)


async def test_the_operator_learns_until_when_the_metadata_is_valid(
    settings: dict[str, Any], world: World, folder: Folder
) -> None:
    async with running(build(Settings.model_validate(settings))):
        trust = await (await world.connect("console")).request(DescribeTrust())
    assert {"root", "targets", "snapshot", "timestamp", "packages"} <= trust.expires.keys()
    root = folder.newest("root")
    assert root is not None
    assert trust.expires["root"] == root.signed.expires


async def test_two_packagers_that_are_killed_and_restarted_lose_no_package(
    settings: dict[str, Any], optimizer: Optimizer, client: Client, world: World, tmp_path: Path
) -> None:
    """They share a database, and both are killed before they have published every package."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    packagers = [Process.of("packager", folder, settings | {"data_dir": folder}) for folder in folders]
    async with AsyncExitStack() as stack:
        for packager in packagers:
            await packager.start()
        for number in range(8):
            await announce(optimizer, model=f"model-{number % 3}", version=f"1.0.{number}")
        await published(world, 3)
        for packager in packagers:
            packager.kill()
            await packager.start()
            stack.callback(packager.stop)
        packages = await published(world, 8, within_s=90)
        assert [await client.find(p) for p in packages] == [
            Target(digest=p.manifest.digest, size=p.manifest.size) for p in packages
        ]


async def test_rotations_and_revocations_by_keyholders_are_adopted_without_a_restart(
    settings: dict[str, Any], optimizer: Optimizer, client: Client, world: World, folder: Folder
) -> None:
    def holders() -> dict[str, Any]:
        return read_keys(folder.offline.glob("*.pem"))

    async with running(build(Settings.model_validate(settings))):
        for model in ("smollm2", "other"):
            await announce(optimizer, model=model)
        kept, revoked = sorted(await published(world, 2), key=lambda package: package.model, reverse=True)
        assert await client.find(revoked) is not None
        for role in ("timestamp", "packages", "targets"):
            ceremony.rotate(folder, role, holders(), utc_now()).apply()
        ceremony.revoke(folder, "other", holders(), utc_now()).apply()

        async def gone() -> bool | None:
            return True if await client.find(revoked) is None else None

        await eventually(gone)
        assert await client.find(kept) is not None
        # A file that the keyholders did not sign is ignored, and new packages are still accepted.
        (folder.metadata / "9.targets.json").write_bytes((folder.metadata / "1.targets.json").read_bytes())
        await announce(optimizer, version="1.0.1")
        package = (await published(world, 3))[-1]
        assert await client.find(package) is not None


async def test_a_repository_with_foreign_keys_is_refused(
    settings: dict[str, Any], client: Client, world: World, tmp_path: Path, optimizer: Optimizer
) -> None:
    async with running(build(Settings.model_validate(settings))):
        await announce(optimizer)
        [package] = await published(world)
        await client.find(package)
    before = everything_below(client.state.folder)
    foreign = Folder(tmp_path / "foreign")
    ceremony.ceremony(foreign, utc_now()).apply()
    changes = {"database_url": f"sqlite:///{tmp_path}/foreign.db", "trust_keys": foreign.online}
    changes["trust_metadata"] = foreign.metadata
    async with running(build(Settings.model_validate(settings | changes))):
        with pytest.raises(TrustRefused) as refused:
            await client.find(package)
    assert refused.value.attack == Attack.WRONG_KEY
    assert everything_below(client.state.folder) == before


async def test_a_standard_tuf_client_downloads_a_package_over_http(
    settings: dict[str, Any], optimizer: Optimizer, world: World, folder: Folder, tmp_path: Path
) -> None:
    packager = Process.of("packager", tmp_path, settings)
    await packager.start()
    try:
        await announce(optimizer)
        [package] = await published(world)
        url = f"http://127.0.0.1:{packager.port}"
        (tmp_path / "tuf-client").mkdir()

        def download() -> bytes:
            updater = Updater(
                str(tmp_path / "tuf-client"),
                f"{url}/tuf/metadata/",
                target_dir=str(tmp_path),
                target_base_url=f"{url}/tuf/targets/",
                bootstrap=folder.first_root.read_bytes(),
            )
            for path in (ROLLOUT_TARGET, package_target("smollm2", "1.0.0", package.manifest.digest)):
                target = updater.get_targetinfo(path)
                assert target is not None
                found = updater.download_target(target)
            return Path(found).read_bytes()

        manifest = await asyncio.to_thread(download)
        assert len(manifest) == package.manifest.size
        ours = HttpClient(tmp_path / "ours")
        ours.init(folder.first_root)
        path = package_target("smollm2", "1.0.0", package.manifest.digest)
        addresses = f"{url}/tuf/metadata/", f"{url}/tuf/targets/"
        found = await asyncio.to_thread(ours.download, addresses[0], path, addresses[1], tmp_path / "downloads")
        assert found is not None and found.read_bytes() == manifest
        async with httpx.AsyncClient() as http:
            for path in ("/tuf/metadata/0.root.json", "/tuf/targets/x/y/z/a.manifest.json", "/tuf/", "/tuf/metadata/"):
                assert (await http.get(url + path)).status_code == 404
            layer = package.variant.removeprefix("sha256:")
            assert (await http.get(f"{url}/tuf/targets/m/1/{layer}/{layer}.manifest.json")).status_code == 404
            assert (await http.get(f"{url}/health")).status_code == 200
    finally:
        packager.stop()


async def test_without_a_key_ceremony_the_packager_does_not_start(settings: dict[str, Any], tmp_path: Path) -> None:
    process = Process.of("packager", tmp_path, settings | {"trust_metadata": tmp_path / "nothing"})
    assert await asyncio.to_thread(process.spawn().wait, 30) == InvalidMessage.exit_code
    assert "slmops trust ceremony" in process.log()

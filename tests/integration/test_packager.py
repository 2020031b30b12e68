"""From a pushed model to the verified files of a gateway, on real NATS, S3 and processes."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from integration.artifact_world import (
    BLUEPRINT,
    GOLDEN,
    Operator,
    Optimizer,
    Process,
    Rollout,
    download,
    eventually,
    model_file,
    open_store,
    published,
    release,
    running,
    settings_of,
)
from integration.kit_world import World, world_on
from integration.packager_small_disk import PASSED, run_on_a_small_disk
from unit.packager.packager_examples import Keys, new_keys

from slmops.contracts import subjects
from slmops.contracts.addresses import blob_key
from slmops.contracts.commands import FetchPackage, ListVersions, VersionView
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import Denied, InvalidMessage, NotReady, TrustRefused, Unreachable
from slmops.contracts.events import PackagePublished, VariantOptimized
from slmops.contracts.manifest import FILE_PATH, MANIFEST_PATH, MODEL_CONFIG, SIGNATURE_PATH, Manifest
from slmops.contracts.plan import Plan
from slmops.contracts.tuf_names import Attack
from slmops.kit.bus.provision import ACK_WAIT_S
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.package import verify_package
from slmops.kit.trust.ceremony import ceremony
from slmops.kit.trust.folder import Folder
from slmops.kit.trust.keys import new_key, read_key
from slmops.kit.trust.plans import sign_plan
from slmops.packager.app import build
from slmops.packager.assemble import Assembler
from slmops.packager.settings import Settings

if TYPE_CHECKING:
    from conftest import S3, NatsServer

CONSUMER = "packager-slmops_variant_optimized_v1"


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return new_keys(tmp_path / "keys")


@pytest.fixture
def trust(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "tuf")
    ceremony(folder, utc_now()).apply()
    return folder


@pytest.fixture
async def objects(s3: S3) -> Objects:
    return await open_store(s3)


@pytest.fixture
def optimizer(world: World, objects: Objects) -> Optimizer:
    return Optimizer(world, objects)


@pytest.fixture
def rollout(world: World, nats_server: NatsServer, trust: Folder) -> Rollout:
    return Rollout(world, nats_server, trust.plan_key)


@pytest.fixture
def settings(world: World, s3: S3, tmp_path: Path, keys: Keys, trust: Folder) -> dict[str, Any]:
    own = {"signing_key": keys.private, "trust_keys": trust.online, "trust_metadata": trust.metadata}
    return settings_of(world, s3, "packager", tmp_path) | own


@pytest.fixture
async def packager(settings: dict[str, Any]) -> AsyncIterator[None]:
    async with running(build(Settings.model_validate(settings))):
        yield


def model(size: int = 50_000) -> dict[str, bytes]:
    """Returns the files of an onnxruntime-genai folder whose content is new to the store."""
    return {"model.onnx": uuid4().bytes, "model.onnx.data": random.Random().randbytes(size), "genai_config.json": b"{}"}


async def settled(world: World) -> None:
    """Waits until every announced variant is handled."""

    async def look() -> bool | None:
        return True if await world.unsettled("EVENTS", CONSUMER) == 0 else None

    await eventually(look, 60)


async def test_a_pushed_model_is_packaged_fetched_by_a_gateway_and_verified(
    world: World,
    s3: S3,
    settings: dict[str, Any],
    optimizer: Optimizer,
    rollout: Rollout,
    keys: Keys,
    tmp_path: Path,
) -> None:
    services = [
        Process.of("registry", tmp_path, settings_of(world, s3, "registry", tmp_path)),
        Process.of("packager", tmp_path, settings),
    ]
    async with AsyncExitStack() as stack:
        for service in services:
            await service.start()
            stack.callback(service.stop)
        operator = Operator(await world.connect("console"))
        await operator.push("1.0.0", {"model.gguf": b"GGUF" + uuid4().bytes}, GOLDEN)
        content = model()
        await optimizer.announce(await optimizer.variant(content))
        [package] = await published(world)

        async def packaged() -> VersionView | None:
            [view] = (await operator.client.request(ListVersions())).versions
            return view if view.stage == "packaged" else None

        view = await eventually(packaged)
        assert [p.manifest for p in view.packages] == [package.manifest]

        gateway = await rollout.enrol("gw-1")
        await rollout.plan(None, candidate=release(package))
        fetch = FetchPackage(gateway_id="gw-1", manifest=package.manifest.digest)

        async def fetched() -> Any:
            try:
                return await gateway.request(fetch)
            except NotReady:
                return None

        await download(await eventually(fetched), tmp_path / "slot")
        manifest = verify_package(tmp_path / "slot", keys.public, package.manifest.digest)
        files = {p.relative_to(tmp_path / "slot").as_posix() for p in (tmp_path / "slot").rglob("*") if p.is_file()}
        written = {"README.md", "bom.cdx.json", "provenance.json"}
        assert files == {*content, *written, "golden.jsonl", "evaluation.json", MANIFEST_PATH, SIGNATURE_PATH}
        assert {path: (tmp_path / "slot" / path).read_bytes() for path in content} == content
        assert (tmp_path / "slot/golden.jsonl").read_bytes() == GOLDEN
        assert sum(layer.size for layer in manifest.layers) == package.size_bytes
    assert [service.stop() for service in services] == [0, 0]


async def test_the_manifest_and_its_config_are_blobs(
    packager: None, world: World, optimizer: Optimizer, objects: Objects
) -> None:
    await optimizer.announce(await optimizer.variant(model()))
    [package] = await published(world)
    manifest = Manifest.decode(await objects.get_bytes(package.manifest.digest))
    config = json.loads(await objects.get_bytes(manifest.config.digest))
    assert manifest.config.media_type == MODEL_CONFIG
    assert config["modelfs"]["diffIds"] == [layer.digest for layer in manifest.layers]
    for layer in manifest.layers:
        assert len(await objects.get_bytes(layer.digest)) == layer.size


async def test_the_licence_of_the_version_is_a_layer(
    packager: None, world: World, optimizer: Optimizer, objects: Objects
) -> None:
    source = {"LICENSE": b"Do what you like. " + uuid4().bytes, "README.md": b"---\nlicense: mit\n---\n# Model\n"}
    for data in source.values():
        await objects.put_bytes(data, "text/plain")
    files = [model_file(path, data).model_dump() for path, data in source.items()]
    report = await objects.put_bytes(json.dumps({"reference_files": files}).encode(), "application/json")
    await optimizer.announce(await optimizer.variant(model(), report=report))
    [package] = await published(world)
    manifest = Manifest.decode(await objects.get_bytes(package.manifest.digest))
    layers = {layer.annotations[FILE_PATH]: layer for layer in manifest.layers}
    assert await objects.get_bytes(layers["LICENSE"].digest) == source["LICENSE"]
    bom = json.loads(await objects.get_bytes(layers["bom.cdx.json"].digest))
    assert bom["metadata"]["component"]["licenses"] == [{"license": {"id": "MIT"}}]


async def test_a_variant_that_was_not_chosen_is_not_packaged(
    packager: None, world: World, optimizer: Optimizer
) -> None:
    await optimizer.announce(await optimizer.variant(model(), chosen=False))
    await optimizer.announce(await optimizer.variant(model(), recipe="int8"))
    [package] = await published(world)
    await settled(world)
    assert [p.recipe for p in await published(world)] == ["int8"] == [package.recipe]


async def test_a_variant_that_is_announced_several_times_is_published_once(
    packager: None, world: World, optimizer: Optimizer
) -> None:
    content = model()
    for number in range(4):
        variant = await optimizer.variant(content)
        await optimizer.announce(variant, id=f"announcement-{number}")
    await settled(world)
    assert len(await published(world)) == 1


@pytest.mark.slow
async def test_a_packager_that_is_killed_repeatedly_publishes_every_variant_once(
    world: World, settings: dict[str, Any], optimizer: Optimizer, objects: Objects, keys: Keys, tmp_path: Path
) -> None:
    process = Process.of("packager", tmp_path, settings)
    variants = [await optimizer.variant(model(2_000_000), recipe=f"recipe-{n}") for n in range(8)]
    for variant in variants:
        await optimizer.announce(variant)
    rng = random.Random(7)
    for _ in range(5):
        await process.start()
        await asyncio.sleep(rng.uniform(0, 0.5))
        process.kill()
    leftovers = tmp_path / "work" / "of-a-killed-one"
    leftovers.mkdir(parents=True)
    await process.start()
    try:
        packages = await published(world, len(variants), within_s=90)
        await settled(world)
    finally:
        assert process.stop() == 0, process.log()
    assert sorted(p.variant for p in packages) == sorted(v.digest for v in variants)
    assert len(await published(world)) == len(variants)
    assert list((tmp_path / "work").iterdir()) == []
    for package in packages:
        assert await objects.exists(package.manifest.digest)
        assert await objects.exists(package.signature.digest)


async def test_a_variant_whose_files_are_missing_or_changed_is_never_signed(
    packager: None, world: World, optimizer: Optimizer, objects: Objects, tmp_path: Path
) -> None:
    lost = await optimizer.variant(model(), recipe="lost")
    lost = lost.model_copy(update={"files": (lost.files[0].model_copy(update={"digest": digest_of(uuid4().bytes)}),)})
    changed = await optimizer.variant(model(), recipe="changed")
    await objects.put_object(blob_key(changed.files[1].digest), b"other bytes")
    wrong_size = await optimizer.variant(model(), recipe="wrong-size")
    sizes = tuple(file.model_copy(update={"size_bytes": 1}) for file in wrong_size.files)
    wrong_size = wrong_size.model_copy(update={"files": sizes})
    for variant in (lost, changed, wrong_size):
        await optimizer.announce(variant)
    dead = await world.dead_letters(3)
    assert sorted((m.headers or {})["slmops-dead-code"] for m in dead) == [
        "corrupt_blob",
        "digest_mismatch",
        "not_found",
    ]
    assert [m.subject for m in await world.stored("EVENTS") if m.subject == PackagePublished.type] == []
    assert list((tmp_path / "work").iterdir()) == []


async def test_a_full_disk_is_an_error_and_leaves_no_partial_files(
    s3: S3, optimizer: Optimizer, keys: Keys, tmp_path: Path
) -> None:
    variant = await optimizer.variant(model(1_000_000))
    store = {"s3_endpoint": s3.endpoint, "s3_access_key": s3.access_key, "s3_secret_key": s3.secret_key}
    given = {"objects": store | {"s3_bucket": s3.bucket}, "variant": variant.model_dump(mode="json", by_alias=True)}
    done = await asyncio.to_thread(run_on_a_small_disk, tmp_path / "small", keys.private, given)
    assert done.strip() == PASSED


async def test_a_gateway_may_fetch_only_packages_in_its_plan(
    packager: None, world: World, optimizer: Optimizer, rollout: Rollout, keys: Keys, tmp_path: Path
) -> None:
    for recipe in ("int4", "int8"):
        await optimizer.announce(await optimizer.variant(model(), recipe=recipe))
    old, new = sorted(await published(world, 2), key=lambda package: package.recipe)

    def ask(package: PackagePublished) -> FetchPackage:
        return FetchPackage(gateway_id="gw-1", manifest=package.manifest.digest)

    console = await world.connect("console")
    with pytest.raises(NotReady, match="enrolment"):
        await console.request(ask(old))
    gateway = await rollout.enrol("gw-1")

    async def known() -> bool | None:
        try:
            await gateway.request(ask(old))
        except NotReady as error:
            return True if "no plan" in error.what else None
        return None

    await eventually(known)
    await rollout.plan(release(old))
    with pytest.raises(Denied):
        await gateway.request(ask(new))
    await rollout.plan(release(old), candidate=release(new))
    for package in (old, new):
        await download(await gateway.request(ask(package)), tmp_path / package.recipe)
        verify_package(tmp_path / package.recipe, keys.public, package.manifest.digest)
    await rollout.plan(release(old))  # rolled back
    with pytest.raises(Denied, match="edge-chat"):
        await gateway.request(ask(new))
    await rollout.plan(release(new), blueprint="another")
    with pytest.raises(Denied):
        await gateway.request(ask(new))


async def test_a_plan_that_the_rollout_service_did_not_sign_for_the_blueprint_authorizes_nothing(
    packager: None, world: World, optimizer: Optimizer, rollout: Rollout
) -> None:
    await optimizer.announce(await optimizer.variant(model()))
    [package] = await published(world, 1)
    gateway, writer, key = await rollout.enrol("gw-1"), await world.connect("rollout"), read_key(rollout.plan_key)
    ask, now = FetchPackage(gateway_id="gw-1", manifest=package.manifest.digest), utc_now()
    plan = Plan(blueprint=BLUEPRINT, generation=1, stable=release(package))
    good = sign_plan(plan, key, now)
    bad = [
        (Attack.TOO_FEW_KEYS, b"not a plan"),
        (Attack.TOO_FEW_KEYS, plan.model_dump_json().encode()),
        (Attack.WRONG_KEY, sign_plan(plan, new_key(), now)),
        (Attack.WRONG_KEY, good.replace(b"ey", b"ez", 1)),
        (Attack.MIX_AND_MATCH, sign_plan(plan.model_copy(update={"blueprint": "kiosk"}), key, now)),
        (Attack.FREEZE, sign_plan(plan, key, now - timedelta(days=8))),
    ]

    async def answered() -> bool | None:
        try:
            await gateway.request(ask)
        except NotReady as error:  # the enrolment has not arrived
            return True if "no plan" in error.what else None
        return True

    await eventually(answered)
    revision = 0
    for attack, document in bad:
        revision = await writer.write_desired(subjects.blueprint_key(BLUEPRINT), document, revision)
        with pytest.raises(TrustRefused) as refusal:
            await gateway.request(ask)
        assert refusal.value.attack == attack, document
    await writer.write_desired(subjects.blueprint_key(BLUEPRINT), good, revision)
    assert (await gateway.request(ask)).files


async def test_a_gateway_cannot_fetch_in_the_name_of_another_one(packager: None, rollout: Rollout) -> None:
    gateway = await rollout.enrol("gw-1")
    await rollout.enrol("gw-2")
    nothing = digest_of(b"nothing")
    with pytest.raises(NotReady):
        await gateway.request(FetchPackage(gateway_id="gw-1", manifest=nothing))
    with pytest.raises(Unreachable):  # nats-server refuses the subject
        await gateway.request(FetchPackage(gateway_id="gw-2", manifest=nothing), timeout=timedelta(seconds=1))


async def test_a_packager_without_a_usable_signing_key_does_not_start(settings: dict[str, Any], tmp_path: Path) -> None:
    process = Process.of("packager", tmp_path, settings | {"signing_key": tmp_path / "none.pem"})
    assert await asyncio.to_thread(process.spawn().wait, 30) == InvalidMessage.exit_code
    assert "none.pem" in process.log()


async def test_slow_packaging_sends_in_progress_acknowledgements(
    world: World, settings: dict[str, Any], optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packaging that takes longer than the acknowledgement timeout is started only once."""
    started: list[str] = []
    assemble = Assembler.assemble

    async def slowly(self: Assembler, variant: VariantOptimized, *base: Any) -> Any:
        started.append(variant.recipe)
        await asyncio.sleep(ACK_WAIT_S + 3)
        return await assemble(self, variant, *base)

    monkeypatch.setattr(Assembler, "assemble", slowly)
    async with running(build(Settings.model_validate(settings))):
        await optimizer.announce(await optimizer.variant(model()))
        await published(world)
        await settled(world)
    assert started == ["int4"]

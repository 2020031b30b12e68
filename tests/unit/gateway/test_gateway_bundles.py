"""Which bundles a gateway without a network accepts, and which attack it names when it rejects one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from trust_world import TrustWorld, everything_below

from slmops.contracts.bundle import PLAN_NAME, BundleIndex, Member, metadata_name
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import PermanentError, TrustRefused
from slmops.contracts.manifest import OCI_MANIFEST
from slmops.contracts.plan import Desired, Identity, Plan, Release
from slmops.contracts.tuf_names import Attack
from slmops.gateway.install.authorization import Authorization
from slmops.gateway.install.bundles import Bundles
from slmops.gateway.twin import Twin
from slmops.kit.bundle import write_bundle
from slmops.kit.clock import utc_now
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import sign_plan

NOW = datetime.now(UTC)
IDENTITY = Identity(gateway_id="gw-1", blueprint="edge-chat")


@dataclass
class Follower:
    generations: list[int] = field(default_factory=list)
    refusals: list[PermanentError] = field(default_factory=list)

    def desired_changed(self, desired: Desired, plan: Plan) -> None:
        self.generations.append(plan.generation)

    def plan_refused(self, error: PermanentError) -> None:
        self.refusals.append(error)


class OfflineGateway:
    """Simulates a gateway without a network: its bundle folder, its trusted state and a recording follower."""

    def __init__(self, root: Path, world: TrustWorld, grace: timedelta = timedelta()) -> None:
        self.root, self.world, self.follower = root, world, Follower()
        self.drop = root / "drop"
        self.drop.mkdir()
        pinned = world.folder.first_root
        self.trust = Authorization(IDENTITY, lambda: self.bundles.source, root / "trust", pinned, utc_now, grace)
        twin = Twin(IDENTITY, self.trust.plan, self.follower, timedelta(seconds=60))
        self.bundles = Bundles(self.drop, root / "blobs", "edge-chat", self.trust, twin, timedelta(seconds=1))

    async def process_folder(self) -> None:
        for path, state in self.bundles._new_bundles():
            await self.bundles._process(path, state)

    def trusted(self) -> dict[str, bytes]:
        found = everything_below(self.root / "trust")
        return {path: data for path, data in found.items() if not path.startswith("state-")}

    async def accepts(self, path: Path) -> None:
        """Asserts that the bundle is accepted and its plan followed."""
        before = len(self.follower.generations)
        path.rename(self.drop / path.name)
        await self.process_folder()
        assert not self.follower.refusals, self.follower.refusals
        assert len(self.follower.generations) == before + 1

    async def rejects(self, path: Path) -> str:
        """Asserts that the bundle is rejected and changes no trusted state and no plan. Returns the attack."""
        before = self.trusted(), list(self.follower.generations), self.bundles.source
        path.rename(self.drop / path.name)
        await self.process_folder()
        assert (self.trusted(), self.follower.generations, self.bundles.source) == before
        [error] = self.follower.refusals
        self.follower.refusals.clear()
        await self.process_folder()
        assert not self.follower.refusals  # the same file is not processed twice
        assert isinstance(error, TrustRefused), error
        return error.attack


def metadata(world: TrustWorld) -> dict[str, bytes]:
    found = {
        f"{version}.{role}.json": data for (role, version), data in world.memory.files.items() if role != "timestamp"
    }
    return found | {"timestamp.json": world.memory.newest("timestamp") or b""}


def bundle(
    world: TrustWorld,
    files: Mapping[str, bytes] | None = None,
    generation: int = 1,
    blueprint: str = "edge-chat",
    planned: str = "edge-chat",
) -> Path:
    """Writes a bundle with any content, as an attacker could."""
    plan = sign_plan(Plan(blueprint=planned, generation=generation), read_key(world.folder.plan_key), world.now)
    named = metadata(world) if files is None else files
    content: dict[str, bytes | Path] = {metadata_name(name): data for name, data in named.items()}
    content[PLAN_NAME] = plan
    members = [
        Member(name=name, digest=digest_of(data), size=len(data))
        for name, data in sorted(content.items())
        if isinstance(data, bytes)
    ]
    index = BundleIndex(blueprint=blueprint, created_at=NOW, packages=(), members=tuple(members))
    out = world.folder.root / f"{len(list(world.folder.root.parent.rglob('*.slmops')))}.slmops"
    write_bundle(out, index, content)
    return out


@pytest.fixture
def world(tmp_path: Path) -> TrustWorld:
    return TrustWorld(tmp_path)


@pytest.fixture
def gateway(tmp_path: Path, world: TrustWorld) -> OfflineGateway:
    return OfflineGateway(tmp_path, world)


async def test_a_fresh_bundle_and_a_newer_one_are_accepted(gateway: OfflineGateway, world: TrustWorld) -> None:
    await gateway.accepts(bundle(world))
    world.publish()
    await gateway.accepts(bundle(world, generation=2))
    assert gateway.follower.generations == [1, 2]


async def test_an_older_bundle_is_rejected_as_a_rollback(gateway: OfflineGateway, world: TrustWorld) -> None:
    old, old_plan = bundle(world, generation=2), bundle(world, generation=1)
    world.publish()
    await gateway.accepts(bundle(world, generation=2))
    assert await gateway.rejects(old) == Attack.ROLLBACK
    newest = bundle(world, generation=1)
    assert await gateway.rejects(newest) == Attack.ROLLBACK  # only the plan is older
    assert await gateway.rejects(old_plan) == Attack.ROLLBACK


async def test_mixed_metadata_of_two_bundles_is_rejected(gateway: OfflineGateway, world: TrustWorld) -> None:
    first = metadata(world)
    world.publish()
    second, version = metadata(world), world.version("snapshot")
    only_newest_timestamp = first | {"timestamp.json": second["timestamp.json"]}
    assert await gateway.rejects(bundle(world, only_newest_timestamp)) == Attack.MIX_AND_MATCH
    older = first[f"{version - 1}.snapshot.json"]
    replaced = second | {f"{version}.snapshot.json": older}
    assert await gateway.rejects(bundle(world, replaced)) == Attack.MIX_AND_MATCH


async def test_a_bundle_for_another_blueprint_is_rejected_whatever_its_index_says(
    gateway: OfflineGateway, world: TrustWorld
) -> None:
    assert await gateway.rejects(bundle(world, blueprint="kiosk", planned="kiosk")) == Attack.MIX_AND_MATCH
    await gateway.accepts(bundle(world))
    assert await gateway.rejects(bundle(world, planned="kiosk")) == Attack.MIX_AND_MATCH


@pytest.mark.parametrize(
    ("age", "grace", "attack"),
    [
        (timedelta(hours=2), timedelta(), None),
        (timedelta(days=3), timedelta(), Attack.FREEZE),  # the timestamp
        (timedelta(days=3), timedelta(days=1), Attack.FREEZE),
        (timedelta(days=3), timedelta(days=3), None),
        (timedelta(days=30), timedelta(days=30), None),  # plan, snapshot and timestamp
        (timedelta(days=32), timedelta(days=30), Attack.FREEZE),
    ],
)
async def test_the_gateways_grace_decides_how_old_a_bundle_may_be(
    tmp_path: Path, age: timedelta, grace: timedelta, attack: Attack | None
) -> None:
    world = TrustWorld(tmp_path, NOW - age)
    gateway = OfflineGateway(tmp_path, world, grace)
    if attack is None:
        await gateway.accepts(bundle(world))
    else:
        assert await gateway.rejects(bundle(world)) == attack


async def test_the_grace_does_not_apply_to_the_metadata_of_keyholders(tmp_path: Path) -> None:
    for age, trusted in ((timedelta(days=89), True), (timedelta(days=90, hours=12), False)):
        root = tmp_path / str(age.days)
        world = TrustWorld(root, NOW - age)
        manifest = Descriptor.of(b"manifest", OCI_MANIFEST)
        world.publish(content=b"manifest")
        gateway = OfflineGateway(root, world, timedelta(days=90))
        await gateway.accepts(bundle(world))
        fields = {"revision": 1, "model": "smollm2", "version": "1.0.0", "size_bytes": 1}
        wanted = Release.model_validate(fields | {"manifest": manifest, "signature": manifest})
        if trusted:
            await gateway.trust.check(wanted)
            continue
        with pytest.raises(TrustRefused, match=Attack.EXPIRED):
            await gateway.trust.check(wanted)


async def test_an_expired_plan_in_a_fresh_bundle_is_rejected(tmp_path: Path) -> None:
    world = TrustWorld(tmp_path)
    gateway = OfflineGateway(tmp_path, world)
    await gateway.accepts(bundle(world))
    world.now = NOW - timedelta(days=8)  # the plan is older than the repository's metadata
    assert await gateway.rejects(bundle(world, generation=2)) == Attack.FREEZE


async def test_a_damaged_bundle_is_reported_and_the_next_is_accepted(
    gateway: OfflineGateway, world: TrustWorld
) -> None:
    damaged = bundle(world)
    data = bytearray(damaged.read_bytes())
    data[data.index(b'"signed"') + 20] ^= 1
    (gateway.drop / "damaged.slmops").write_bytes(data)
    await gateway.process_folder()
    [error] = gateway.follower.refusals
    assert error.code == "invalid_bundle"
    gateway.follower.refusals.clear()
    await gateway.accepts(damaged)

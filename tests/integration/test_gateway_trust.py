"""A gateway installs only packages that packager and rollout both signed for, and names each refused attack."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from disk_calls import DiskCalls, calls_of_this_thread
from integration.artifact_world import (
    eventually,
    running,
)
from integration.gateway_site import IDENTITY, Site, site_on
from trust_world import everything_below

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import TrustRefused, Unreachable
from slmops.contracts.plan import Plan
from slmops.contracts.tuf_names import Attack
from slmops.gateway.install.authorization import Authorization
from slmops.kit.clock import utc_now
from slmops.kit.trust import ceremony
from slmops.kit.trust.keys import new_key, read_key, read_keys
from slmops.kit.trust.plans import sign_plan
from slmops.packager import repository
from slmops.packager.app import build
from slmops.packager.settings import Settings

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner
    from servers import S3, NatsServer


@pytest.fixture
async def site(nats_server: NatsServer, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_on(nats_server, s3, tmp_path) as site:
        yield site


async def test_a_package_in_both_the_metadata_and_the_plan_is_installed(site: Site) -> None:
    wanted = await site.publish("1.0.0")
    slot = await site.install(wanted)
    assert slot.digest == wanted.manifest.digest
    assert (site.home / "trust/current/timestamp.json").exists()


async def test_no_step_of_an_install_waits_for_the_disk_on_the_event_loop(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop streams the users' answers meanwhile."""
    own = [site.home / name for name in ("blobs", "slots", "slots.json", "slots.new", "trust")]
    found = calls_of_this_thread(DiskCalls(monkeypatch, *own))
    for version in ("1.0.0", "1.0.1"):
        slot = await site.install(await site.publish(version))
        await site.slots.disk.complete(site.slots.activate)
        await site.slots.disk.complete(site.slots.commit)
        assert slot.path.is_dir()
    assert found == []


async def test_an_unsigned_package_is_refused_as_arbitrary(site: Site) -> None:
    wanted = await site.publish("1.0.0")
    await site.install(wanted)
    forged = wanted.manifest.model_copy(update={"digest": digest_of(b"forged")})
    assert await site.refused(wanted.model_copy(update={"manifest": forged})) == Attack.ARBITRARY_PACKAGE
    # A genuine package with another version or model than in the plan: an old one cannot be passed off as a new one.
    for changes in ({"version": "9.9.9"}, {"model": "other"}):
        another = wanted.model_copy(update={**changes, "manifest": wanted.manifest})
        site.slots.clear_failure(wanted.manifest.digest)
        with pytest.raises(TrustRefused, match=Attack.ARBITRARY_PACKAGE):
            await site.trust.check(another)
    longer = wanted.manifest.model_copy(update={"size": wanted.manifest.size + 1})
    with pytest.raises(TrustRefused, match=Attack.ARBITRARY_PACKAGE):
        await site.trust.check(wanted.model_copy(update={"manifest": longer}))


async def test_a_revoked_model_is_refused_even_if_it_is_installed(site: Site) -> None:
    wanted = await site.publish("1.0.0")
    await site.install(wanted)
    ceremony.revoke(site.folder, "smollm2", site.holders(), utc_now()).apply()

    async def revoked() -> str | None:
        try:
            await site.acquirer.acquire(wanted)
        except TrustRefused as error:
            return error.attack
        return None

    assert await eventually(revoked) == Attack.ARBITRARY_PACKAGE


async def test_without_a_packager_only_an_installed_release_can_be_acquired(site: Site) -> None:
    first, second = await site.publish("1.0.0"), await site.publish("1.0.1")
    await site.install(first)
    await site.packager.aclose()
    assert (await site.acquirer.acquire(first)).digest == first.manifest.digest  # a rollback, with the stored metadata
    site.slots.activate()
    site.slots.commit()
    with pytest.raises(Unreachable):
        await site.acquirer.acquire(second)


async def test_during_a_freeze_attack_the_gateway_keeps_its_release_and_installs_nothing_new(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway receives only metadata whose timestamp has expired."""
    first = await site.publish("1.0.0")
    kept = await site.install(first)
    site.slots.activate()
    site.slots.commit()
    await site.packager.aclose()
    with monkeypatch.context() as patch:
        patch.setitem(repository.VALID_FOR, "timestamp", timedelta(seconds=1))
        site.settings |= {"trust_renew_every": "PT1H"}
        await site.packager.enter_async_context(running(build(Settings.model_validate(site.settings))))
        second = await site.publish("1.0.1")
        await asyncio.sleep(2)
        assert await site.refused(second) == Attack.FREEZE
        assert site.slots.state.active == kept.name  # the same release is still active
        await site.packager.aclose()
        with pytest.raises(Unreachable):  # no answer at all is not an attack, and installs nothing
            await site.acquirer.acquire(second)
    site.settings |= {"trust_renew_every": "PT0.2S"}
    await site.packager.enter_async_context(running(build(Settings.model_validate(site.settings))))
    assert (await site.install(second)).digest == second.manifest.digest  # continues without an operator


async def test_metadata_of_a_restored_packager_database_is_refused_as_a_rollback(site: Site) -> None:
    """As after a restore from an old backup, or a replay by an attacker."""
    await site.publish("1.0.0")
    await site.packager.aclose()
    database = Path(site.settings["database_url"].removeprefix("sqlite:///"))
    kept = {path: path.read_bytes() for path in database.parent.glob(f"{database.name}*")}
    await site.start()
    wanted = await site.publish("1.0.1")
    await site.install(wanted)
    await site.packager.aclose()
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    await site.packager.enter_async_context(running(build(Settings.model_validate(site.settings))))
    assert await site.refused(wanted) == Attack.ROLLBACK


# ---- the plan ---------------------------------------------------------------------------------------------


def signed(site: Site, generation: int, **changes: Any) -> bytes:
    plan = Plan(blueprint=changes.pop("blueprint", "edge-chat"), generation=generation)
    signer = changes.pop("signer", None) or read_key(site.folder.plan_key)
    return sign_plan(plan, signer, changes.pop("at", utc_now()))


async def refused_plan(site: Site, data: bytes) -> str:
    """Asserts that a plan is refused and the stored generation unchanged. Returns the named attack."""
    before = everything_below(site.home / "trust")
    with pytest.raises(TrustRefused) as error:
        await site.trust.plan(data)
    after = everything_below(site.home / "trust")
    assert after["plan-edge-chat.json"] == before["plan-edge-chat.json"]
    return error.value.attack


async def test_a_plan_is_followed_only_if_the_rollout_service_signed_it(site: Site) -> None:
    good = signed(site, 5)
    assert (await site.trust.plan(good)).generation == 5
    assert (await site.trust.plan(good)).generation == 5  # repeating it is not an attack
    assert await refused_plan(site, signed(site, 6, signer=new_key())) == Attack.WRONG_KEY
    [online, *_] = read_keys(site.folder.online.glob("packages-*.pem")).values()
    assert await refused_plan(site, signed(site, 6, signer=online)) == Attack.WRONG_KEY  # the packager's key, too
    unsigned = Plan(blueprint="edge-chat", generation=6).model_dump_json().encode()
    assert await refused_plan(site, unsigned) == Attack.TOO_FEW_KEYS
    envelope = json.loads(good)
    payload = b64decode(envelope["payload"]).replace(b'"generation":5', b'"generation":9')
    forged = envelope | {"payload": b64encode(payload).decode()}
    assert await refused_plan(site, json.dumps(forged).encode()) == Attack.WRONG_KEY
    for damage in ({"payload": "%%%"}, {"signatures": [{"keyid": "x", "sig": "!"}]}):
        assert await refused_plan(site, json.dumps(envelope | damage).encode()) == Attack.CORRUPT
    assert await refused_plan(site, b" " * (2 << 20)) == Attack.ENDLESS_DATA
    assert await refused_plan(site, signed(site, 6, blueprint="kiosk")) == Attack.MIX_AND_MATCH
    assert await refused_plan(site, signed(site, 6, at=utc_now() - timedelta(days=8))) == Attack.FREEZE


async def test_a_lower_generation_is_refused_until_the_plan_key_is_revoked(site: Site) -> None:
    await site.trust.plan(signed(site, 5))
    assert await refused_plan(site, signed(site, 4)) == Attack.ROLLBACK
    again = Authorization(IDENTITY, lambda: site.bus, site.home / "trust", site.folder.first_root, utc_now)
    with pytest.raises(TrustRefused, match=Attack.ROLLBACK):  # also after a restart
        await again.plan(signed(site, 4))
    old = read_key(site.folder.plan_key)
    ceremony.rotate(site.folder, "rollout", site.holders(), utc_now()).apply()
    [new_file] = site.folder.rollout.glob("plan-*.pem")
    recovery = signed(site, 1, signer=read_key(new_file))

    async def named() -> bool | None:
        try:
            return bool(await site.trust.plan(signed(site, 6, signer=read_key(new_file))))
        except TrustRefused:
            return None

    await eventually(named)
    await site.trust.plan(signed(site, 1_000_000, signer=old))  # a fast-forward attack with the stolen key
    assert await refused_plan(site, recovery) == Attack.ROLLBACK
    ceremony.revoke(site.folder, old.public_key.keyid, site.holders(), utc_now()).apply()

    async def recovered() -> bool | None:
        try:
            await site.trust.refresh(site.bus)
            return (await site.trust.plan(recovery)).generation == 1
        except TrustRefused:
            return None

    assert await eventually(recovered)


async def test_a_stored_plan_whose_key_is_revoked_installs_nothing(site: Site) -> None:
    wanted = await site.publish("1.0.0")
    await site.rollout.plan(wanted)
    await site.trust.plan(await site.written())
    ceremony.rotate(site.folder, "rollout", site.holders(), utc_now()).apply()
    old = read_key(site.folder.plan_key).public_key.keyid
    ceremony.revoke(site.folder, old, site.holders(), utc_now()).apply()

    async def refused() -> str | None:
        try:
            await site.trust.check(wanted)
        except TrustRefused as error:
            return error.attack
        return None

    assert await eventually(refused) == Attack.WRONG_KEY


async def revoke_plan_key(site: Site) -> CryptoSigner:
    """Replaces the key that signs plans and returns the old one, once the packager's metadata no longer names it."""
    old = read_key(site.folder.plan_key)
    ceremony.rotate(site.folder, "rollout", site.holders(), utc_now()).apply()
    ceremony.revoke(site.folder, old.public_key.keyid, site.holders(), utc_now()).apply()
    observer = Authorization(IDENTITY, lambda: site.bus, site.home / "observer", site.folder.first_root, utc_now)

    async def revoked() -> bool | None:
        await observer.refresh(site.bus)
        keys = observer._state.rollout_keys()
        return (keys is not None and old.public_key.keyid not in {key.keyid for key in keys.keys}) or None

    await eventually(revoked)
    return old


async def test_a_new_plan_signed_by_a_revoked_key_is_refused_even_if_stored_metadata_lists_the_key(
    site: Site,
) -> None:
    """The metadata is refreshed for a new plan, although no installation has refreshed it since the revocation."""
    await site.trust.plan(signed(site, 5))
    old = await revoke_plan_key(site)
    assert await refused_plan(site, signed(site, 6, signer=old)) == Attack.WRONG_KEY
    assert await refused_plan(site, signed(site, 5, signer=old)) == Attack.WRONG_KEY  # nor the same generation again


async def test_without_a_packager_a_new_plan_is_followed_until_the_timestamp_expires(site: Site) -> None:
    """A fleet can roll back while the packager is down, but a stolen key is useful only until the timestamp expires."""
    await site.trust.plan(signed(site, 5))
    await site.packager.aclose()
    assert (await site.trust.plan(signed(site, 6))).generation == 6
    days_later = utc_now() + timedelta(days=2)
    later = Authorization(IDENTITY, lambda: site.bus, site.home / "trust", site.folder.first_root, lambda: days_later)
    with pytest.raises(Unreachable):
        await later.plan(signed(site, 7))
    assert (await later.plan(signed(site, 6))).generation == 6  # a generation that was accepted before stays accepted

"""A gateway installs what packager and rollout agree on, and says which attack it refused; on real NATS and S3."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
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


async def test_what_both_agree_on_is_installed(site: Site) -> None:
    wanted = await site.publish("1.0.0")
    slot = await site.install(wanted)
    assert slot.digest == wanted.manifest.digest
    assert (site.home / "trust/current/timestamp.json").exists()


async def test_a_package_that_nobody_vouched_for_is_arbitrary(site: Site) -> None:
    wanted = await site.publish("1.0.0")
    await site.install(wanted)
    forged = wanted.manifest.model_copy(update={"digest": digest_of(b"forged")})
    assert await site.refused(wanted.model_copy(update={"manifest": forged})) == Attack.ARBITRARY_PACKAGE
    # Genuine, but of another version and another model than the plan says: an old one cannot pass as a new one.
    for changes in ({"version": "9.9.9"}, {"model": "other"}):
        another = wanted.model_copy(update={**changes, "manifest": wanted.manifest})
        site.slots.clear_failure(wanted.manifest.digest)
        with pytest.raises(TrustRefused, match=Attack.ARBITRARY_PACKAGE):
            await site.trust.check(another)
    longer = wanted.manifest.model_copy(update={"size": wanted.manifest.size + 1})
    with pytest.raises(TrustRefused, match=Attack.ARBITRARY_PACKAGE):
        await site.trust.check(wanted.model_copy(update={"manifest": longer}))


async def test_a_revoked_model_is_refused_also_from_the_other_slot(site: Site) -> None:
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


async def test_without_a_packager_only_what_is_installed_may_be_taken(site: Site) -> None:
    first, second = await site.publish("1.0.0"), await site.publish("1.0.1")
    await site.install(first)
    await site.packager.aclose()
    assert (await site.acquirer.acquire(first)).digest == first.manifest.digest  # back, by what is here
    site.slots.activate()
    site.slots.commit()
    with pytest.raises(Unreachable):
        await site.acquirer.acquire(second)


async def test_after_a_freeze_it_keeps_what_it_has_and_installs_nothing_new(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off for longer than a timestamp lasts: whoever answers has yesterday's news only."""
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
        assert site.slots.state.active == kept.name  # it serves what it served
        await site.packager.aclose()
        with pytest.raises(Unreachable):  # nobody answers at all: no attack, and nothing new either
            await site.acquirer.acquire(second)
    site.settings |= {"trust_renew_every": "PT0.2S"}
    await site.packager.enter_async_context(running(build(Settings.model_validate(site.settings))))
    assert (await site.install(second)).digest == second.manifest.digest  # and goes on by itself


async def test_a_packager_that_is_rolled_back_is_found_out(site: Site) -> None:
    """Its database of an hour ago was restored, or somebody replays it."""
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
    """The attack that is named; the generation that is remembered stays."""
    before = everything_below(site.home / "trust")
    with pytest.raises(TrustRefused) as error:
        await site.trust.plan(data)
    after = everything_below(site.home / "trust")
    assert after["plan-edge-chat.json"] == before["plan-edge-chat.json"]
    return error.value.attack


async def test_a_plan_is_followed_only_if_rollout_signed_it(site: Site) -> None:
    good = signed(site, 5)
    assert (await site.trust.plan(good)).generation == 5
    assert (await site.trust.plan(good)).generation == 5  # the same again is no attack
    assert await refused_plan(site, signed(site, 6, signer=new_key())) == Attack.WRONG_KEY
    [online, *_] = read_keys(site.folder.online.glob("packages-*.pem")).values()
    assert await refused_plan(site, signed(site, 6, signer=online)) == Attack.WRONG_KEY  # the packager cannot either
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


async def test_the_generation_never_goes_back_until_its_key_is_revoked(site: Site) -> None:
    await site.trust.plan(signed(site, 5))
    assert await refused_plan(site, signed(site, 4)) == Attack.ROLLBACK
    again = Authorization(IDENTITY, lambda: site.bus, site.home / "trust", site.folder.first_root, utc_now)
    with pytest.raises(TrustRefused, match=Attack.ROLLBACK):  # a restart does not forget it
        await again.plan(signed(site, 4))
    old = read_key(site.folder.plan_key)
    ceremony.rotate(site.folder, "rollout", site.holders(), utc_now()).apply()
    [new_file] = site.folder.rollout.glob("plan-*.pem")
    beyond = signed(site, 1, signer=read_key(new_file))

    async def named() -> bool | None:
        try:
            return bool(await site.trust.plan(signed(site, 6, signer=read_key(new_file))))
        except TrustRefused:
            return None

    await eventually(named)
    await site.trust.plan(signed(site, 1_000_000, signer=old))  # a thief's fast-forward, before he was found out
    assert await refused_plan(site, beyond) == Attack.ROLLBACK
    ceremony.revoke(site.folder, old.public_key.keyid, site.holders(), utc_now()).apply()

    async def recovered() -> bool | None:
        try:
            await site.trust.refresh(site.bus)
            return (await site.trust.plan(beyond)).generation == 1
        except TrustRefused:
            return None

    assert await eventually(recovered)


async def test_a_plan_whose_key_was_revoked_since_installs_nothing(site: Site) -> None:
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


async def test_a_new_plan_of_a_revoked_key_is_not_followed_although_the_stored_metadata_names_the_key(
    site: Site,
) -> None:
    """Nothing was installed meanwhile, so nothing had refreshed the metadata: the plan was followed."""
    await site.trust.plan(signed(site, 5))
    old = await revoke_plan_key(site)
    assert await refused_plan(site, signed(site, 6, signer=old)) == Attack.WRONG_KEY
    assert await refused_plan(site, signed(site, 5, signer=old)) == Attack.WRONG_KEY  # nor the one that was followed


async def test_without_a_packager_a_new_plan_is_followed_until_the_timestamp_expires(site: Site) -> None:
    """A fleet can roll back while the packager is down, and a thief of a key cannot use that for ever."""
    await site.trust.plan(signed(site, 5))
    await site.packager.aclose()
    assert (await site.trust.plan(signed(site, 6))).generation == 6
    days_later = utc_now() + timedelta(days=2)
    later = Authorization(IDENTITY, lambda: site.bus, site.home / "trust", site.folder.first_root, lambda: days_later)
    with pytest.raises(Unreachable):
        await later.plan(signed(site, 7))
    assert (await later.plan(signed(site, 6))).generation == 6  # it was accepted before, signed again or not

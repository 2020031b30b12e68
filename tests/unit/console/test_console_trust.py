"""`slmops trust` on a folder: clients accept the metadata that each command signs, and a dry run changes nothing."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from trust_world import TrustWorld, everything_below
from unit.console.console_examples import nothing_set_up, slmops

from slmops.contracts.errors import InvalidMessage, TrustRefused
from slmops.contracts.plan import Plan
from slmops.contracts.tuf_names import Attack
from slmops.kit.clock import utc_now
from slmops.kit.trust import ceremony as engine
from slmops.kit.trust.folder import Folder
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import open_plan, sign_plan


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    trust("ceremony", Folder(tmp_path / "tuf"))
    return Folder(tmp_path / "tuf")


@pytest.fixture
def world(tmp_path: Path, folder: Folder) -> TrustWorld:
    """A packager that uses the ceremony's folder, and a client that trusts it."""
    world = TrustWorld(tmp_path)
    world.client.refresh(world.mirror, world.publish())
    return world


def trust(name: str, folder: Folder, *arguments: str) -> Any:
    done = slmops("trust", name, *arguments, "--folder", str(folder.root), "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refused(name: str, folder: Folder, *arguments: str) -> str:
    """Asserts that the command fails and leaves the folder unchanged. Returns the error's code."""
    before = everything_below(folder.root)
    done = slmops("trust", name, *arguments, "--folder", str(folder.root), "--json")
    assert done.exit_code != 0
    assert everything_below(folder.root) == before
    return str(json.loads(done.stderr)["code"])


def keys_of(role: str, folder: Folder) -> list[Path]:
    return sorted(folder.offline.glob(f"{role}-*.pem"))


def move_keys(role: str, folder: Folder, home: Path) -> list[Path]:
    """Moves the keyholders' keys to another folder, as after a real ceremony."""
    home.mkdir()
    return [path.rename(home / path.name) for path in keys_of(role, folder)]


def last_change(done: Any) -> str:
    return str(done["changes"][-1])


def root_version(world: TrustWorld) -> int:
    return int(json.loads((world.client.folder / "root.json").read_bytes())["signed"]["version"])


def test_a_packager_can_start_from_a_ceremony(folder: Folder, world: TrustWorld) -> None:
    assert (len(keys_of("root", folder)), len(keys_of("targets", folder))) == (3, 3)
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.root.rglob("*.pem"))
    assert world.client.refresh(world.mirror, world.publish(version="1.0.1")) is not None
    assert refused("ceremony", folder) == "already_exists"


def test_keyholders_in_different_places_can_rotate_the_root(folder: Folder, world: TrustWorld, tmp_path: Path) -> None:
    old = move_keys("root", folder, tmp_path / "old")
    assert "waits for 2 more" in last_change(trust("rotate", folder, "root"))
    assert refused("rotate", folder, "timestamp") == "illegal_transition"  # only one change at a time
    assert "waits for 1 more" in last_change(trust("sign", folder, "--key", str(old[0])))
    [waits] = trust("show", folder)["waiting"]
    assert (waits["role"], waits["version"], waits["missing"]) == ("root", 2, 1)
    assert set(waits["keys"]) == {read_key(path).public_key.keyid for path in old[1:]}
    world.adopt()
    world.client.refresh(world.mirror)
    assert root_version(world) == 1  # the threshold of the old keys is not reached yet
    assert "complete" in last_change(trust("sign", folder, "--key", str(old[2])))
    world.adopt()
    assert world.client.refresh(world.mirror, world.publish(version="1.0.1")) is not None
    assert root_version(world) == 2
    new = move_keys("root", folder, tmp_path / "new")
    trust("rotate", folder, "root", "--keep-keys")
    assert (
        refused("sign", folder, *(f"--key={path}" for path in old)) == "invalid_message"
    )  # the old keys are no longer trusted
    assert "complete" in last_change(trust("sign", folder, *(f"--key={path}" for path in new)))


def test_a_new_root_also_needs_the_threshold_of_its_own_keys(folder: Folder, tmp_path: Path) -> None:
    """Otherwise the old keyholders could name keys that nobody holds."""
    trust("rotate", folder, "root")
    [complete] = folder.metadata.glob("2.root.json")
    document = json.loads(complete.read_bytes())
    old = set(json.loads(folder.first_root.read_bytes())["signed"]["roles"]["root"]["keyids"])
    document["signatures"] = [s for s in document["signatures"] if s["keyid"] in old]
    folder.pending.mkdir(exist_ok=True)
    (folder.pending / complete.name).write_text(json.dumps(document))
    complete.unlink()
    by_old = [path for path in keys_of("root", folder) if read_key(path).public_key.keyid in old]
    assert refused("sign", folder, *(f"--key={path}" for path in by_old)) == "invalid_message"
    by_new = [path for path in keys_of("root", folder) if path not in by_old]
    assert "waits for 1 more" in last_change(trust("sign", folder, "--key", str(by_new[0])))
    assert "complete" in last_change(trust("sign", folder, "--key", str(by_new[1])))


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "packages", "rollout"])
def test_a_client_accepts_every_rotation(folder: Folder, world: TrustWorld, role: str) -> None:
    before = trust("show", folder)
    trust("rotate", folder, role)
    world.adopt()
    assert world.client.refresh(world.mirror, world.publish(version="1.0.1")) is not None
    after = trust("show", folder)
    keys = (
        {r["role"]: r["keys"] for r in view["roles"]} | {"rollout": view["rollout_keys"]} for view in (before, after)
    )
    assert [name for name, (old, new) in zip_values(*keys).items() if old != new] == [role]


def zip_values(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (first[name], second[name]) for name in first}


def test_a_dry_run_shows_the_changes_without_making_them(folder: Folder, world: TrustWorld, tmp_path: Path) -> None:
    elsewhere = Folder(tmp_path / "elsewhere")
    assert trust("ceremony", elsewhere, "--dry-run")["dry_run"] is True
    assert not elsewhere.root.exists()
    keyid = read_key(keys_of("targets", folder)[0]).public_key.keyid
    calls = [("rotate", "root"), ("rotate", "targets", "--keep-keys"), ("rotate", "rollout"), ("revoke", "smollm2")]
    for name, *arguments in [*calls, ("revoke", "smollm2:1.0.0"), ("revoke", keyid[:8])]:
        before = everything_below(folder.root)
        planned = trust(name, folder, *arguments, "--dry-run")
        assert everything_below(folder.root) == before
        assert planned["changes"]
    old = move_keys("targets", folder, tmp_path / "old")
    trust("rotate", folder, "targets", "--keep-keys")
    before = everything_below(folder.root)
    sign = [f"--key={path}" for path in old]
    planned = trust("sign", folder, *sign, "--dry-run")["changes"]
    assert everything_below(folder.root) == before
    assert trust("sign", folder, *sign)["changes"] == planned
    assert everything_below(folder.root) != before


def test_a_revoked_model_or_version_cannot_be_published_again(folder: Folder, world: TrustWorld) -> None:
    first, second = world.publish(version="1.0.0"), world.publish(version="1.0.1")
    other = world.publish(model="other")
    trust("revoke", folder, "smollm2:1.0.0")
    world.adopt()
    again = world.publish(version="1.0.0", content=b"the packager was broken into")
    assert [world.client.refresh(world.mirror, path) is None for path in (first, again, second)] == [True, True, False]
    assert refused("revoke", folder, "smollm2:1.0.0") == "already_exists"
    trust("revoke", folder, "smollm2")
    world.adopt()
    assert world.client.refresh(world.mirror, second) is None
    assert world.client.refresh(world.mirror, other) is not None
    assert trust("show", folder)["revoked"] == ["smollm2/1.0.0/*/manifest.json", "smollm2/*/*/manifest.json"]
    for nothing in ("smollm2:1", "Smol", "1a2b3c4d"):  # no key id starts with the last one
        assert refused("revoke", folder, nothing) == "not_found"


def test_the_signature_of_a_revoked_keyholder_does_not_count(folder: Folder, world: TrustWorld) -> None:
    gone, *others = keys_of("targets", folder)
    trust("revoke", folder, read_key(gone).public_key.keyid[:8])
    world.adopt()
    assert world.client.refresh(world.mirror, world.publish(version="1.0.1")) is not None
    both = ("--key", str(gone), "--key", str(others[0]))
    assert "waits for 1 more" in last_change(trust("rotate", folder, "targets", "--keep-keys", *both))
    assert refused("sign", folder, "--key", str(gone)) == "invalid_message"
    trust("sign", folder, "--key", str(others[1]))
    assert refused("revoke", folder, read_key(others[0]).public_key.keyid) == "illegal_transition"  # 1 left, 2 needed


def test_a_plan_signed_by_a_revoked_key_is_refused(folder: Folder, world: TrustWorld) -> None:
    old = read_key(folder.plan_key)
    plan = sign_plan(Plan(blueprint="edge-chat", generation=1), old, world.now)
    trust("rotate", folder, "rollout")
    world.adopt()
    world.client.refresh(world.mirror)
    keys = world.client.rollout_keys()
    assert keys is not None and open_plan(plan, keys)  # both keys are trusted until the new one is in use
    trust("revoke", folder, old.public_key.keyid[:8])
    world.adopt()
    world.client.refresh(world.mirror)
    keys = world.client.rollout_keys()
    assert keys is not None
    with pytest.raises(TrustRefused, match=Attack.WRONG_KEY):
        open_plan(plan, keys)


def test_new_online_keys_allow_clients_to_continue_after_a_lost_database(folder: Folder, world: TrustWorld) -> None:
    kept = dict(world.memory.files)
    for version in ("1.0.1", "1.0.2"):
        world.client.refresh(world.mirror, world.publish(version=version))
    world.memory.files = kept
    with pytest.raises(TrustRefused, match=Attack.ROLLBACK):
        world.client.refresh(world.mirror)
    trust("rotate", folder, "timestamp")
    trust("rotate", folder, "snapshot")
    world.adopt()
    assert world.client.refresh(world.mirror, world.publish(version="1.0.1")) is not None


def test_the_default_folder_is_that_of_the_selected_system(tmp_path: Path) -> None:
    systems = [tmp_path / name for name in ("named", "other")]
    for system in systems:
        trust("ceremony", Folder(system / "keys" / "tuf"))
        (system / "client.json").write_text('{"nats_url": "nats://127.0.0.1:1"}')
    shown = [json.loads(slmops("trust", "show", "--data", str(s), "--json").stdout) for s in systems]
    assert shown == [trust("show", Folder(system / "keys" / "tuf")) for system in systems]
    assert shown[0] != shown[1]
    assert "nowhere" in slmops("trust", "show").stderr  # the default data folder, without a ceremony


def test_show_lists_roles_versions_and_keys(folder: Folder) -> None:
    shown = trust("show", folder)
    assert [role["role"] for role in shown["roles"]] == ["root", "targets", "snapshot", "timestamp", "packages"]
    assert [(r["version"], r["threshold"], len(r["keys"])) for r in shown["roles"][:2]] == [(1, 2, 3), (1, 2, 3)]
    assert (shown["revoked"], shown["waiting"]) == ([], [])
    text = slmops("trust", "show", "--folder", str(folder.root))
    assert text.exit_code == 0
    assert shown["rollout_keys"][0][:8] in text.stderr


def test_a_locked_key_signs_only_with_its_passphrase(folder: Folder, world: TrustWorld, tmp_path: Path) -> None:
    keys = move_keys("targets", folder, tmp_path / "away")
    before = read_key(keys[0])
    done = slmops("trust", "lock", str(keys[0]), "--json", stdin="open sesame\nopen sesame\n")
    assert done.exit_code == 0, done.stderr
    assert b"ENCRYPTED" in keys[0].read_bytes() and before.private_bytes not in keys[0].read_bytes()
    assert keys[0].stat().st_mode & 0o077 == 0
    assert "open sesame" not in done.stdout + done.stderr
    trust("rotate", folder, "targets", "--keep-keys")
    sign = ("trust", "sign", "--key", str(keys[0]), "--key", str(keys[1]), "--folder", str(folder.root), "--json")
    for said, what in (("sesame\n", "does not open"), (None, "")):
        wrong = slmops(*sign, stdin=said)
        assert wrong.exit_code != 0 and what in wrong.stderr
    right = slmops(*sign, stdin="open sesame\n")
    assert "complete" in last_change(json.loads(right.stdout))
    world.adopt()
    assert world.client.refresh(world.mirror, world.publish(version="1.0.1")) is not None

    changed = slmops("trust", "lock", str(keys[0]), stdin="open sesame\nanother\nanother\n")
    assert changed.exit_code == 0
    assert read_key(keys[0], lambda _: b"another").public_key == before.public_key
    with pytest.raises(InvalidMessage, match="is locked"):
        read_key(keys[0])
    assert slmops("trust", "lock", str(keys[1]), stdin="one\ntwo\n").exit_code != 0
    assert read_key(keys[1])


@pytest.mark.parametrize(
    ("signed_days_ago", "validity", "says"),
    [(300, "valid", ""), (310, "expires soon", "in 5"), (366, "expired", "expired on")],
)
def test_show_warns_sixty_days_before_root_and_targets_expire(
    tmp_path: Path, signed_days_ago: int, validity: str, says: str
) -> None:
    folder = Folder(tmp_path / "old")
    engine.ceremony(folder, utc_now() - timedelta(days=signed_days_ago)).apply()
    shown = trust("show", folder)
    assert [role["validity"] for role in shown["roles"][:2]] == [validity, validity]
    assert [text.split()[0] for text in shown["warnings"]] == (["root", "targets"] if says else [])
    text = slmops("trust", "show", "--folder", str(folder.root))
    assert ("Warning: root" in text.stderr) is bool(says)
    assert says in text.stderr
    trust("rotate", folder, "root", "--keep-keys")
    trust("rotate", folder, "targets", "--keep-keys")
    assert trust("show", folder)["warnings"] == []


def test_show_lists_the_role_of_revocations(folder: Folder) -> None:
    trust("revoke", folder, "smollm2")
    [revoked] = [role for role in trust("show", folder)["roles"] if role["role"] == "revoked"]
    assert (revoked["validity"], revoked["threshold"], len(revoked["keys"])) == ("valid", 2, 3)

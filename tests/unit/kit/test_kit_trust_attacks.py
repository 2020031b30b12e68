"""Attacks on the metadata: each is refused by its name, and the trusted state stays the same byte for byte."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from trust_world import Mirror, TrustWorld, everything_below
from tuf.api.exceptions import DownloadError

from slmops.contracts import freshness
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InvalidMessage, NotReady, TrustRefused, Unreachable
from slmops.contracts.tuf_names import METADATA_LIMIT_BYTES, Attack
from slmops.kit.trust import ceremony
from slmops.kit.trust.client import TrustedState
from slmops.kit.trust.keys import new_key, read_keys


@pytest.fixture
def world(tmp_path: Path) -> TrustWorld:
    """A client that trusts a repository with one package."""
    world = TrustWorld(tmp_path)
    path = world.publish()
    found = world.client.refresh(world.mirror, path)
    assert found is not None and found.digest == digest_of(b"manifest")
    return world


def refusal(world: TrustWorld, path: str | None = None) -> str:
    """Returns the attack that the client names, after checking that its trusted state is unchanged and still works."""
    before = everything_below(world.client.folder)
    with pytest.raises(TrustRefused) as refused:
        world.client.refresh(world.mirror, path)
    assert everything_below(world.client.folder) == before
    assert [p.name for p in world.client.folder.parent.glob("state-*")] == [world.client.folder.resolve().name]
    world.mirror.overrides.clear()
    return refused.value.attack


def test_a_target_that_is_not_listed_is_not_found(world: TrustWorld) -> None:
    assert world.client.refresh(world.mirror, "smollm2/1.0.0/" + "0" * 64 + "/manifest.json") is None
    assert world.client.refresh(world.mirror, "other/1.0.0/" + "0" * 64 + "/manifest.json") is None


def test_rollback_of_the_timestamp(world: TrustWorld) -> None:
    old = world.file("timestamp.json")
    world.publish(version="1.0.1")
    world.client.refresh(world.mirror)
    world.mirror.overrides["timestamp.json"] = old
    assert refusal(world) == Attack.ROLLBACK


def test_rollback_of_one_model_inside_a_new_snapshot(world: TrustWorld) -> None:
    world.publish(version="1.0.1")
    world.client.refresh(world.mirror)
    world.publish(version="1.0.2")
    snapshot = world.sign_as(
        "snapshot", lambda s: s["meta"]["model-smollm2.json"].update(version=1), world.online("snapshot")
    )
    retimed(world, snapshot)
    assert refusal(world) == Attack.ROLLBACK


def test_a_model_that_vanishes_from_the_snapshot(world: TrustWorld) -> None:
    world.publish(version="1.0.1")
    retimed(world, world.sign_as("snapshot", lambda s: s["meta"].pop("model-smollm2.json"), world.online("snapshot")))
    assert refusal(world) == Attack.ROLLBACK


def retimed(world: TrustWorld, snapshot: bytes) -> None:
    """Makes a timestamp that names the forged snapshot, as an attacker with both online keys does."""

    def edit(signed: dict[str, Any]) -> None:
        meta = signed["meta"]["snapshot.json"]
        meta |= {"length": len(snapshot), "hashes": {"sha256": digest_of(snapshot).removeprefix("sha256:")}}

    world.mirror.overrides[f"{world.version('snapshot')}.snapshot.json"] = snapshot
    world.mirror.overrides["timestamp.json"] = world.sign_as("timestamp", edit, world.online("timestamp"))


def test_freeze(world: TrustWorld) -> None:
    world.age(timedelta(days=2))  # the newest available timestamp is two days old
    assert refusal(world) == Attack.FREEZE


def test_what_expired_by_a_wrong_clock_names_the_clock(world: TrustWorld) -> None:
    world.age(timedelta(days=2))
    with pytest.raises(TrustRefused, match=r"has expired on 20.*this machine's clock says 20.*Check the clock"):
        world.client.refresh(world.mirror)


def test_freeze_of_the_snapshot(world: TrustWorld) -> None:
    world.publish(version="1.0.1")
    old = world.sign_as("snapshot", lambda s: s.update(expires="2020-01-01T00:00:00Z"), world.online("snapshot"))
    retimed(world, old)
    assert refusal(world) == Attack.FREEZE


def test_expired_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = TrustWorld(tmp_path)
    world.client.refresh(world.mirror)
    with monkeypatch.context() as patched:
        patched.setattr(freshness, "KEYHOLDERS", timedelta(days=-1))
        ceremony.rotate(world.folder, "root", world.holders(), world.now, keep_keys=True).apply()
    world.adopt()
    assert refusal(world) == Attack.EXPIRED


def test_an_expired_delegated_role(world: TrustWorld) -> None:
    path = world.publish(version="1.0.1")
    world.age(timedelta(days=100))
    world.repository().settle  # noqa: B018
    repository = world.repository()
    good = repository._is_current
    repository._is_current = lambda d, role, m: role.startswith("model-") or good(d, role, m)  # type: ignore[method-assign]
    repository.settle()
    assert refusal(world, path) == Attack.EXPIRED


def test_mix_and_match_of_an_older_snapshot(world: TrustWorld) -> None:
    old = world.file(f"{world.version('snapshot')}.snapshot.json")
    world.publish(version="1.0.1")
    world.mirror.overrides[f"{world.version('snapshot')}.snapshot.json"] = old
    assert refusal(world) == Attack.MIX_AND_MATCH


def test_mix_and_match_of_an_older_model_role(world: TrustWorld) -> None:
    old = world.file(f"{world.version('model-smollm2')}.model-smollm2.json")
    path = world.publish(version="1.0.1")
    world.mirror.overrides[f"{world.version('model-smollm2')}.model-smollm2.json"] = old
    assert refusal(world, path) == Attack.MIX_AND_MATCH


def test_a_snapshot_of_another_version_than_the_timestamp_says(world: TrustWorld) -> None:
    world.publish(version="1.0.1")
    retimed(world, world.sign_as("snapshot", lambda s: s.update(version=s["version"] + 7), world.online("snapshot")))
    assert refusal(world) == Attack.MIX_AND_MATCH


def test_one_kind_of_metadata_in_the_place_of_another(world: TrustWorld) -> None:
    world.mirror.overrides["timestamp.json"] = world.memory.newest("snapshot")
    assert refusal(world) == Attack.MIX_AND_MATCH


def test_a_timestamp_by_a_foreign_key(world: TrustWorld) -> None:
    world.mirror.overrides["timestamp.json"] = world.sign_as("timestamp", lambda s: s.update(version=9), new_key())
    assert refusal(world) == Attack.WRONG_KEY


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_keys_rotated_between_two_reads_are_not_an_attack(world: TrustWorld, role: str) -> None:
    """The client finds no second root. Then there is one, and all other files are signed by its keys."""

    def rotate_now() -> Iterator[bytes]:
        world.mirror.overrides.clear()
        ceremony.rotate(world.folder, role, world.holders(), world.now).apply()
        world.adopt()
        yield from world.mirror.fetch("tuf://repository/timestamp.json")

    world.mirror.overrides["timestamp.json"] = rotate_now()
    path = world.publish(version="1.0.1")
    assert world.client.refresh(world.mirror, path) is not None
    assert world.version("root") == 2


def test_a_package_signed_by_another_models_key(world: TrustWorld) -> None:
    """The holder of one model's key cannot publish another model, because its role is not delegated that path."""
    other = world.publish(model="other", content=b"other")
    assert world.client.refresh(world.mirror, other) is not None
    wanted = "smollm2/6.6.6/" + "6" * 64 + "/manifest.json"
    target = {"length": 1, "hashes": {"sha256": "6" * 64}}
    repository = world.repository()
    metadata = json.loads(world.memory.newest("model-other") or b"")
    metadata["signed"]["targets"][wanted] = target
    world.memory.put("model-other", world.version("model-other"), json.dumps(metadata).encode())
    repository._is_current = lambda *_: False  # type: ignore[method-assign]
    repository.settle()  # each file is signed again by its own key
    assert world.client.refresh(world.mirror, other) is not None
    assert world.client.refresh(world.mirror, wanted) is None


def test_a_root_signed_by_too_few_keyholders(world: TrustWorld) -> None:
    ceremony.rotate(world.folder, "root", world.holders(), world.now, keep_keys=True).apply()
    document = json.loads((world.folder.metadata / "2.root.json").read_bytes())
    document["signatures"] = document["signatures"][:1]
    world.mirror.overrides["2.root.json"] = json.dumps(document).encode()
    assert refusal(world) == Attack.TOO_FEW_KEYS


def test_a_root_signed_only_by_its_own_new_keys(world: TrustWorld, tmp_path: Path) -> None:
    foreign = TrustWorld(tmp_path / "foreign")
    ceremony.rotate(foreign.folder, "root", foreign.holders(), foreign.now).apply()
    world.mirror.overrides["2.root.json"] = (foreign.folder.metadata / "2.root.json").read_bytes()
    assert refusal(world) == Attack.WRONG_KEY


def test_a_root_that_skips_versions(world: TrustWorld) -> None:
    for _ in range(2):
        ceremony.rotate(world.folder, "root", world.holders(), world.now, keep_keys=True).apply()
    world.mirror.overrides["2.root.json"] = (world.folder.metadata / "3.root.json").read_bytes()
    assert refusal(world) == Attack.ROLLBACK


@pytest.mark.parametrize("name", ["timestamp.json", "{}.snapshot.json", "{}.model-smollm2.json", "2.root.json"])
def test_endless_data_is_not_read_to_its_end(world: TrustWorld, name: str) -> None:
    path = world.publish(version="1.0.1")
    given = 0

    def endless() -> Iterator[bytes]:
        nonlocal given
        for _ in itertools.count():
            given += 1 << 16
            yield b"x" * (1 << 16)

    role = name.removesuffix(".json").rpartition(".")[2]
    world.mirror.overrides[name.format(world.version(role))] = endless()
    tracemalloc.start()
    assert refusal(world, path) == Attack.ENDLESS_DATA
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert given <= METADATA_LIMIT_BYTES + (1 << 17)
    assert peak < 8 << 20


def test_a_wrong_size_in_the_metadata(world: TrustWorld) -> None:
    path = world.publish(version="1.0.1")

    def edit(signed: dict[str, Any]) -> None:
        signed["meta"]["model-smollm2.json"]["length"] = 1 << 50

    retimed(world, world.sign_as("snapshot", edit, world.online("snapshot")))
    assert refusal(world, path) == Attack.MIX_AND_MATCH


@pytest.mark.parametrize("algorithm", ["md5", "sha512", "shake_128", "crc32"])
def test_digests_of_another_algorithm(world: TrustWorld, algorithm: str) -> None:
    import hashlib

    path = world.publish(version="1.0.1")
    data = world.file(f"{world.version('model-smollm2')}.model-smollm2.json") or b""
    named = hashlib.new(algorithm, data).hexdigest() if algorithm in ("md5", "sha512") else "00"

    def edit(signed: dict[str, Any]) -> None:
        signed["meta"]["model-smollm2.json"]["hashes"] = {algorithm: named}

    retimed(world, world.sign_as("snapshot", edit, world.online("snapshot")))
    assert refusal(world, path) == Attack.OTHER_ALGORITHM


def hostile(text: bytes) -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda _: b"",
        "truncated": lambda data: data[: len(data) // 2],
        "no json": lambda _: b"\x00\xff" * 40,
        "a list": lambda _: b"[]",
        "deep": lambda _: b"[" * 8000,
        "null signed": lambda _: b'{"signed": null, "signatures": []}',
        "no signatures": lambda data: json.dumps({"signed": json.loads(data)["signed"]}).encode(),
        "huge number": lambda data: data.replace(b'"version":', b'"version":1' + b"0" * 5000 + b',"x":', 1),
    }


@pytest.mark.parametrize("how", hostile(b""))
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "model-smollm2"])
def test_invalid_metadata_is_rejected(world: TrustWorld, role: str, how: str) -> None:
    path = world.publish(version="1.0.1")
    name = "timestamp.json" if role == "timestamp" else f"{world.version(role)}.{role}.json"
    world.mirror.overrides[name] = hostile(b"")[how](world.file(name) or b"")
    assert refusal(world, path) in (Attack.CORRUPT, Attack.MIX_AND_MATCH, Attack.ENDLESS_DATA)


def test_every_flipped_byte_is_refused(world: TrustWorld) -> None:
    data = (world.publish(version="1.0.1") and world.file("timestamp.json")) or b""
    for at in range(0, len(data), 37):
        world.mirror.overrides["timestamp.json"] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert refusal(world) in (Attack.CORRUPT, Attack.WRONG_KEY, Attack.TOO_FEW_KEYS, Attack.MIX_AND_MATCH)


def test_a_mirror_that_does_not_answer_is_not_an_attack(world: TrustWorld) -> None:
    def dead(_name: str) -> bytes:
        raise DownloadError("connection reset")

    before = everything_below(world.client.folder)
    with pytest.raises(Unreachable):
        world.client.refresh(Mirror(dead))
    with pytest.raises(NotReady):
        world.client.refresh(Mirror(lambda _: None))
    assert everything_below(world.client.folder) == before


def test_an_invalid_pinned_root_is_rejected(world: TrustWorld, tmp_path: Path) -> None:
    (tmp_path / "root.json").write_text("{}")
    with pytest.raises(InvalidMessage, match="trusted root"):
        TrustedState(tmp_path / "another", tmp_path / "root.json").refresh(world.mirror)


def test_one_refresh_follows_rotations_and_a_revocation(world: TrustWorld) -> None:
    """After rotations of every online key and the root, and a revocation, one refresh is enough."""
    path, other = world.publish(version="1.0.1"), world.publish(model="other", content=b"other")
    for role in ceremony.ROTATED:
        ceremony.rotate(world.folder, role, world.holders(), world.now).apply()
    ceremony.revoke(world.folder, "other", world.holders(), world.now).apply()
    world.adopt()
    assert world.client.refresh(world.mirror, path) is not None
    assert world.client.refresh(world.mirror, other) is None
    keys = world.client.rollout_keys()
    assert keys is not None and len(keys.keys) == 2
    assert len(read_keys(world.folder.online.glob("*.pem"))) == 6

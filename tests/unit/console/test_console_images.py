"""The content of an image, without an engine: its bytes, its labels, and no secrets."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from trust_world import TrustWorld
from unit.console.console_examples import nothing_set_up, slmops
from unit.packager.packager_examples import CONTENT, Keys, new_keys, write_package

from slmops.console.commands.images import package_context
from slmops.console.image.buildcontext import source_files, stream, wheels
from slmops.console.image.factory import Factory, read
from slmops.contracts.blueprint import Blueprint, ProbePolicy, RuntimeSettings
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import DigestMismatch, InvalidMessage, NotFound, SignatureInvalid
from slmops.contracts.plan import Release
from slmops.contracts.profile import EDGE_SMALL

ROOT = Path(__file__).parents[3]
BLUEPRINT = Blueprint(
    name="edge-chat", model="smollm2", probe=ProbePolicy(max_ttft_s=3), runtime=RuntimeSettings(max_tokens=9)
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TrustWorld(tmp_path_factory.mktemp("trust")).folder.first_root


@pytest.fixture
def package(tmp_path: Path, keys: Keys) -> Path:
    write_package(tmp_path / "package", keys)
    return tmp_path / "package"


@pytest.fixture
def factory(package: Path, keys: Keys, root: Path) -> Factory:
    return read(package, keys.public, root, BLUEPRINT)


def unpacked(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive}


def everything(factory: Factory) -> bytes:
    return b"".join(stream(package_context(factory, "edge-chat"), factory.created))


# ---- the tar ----------------------------------------------------------------------------------------------


def test_a_context_depends_only_on_the_content_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "b").write_bytes(b"")
    one = b"".join(stream({"deep/a": tmp_path / "a", "b": tmp_path / "b", "c": b"text"}))
    os.utime(tmp_path / "a", (1, 1))
    (tmp_path / "b").chmod(0o600)
    assert b"".join(stream({"c": b"text", "b": tmp_path / "b", "deep/a": tmp_path / "a"})) == one
    members = unpacked(one)
    assert list(members) == ["b", "c", "deep", "deep/a"]
    assert {(m.uid, m.gid, m.mtime) for m in members.values()} == {(0, 0, 0)}
    assert [m.mode for m in members.values()] == [0o644, 0o644, 0o755, 0o644]
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        file = archive.extractfile("deep/a")
        assert file
        assert file.read() == b"x" * 1000


def test_a_file_that_changes_during_the_build_stops_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    parts = stream({"a": tmp_path / "a"})
    next(parts)  # the header, which contains the size
    (tmp_path / "a").write_bytes(b"x" * 999)
    with pytest.raises(DigestMismatch, match="999"):
        list(parts)


# ---- the gateway's image ----------------------------------------------------------------------------------


def test_the_context_of_a_gateway_contains_everything_that_its_dockerfile_copies() -> None:
    text = (ROOT / "deploy/docker/Dockerfile").read_text()
    upto = text[: text.index("AS gateway\n")]
    copied = [line.split()[1] for line in upto.splitlines() if re.match(r"COPY (?!--from)", line)]
    assert {"constraints.txt", "shared", "services/gateway", "deploy/docker/healthy.py"} == set(copied)
    context = source_files(ROOT)
    for path in copied:
        assert any(file == path or file.startswith(f"{path}/") for file in context), path
    assert "services/gateway/src/slmops/gateway/install/factory.py" in context
    assert not any("__pycache__" in file or file.startswith("services/packager") for file in context)


def test_other_files_of_a_checkout_are_not_in_the_context(tmp_path: Path) -> None:
    for folder in ("shared", "services/gateway", "deploy/docker"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    before = set(source_files(tmp_path))
    for secret in (".env", "shared/.env", "services/gateway/package-signing.pem", "deploy/docker/nats.creds"):
        (tmp_path / secret).write_text("secret")
    (tmp_path / "shared/src/link").symlink_to("/etc/passwd")
    assert set(source_files(tmp_path)) == before


def test_a_folder_without_a_checkout_or_without_wheels_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no constraints\.txt"):
        source_files(tmp_path)
    with pytest.raises(NotFound, match="no wheels"):
        wheels(tmp_path)


# ---- the package on top -----------------------------------------------------------------------------------


def test_an_image_contains_only_the_package_its_release_and_the_public_keys(
    factory: Factory, keys: Keys, package: Path
) -> None:
    files = {path.removeprefix("device/opt/factory/") for path in package_context(factory, None)}
    laid_out = {f"package/{path.relative_to(package).as_posix()}" for path in package.rglob("*") if path.is_file()}
    assert files == laid_out | {"release.json", "trusted.pem", "trusted-root.json", "Dockerfile"}
    data = everything(factory)
    assert keys.public.read_bytes() in data
    assert b"PRIVATE" not in data
    assert b"enrolment-token\n" not in data
    assert all(content in data for content in CONTENT.values())


def test_the_same_package_gives_the_same_bytes_in_any_folder(
    factory: Factory, keys: Keys, root: Path, package: Path, tmp_path: Path
) -> None:
    here = everything(factory)
    moved = shutil.move(package, tmp_path / "elsewhere")
    assert everything(read(moved, keys.public, root, BLUEPRINT)) == here
    assert {member.mtime for member in unpacked(here).values()} == {factory.created.timestamp()}


def test_the_release_has_the_settings_of_blueprint_and_profile(factory: Factory, package: Path) -> None:
    release = Release.model_validate_json(bytes(factory.files()["release.json"]))
    assert release == factory.release
    assert (release.model, release.version, release.probe, release.runtime) == (
        "smollm2",
        "1.0.0",
        BLUEPRINT.probe,
        BLUEPRINT.runtime,
    )
    assert (release.min_tokens_per_s, release.max_rss_bytes) == (EDGE_SMALL.min_tokens_per_s, EDGE_SMALL.ram_bytes)
    assert release.manifest.digest == digest_of((package / "manifest.json").read_bytes())
    assert release.size_bytes == sum(layer.size for layer in factory.manifest.layers)


def test_the_labels_describe_the_content(factory: Factory) -> None:
    assert factory.labels("python:3.12-slim") == {
        "org.opencontainers.image.title": "slmops gateway with smollm2",
        "org.opencontainers.image.version": "1.0.0",
        "org.opencontainers.image.created": "2030-01-01T00:00:00+00:00",
        "org.opencontainers.image.base.name": "python:3.12-slim",
        "io.slmops.model": "smollm2",
        "io.slmops.profile": "edge-small",
        "io.slmops.recipe": "int4",
        "io.slmops.manifest": factory.release.manifest.digest,
    }


def test_the_dockerfile_runs_no_command_and_sets_a_user_other_than_root(factory: Factory) -> None:
    context = package_context(factory, "edge-chat")
    lines = bytes(context["Dockerfile"]).decode().splitlines()
    assert not [line for line in lines if line.startswith(("RUN", "ADD"))]
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]
    assert "ENV SLMOPS_BLUEPRINT=edge-chat" in lines
    assert b"SLMOPS_BLUEPRINT" not in bytes(package_context(factory, None)["Dockerfile"])


def test_a_package_that_the_key_did_not_sign_is_rejected(package: Path, keys: Keys, root: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid):
        read(package, new_keys(tmp_path / "others").public, root)
    (package / "more").write_bytes(b"x")
    with pytest.raises(SignatureInvalid, match="more is not part"):
        read(package, keys.public, root)
    (package / "more").unlink()
    (package / "model.onnx").write_bytes(b"graph" * 49 + b"graqh")
    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        read(package, keys.public, root)


def test_a_blueprint_for_another_model_is_rejected(package: Path, keys: Keys, root: Path) -> None:
    with pytest.raises(InvalidMessage, match="the package is smollm2 for edge-small"):
        read(package, keys.public, root, Blueprint(name="edge-chat", model="other"))


# ---- no engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "unix:///nowhere/docker.sock"])
def test_the_error_without_an_engine_names_its_address_and_how_to_start_one(
    address: str, package: Path, keys: Keys, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")
    monkeypatch.setenv("DOCKER_HOST", address)
    done = slmops(
        "package",
        "image",
        str(package),
        "--key",
        str(keys.public),
        "--root",
        str(root),
        "--source",
        str(ROOT),
        "--json",
    )
    problem = json.loads(done.stderr.splitlines()[-1])
    assert (done.exit_code, problem["code"], problem["where"]) == (75, "unreachable", address)
    assert "no Docker engine answers" in problem["what"]
    assert "dockerd" in problem["fix"]


def test_a_bad_package_is_rejected_before_the_engine_is_contacted(
    package: Path, keys: Keys, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing_set_up(monkeypatch, tmp_path / "nowhere")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    (package / "model.onnx").unlink()
    done = slmops("package", "image", str(package), "--key", str(keys.public), "--root", str(root), "--json")
    assert (done.exit_code, json.loads(done.stderr)["code"]) == (1, "signature_invalid")


def test_an_invalid_root_of_trust_is_rejected(package: Path, keys: Keys, root: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "root.json"
    damaged.write_bytes(root.read_bytes().replace(b'"version": 1', b'"version": 2'))
    for data in (damaged, keys.public):
        with pytest.raises(InvalidMessage, match="not a root of trust"):
            read(package, keys.public, data)
    with pytest.raises(NotFound):
        read(package, keys.public, tmp_path / "nowhere")

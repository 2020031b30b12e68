"""Exported packages in other tools: skopeo copies them to a real registry and back, and the signature stays valid."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from integration.console_cli import Cli
from integration.gateway_site import Site, site_on
from unit.packager.packager_examples import new_keys

from slmops.contracts.addresses import blob_key
from slmops.contracts.manifest import MODEL_MANIFEST
from slmops.contracts.plan import Release
from slmops.kit.oci_layout import signature_tag
from slmops.local.ports import HOST, choose_ports

if TYPE_CHECKING:
    from servers import S3, NatsServer


@pytest.fixture
async def site(nats_server: NatsServer, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_on(nats_server, s3, tmp_path) as site:
        yield site


@pytest.fixture
async def package(site: Site) -> Release:
    return await site.publish("1.0.0")


@pytest.fixture
def slmops(site: Site) -> Cli:
    return Cli(site.rollout.world)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Yields the address of an empty docker-registry (distribution v2) of Debian."""
    program = shutil.which("docker-registry")
    if program is None or shutil.which("skopeo") is None:
        pytest.skip("needs skopeo and docker-registry: apt-get install skopeo docker-registry")
    port = choose_ports(tmp_path / "registry-ports.json", ["registry"])["registry"]
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": f"{HOST}:{port}"},
    }
    (tmp_path / "registry.yml").write_text(yaml.safe_dump(config))
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://{HOST}:{port}/v2/").is_success:
                    break
            time.sleep(0.05)
        yield f"{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


async def json_of(slmops: Cli, *arguments: str) -> Any:
    done = await slmops(*arguments, "--json")
    assert done.exit_code == 0, done.err
    return done.json


async def error_of(slmops: Cli, *arguments: str) -> Any:
    done = await slmops(*arguments, "--json")
    assert done.exit_code != 0
    return json.loads(done.err.splitlines()[-1])


def skopeo(*arguments: str) -> str:
    argv = ["skopeo", "--insecure-policy", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_tags(source: str, target: str, tags: list[str], **options: str) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    for tag in tags:
        skopeo("copy", "--quiet", *flags, f"{source}:{tag}", f"{target}:{tag}")


async def test_a_package_copied_to_a_registry_and_back_is_verified(
    slmops: Cli, site: Site, package: Release, registry: str, tmp_path: Path
) -> None:
    layout, back = tmp_path / "layout", tmp_path / "back"
    shown = await json_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(layout))
    assert shown["manifest"]["digest"] == package.manifest.digest
    tags = ["1.0.0", signature_tag(package.manifest.digest)]
    copy_tags(f"oci:{layout}", f"docker://{registry}/smollm2", tags, dest_tls_verify="false")
    accepts = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://{registry}/v2/smollm2/manifests/1.0.0", headers=accepts)
    assert answer.headers["docker-content-digest"] == package.manifest.digest
    assert answer.json()["artifactType"] == MODEL_MANIFEST
    copy_tags(f"docker://{registry}/smollm2", f"oci:{back}", tags, src_tls_verify="false")
    key = str(site.keys.public)
    for folder in (layout, back):
        found = await json_of(slmops, "package", "verify", str(folder), "--key", key)
        assert found["digest"] == package.manifest.digest
    found = await json_of(slmops, "package", "verify", package.manifest.digest, "--key", key)
    assert found["digest"] == package.manifest.digest


async def test_a_package_in_a_registry_is_verified_by_any_tag_or_digest(
    slmops: Cli, site: Site, package: Release, registry: str, tmp_path: Path
) -> None:
    layout, key = tmp_path / "layout", str(site.keys.public)
    await json_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(layout))
    target, tag = f"docker://{registry}/edge/smollm2", signature_tag(package.manifest.digest)
    plain = ["--key", key, "--no-tls-verify"]
    skopeo("copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:1.0.0", f"{target}:latest")
    problem = await error_of(slmops, "package", "verify", f"{target}:latest", *plain)  # the signature was not copied
    assert problem["code"] == "not_found"
    copy_tags(f"oci:{layout}", target, [tag], dest_tls_verify="false")
    for named in (f"{target}:latest", target, f"{target}@{package.manifest.digest}"):
        found = await json_of(slmops, "package", "verify", named, *plain)
        assert found["digest"] == package.manifest.digest
    other = new_keys(tmp_path / "other")
    problem = await error_of(slmops, "package", "verify", target, "--key", str(other.public), "--no-tls-verify")
    assert problem["code"] == "signature_invalid"
    problem = await error_of(slmops, "package", "verify", target, "--key", key)
    assert "--no-tls-verify" in problem["fix"]


async def test_a_layout_copied_without_a_tag_or_with_two_is_verified(
    slmops: Cli, site: Site, package: Release, registry: str, tmp_path: Path
) -> None:
    layout, key = tmp_path / "layout", str(site.keys.public)
    await json_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(layout))
    tag = signature_tag(package.manifest.digest)
    for name, tags in {"none": [""], "other": [":stable"], "two": [":stable", ":1.0.0"]}.items():
        for wanted in tags:
            skopeo("copy", "--quiet", f"oci:{layout}:1.0.0", f"oci:{tmp_path / name}{wanted}")
        copy_tags(f"oci:{layout}", f"oci:{tmp_path / name}", [tag])
        found = await json_of(slmops, "package", "verify", str(tmp_path / name), "--key", key)
        assert found["digest"] == package.manifest.digest


async def test_layers_have_title_annotations_for_oras(
    site: Site, package: Release, registry: str, slmops: Cli, tmp_path: Path
) -> None:
    await json_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(tmp_path / "layout"))
    raw = json.loads(skopeo("inspect", "--raw", f"oci:{tmp_path / 'layout'}:1.0.0"))
    titles = {layer["annotations"]["org.opencontainers.image.title"] for layer in raw["layers"]}
    assert {"model.onnx", "genai_config.json", "bom.cdx.json"} <= titles


async def test_the_error_for_a_flipped_bit_in_an_exported_layout_names_the_blob(
    slmops: Cli, site: Site, package: Release, tmp_path: Path
) -> None:
    await json_of(slmops, "package", "export", package.manifest.digest, "--to", str(tmp_path / "layout"))
    blob = max((tmp_path / "layout" / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[7] ^= 16
    blob.write_bytes(data)
    problem = await error_of(slmops, "package", "verify", str(tmp_path / "layout"), "--key", str(site.keys.public))
    assert (problem["code"], problem["where"]) == ("digest_mismatch", f"blobs/sha256/{blob.name}")


async def test_an_interrupted_export_is_completed_and_an_export_into_a_folder_with_other_files_is_refused(
    slmops: Cli, package: Release, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    await json_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(layout))
    manifest = layout / blob_key(package.manifest.digest)
    kept = manifest.stat().st_mtime_ns
    (layout / "index.json").unlink()
    await json_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(layout))
    assert json.loads((layout / "index.json").read_bytes())["manifests"]
    assert manifest.stat().st_mtime_ns == kept
    (layout / "mine.txt").write_text("do not touch")
    problem = await error_of(slmops, "package", "export", "smollm2:1.0.0", "--to", str(layout))
    assert problem["code"] == "already_exists"
    assert "mine.txt" in problem["where"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "smollm2:9.9.9"], "not_found"),
        (["show", "sha256:" + "0" * 64], "not_found"),
        (["show", "sha256:zz"], "invalid_message"),
    ],
    ids=str,
)
async def test_showing_an_unknown_package_is_an_error(
    slmops: Cli, package: Release, arguments: list[str], code: str
) -> None:
    problem: dict[str, Any] = await error_of(slmops, "package", *arguments)
    assert problem["code"] == code

"""An OCI layout of a package is accepted if complete, and rejected if any bit of any file is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.packager.packager_examples import Keys, new_keys, write_layout, write_package

from slmops.contracts.addresses import blob_key
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import DigestMismatch, InvalidMessage, SignatureInvalid, SlmopsError
from slmops.contracts.manifest import OCI_MANIFEST, SIGNATURE_PATH
from slmops.kit.oci_layout import INDEX_PATH, LAYOUT_PATH, REF_NAME, manifest_digest_of, signature_tag, verify_layout
from slmops.kit.package import verify_package


class Written(NamedTuple):
    folder: Path
    layout: Path
    keys: Keys
    manifest: Descriptor


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    base = tmp_path_factory.mktemp("layout")
    keys = new_keys(base / "keys")
    write_package(base / "package", keys)
    return Written(base / "package", base / "layout", keys, write_layout(base / "package", base / "layout"))


@pytest.fixture
def layout(written: Written, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.layout, tmp_path / "layout"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_a_layout_is_accepted_with_and_without_a_plan(written: Written) -> None:
    manifest = verify_layout(written.layout, written.keys.public, written.manifest.digest)
    assert verify_layout(written.layout, written.keys.public) == manifest
    assert manifest_digest_of(written.layout) == written.manifest.digest == digest_of(manifest.encode())


@settings(max_examples=200, deadline=None)
@given(file=st.integers(min_value=0, max_value=10**6), bit=st.integers(min_value=0, max_value=10**9))
def test_a_flipped_bit_anywhere_in_a_layout_is_refused(written: Written, file: int, bit: int) -> None:
    files = files_of(written.layout)
    files.remove(written.layout / INDEX_PATH)  # see below
    path = files[file % len(files)]
    position = bit % (path.stat().st_size * 8)
    flip(path, position)
    try:
        with pytest.raises(SlmopsError) as refusal:
            verify_layout(written.layout, written.keys.public)
    finally:
        flip(path, position)
    assert refusal.value.where == path.relative_to(written.layout).as_posix()


@settings(max_examples=200, deadline=None)
@given(file=st.integers(min_value=0, max_value=10**6), bit=st.integers(min_value=0, max_value=10**9))
def test_a_flipped_bit_anywhere_in_a_laid_out_package_is_refused_by_name(written: Written, file: int, bit: int) -> None:
    files = files_of(written.folder)
    path = files[file % len(files)]
    position = bit % (path.stat().st_size * 8)
    flip(path, position)
    try:
        with pytest.raises((DigestMismatch, SignatureInvalid)) as refusal:
            verify_package(written.folder, written.keys.public)
    finally:
        flip(path, position)
    assert refusal.value.where == path.relative_to(written.folder).as_posix()


def test_a_flipped_bit_of_the_index_is_rejected_or_changes_only_a_name(layout: Path, written: Written) -> None:
    """The index is not signed, and names in it do not count."""
    signed, names = verify_layout(layout, written.keys.public), names_in(layout)
    for path in (layout / INDEX_PATH, layout / LAYOUT_PATH):
        for bit in range(path.stat().st_size * 8):
            flip(path, bit)
            try:
                assert verify_layout(layout, written.keys.public) == signed
            except SlmopsError:
                pass
            else:
                assert names_in(layout) != names
            flip(path, bit)


def names_in(layout: Path) -> list[str]:
    manifests = json.loads((layout / INDEX_PATH).read_bytes())["manifests"]
    return [manifest.get("annotations", {}).get(REF_NAME, "") for manifest in manifests]


def test_another_key_and_another_package_are_refused(written: Written, tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid) as refusal:
        verify_layout(written.layout, new_keys(tmp_path / "other").public)
    assert refusal.value.where == SIGNATURE_PATH
    with pytest.raises(DigestMismatch):
        verify_layout(written.layout, written.keys.public, digest_of(b"another"))


def index(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((layout / INDEX_PATH).read_bytes())
    change(document)
    (layout / INDEX_PATH).write_text(json.dumps(document, separators=(",", ":")))


def test_a_layout_without_its_signature_is_refused_and_says_how_to_copy_it(layout: Path, written: Written) -> None:
    index(layout, lambda document: document["manifests"].pop())
    with pytest.raises(SignatureInvalid) as refusal:
        verify_layout(layout, written.keys.public)
    assert signature_tag(written.manifest.digest) in (refusal.value.fix or "")


def name(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {**entry, "annotations": {REF_NAME: name}}


def nameless(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "annotations"}


@pytest.mark.parametrize(
    "names",
    [
        lambda package, attached: [name(package, "latest"), attached],
        lambda package, attached: [nameless(package), attached],
        lambda package, attached: [nameless(package), nameless(attached)],
        lambda package, attached: [package, name(package, "latest"), attached],
        lambda package, attached: [attached, package, package],
        lambda package, attached: [name(package, "sha256-mine"), name(attached, "signature")],
    ],
    ids=["another", "none", "none at all", "two", "twice", "misleading"],
)
def test_a_package_is_accepted_under_any_names_or_none(
    names: Callable[[dict[str, Any], dict[str, Any]], list[dict[str, Any]]], layout: Path, written: Written
) -> None:
    index(layout, lambda document: document.update(manifests=names(*document["manifests"])))
    assert verify_layout(layout, written.keys.public) == verify_layout(written.layout, written.keys.public)
    assert manifest_digest_of(layout) == written.manifest.digest


def test_two_packages_in_a_layout_are_refused(layout: Path, written: Written) -> None:
    other = b'{"schemaVersion":2}'
    (layout / blob_key(digest_of(other))).write_bytes(other)
    entry = Descriptor.of(other, OCI_MANIFEST).model_dump(mode="json")
    index(layout, lambda document: document["manifests"].append(entry))
    with pytest.raises(InvalidMessage, match="exactly one package"):
        verify_layout(layout, written.keys.public)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["manifests"].append({**document["manifests"][0], "size": 1}),
        lambda document: document["manifests"].reverse() or document["manifests"].pop(),
        lambda document: document["manifests"][0].update(size=1 << 40),
        lambda document: document["manifests"][0].update(size=0),
        lambda document: document["manifests"][0].update(digest="sha512:" + "0" * 128),
        lambda document: document["manifests"][0].update(digest="sha256:../../../etc/passwd"),
        lambda document: document["manifests"][0].update(
            mediaType="application/vnd.docker.distribution.manifest.v2+json"
        ),
        lambda document: document["manifests"][0].update(urls=["http://elsewhere.example"]),
        lambda document: document["manifests"][0]["annotations"].update({"org.opencontainers.image.version": "1.0.1"}),
        lambda document: document["manifests"].clear(),
        lambda document: document.update(schemaVersion=3),
        lambda document: document.update(annotations={"x": "y"}),
    ],
)
def test_an_unexpected_index_is_rejected(
    change: Callable[[dict[str, Any]], None], layout: Path, written: Written
) -> None:
    index(layout, change)
    with pytest.raises((InvalidMessage, SignatureInvalid, DigestMismatch)):
        verify_layout(layout, written.keys.public)


def swap_blobs(layout: Path, written: Written) -> str:
    """Swaps the names of two layers."""
    layers = [
        layer for layer in verify_layout(layout, written.keys.public).layers if layer.size > 2
    ]  # {} is not a layer
    names = [blob_key(layer.digest) for layer in layers[:2]]
    contents = [(layout / name).read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        (layout / name).write_bytes(content)
    return names[0]


def lose(layout: Path, written: Written) -> str:
    name = blob_key(verify_layout(layout, written.keys.public).layers[0].digest)
    (layout / name).unlink()
    return name


def add(layout: Path, _written: Written) -> str:
    name = blob_key(digest_of(b"more"))
    (layout / name).write_bytes(b"more")
    return name


def add_elsewhere(layout: Path, _written: Written) -> str:
    (layout / "run.sh").write_bytes(b"#!")
    return "run.sh"


def link(layout: Path, written: Written) -> str:
    name = blob_key(verify_layout(layout, written.keys.public).layers[0].digest)
    (layout / name).rename(layout.parent / "elsewhere")
    (layout / name).symlink_to(layout.parent / "elsewhere")
    return name


def grow(layout: Path, written: Written) -> str:
    name = blob_key(verify_layout(layout, written.keys.public).layers[1].digest)
    os.truncate(layout / name, 1 << 40)
    return name


@pytest.mark.parametrize("damage", [swap_blobs, lose, add, add_elsewhere, link, grow], ids=lambda f: f.__name__)
def test_a_swapped_missing_additional_or_too_large_file_is_named(
    damage: Callable[[Path, Written], str], layout: Path, written: Written
) -> None:
    path = damage(layout, written)
    with pytest.raises((DigestMismatch, SignatureInvalid)) as refusal:
        verify_layout(layout, written.keys.public)
    assert refusal.value.where == path


@pytest.mark.parametrize("path", [INDEX_PATH, LAYOUT_PATH])
@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b'{"a":1}', b"\xff\xfe", b"{}" + b" " * 64])
def test_a_directory_that_is_not_a_layout_is_rejected(
    path: str, content: bytes, layout: Path, written: Written
) -> None:
    (layout / path).write_bytes(content)
    with pytest.raises(InvalidMessage) as refusal:
        verify_layout(layout, written.keys.public)
    assert refusal.value.where == path


@pytest.mark.parametrize("path", [INDEX_PATH, LAYOUT_PATH])
def test_an_oversized_file_is_not_read(path: str, layout: Path, written: Written) -> None:
    os.truncate(layout / path, 1 << 34)
    with pytest.raises(DigestMismatch) as refusal:
        verify_layout(layout, written.keys.public)
    assert refusal.value.where == path

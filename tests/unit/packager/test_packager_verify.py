"""A gateway accepts what the packager signed, and refuses a package that differs from it by a single bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from unit.packager.packager_examples import CONTENT, Keys, new_keys, rewrite_manifest, write_package

from slmops.contracts.descriptor import Descriptor, Digest, digest_of
from slmops.contracts.errors import DigestMismatch, InvalidMessage, SignatureInvalid, SlmopsError
from slmops.contracts.manifest import FILE_PATH, MANIFEST_PATH, SIGNATURE_PATH, WEIGHT, Manifest
from slmops.kit.package import verify_package
from slmops.packager.sign import check_signing_key, sign

FILES = (*CONTENT, "golden.jsonl", "evaluation.json", "README.md", "bom.cdx.json", "provenance.json")
Refusal = type[SlmopsError]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> tuple[Path, Digest]:
    folder = tmp_path_factory.mktemp("package") / "smollm2-1.0.0"
    return folder, write_package(folder, keys)


@pytest.fixture
def package(tmp_path: Path, original: tuple[Path, Digest]) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "slot"))


@pytest.fixture
def digest(original: tuple[Path, Digest]) -> Digest:
    return original[1]


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_a_package_is_accepted_in_any_folder(package: Path, keys: Keys, digest: Digest) -> None:
    manifest = verify_package(package, keys.public, digest)
    assert {layer.annotations[FILE_PATH] for layer in manifest.layers} == set(FILES)


def test_the_model_signing_command_accepts_it_too(tmp_path: Path, keys: Keys) -> None:
    # Without .gitattributes: we sign that file, and the command ignores it.
    write_package(tmp_path / "package", keys, {"model.onnx": b"weights", "onnx/config.json": b"{}"})
    signature = ["--signature", tmp_path / "package" / SIGNATURE_PATH, "--public_key", keys.public]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", tmp_path / "package", *signature],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES)
def test_a_flipped_bit_in_any_file_is_named(path: str, package: Path, keys: Keys, digest: Digest) -> None:
    for byte in (0, -1):
        flip(package / path, byte)
        with pytest.raises(DigestMismatch) as refusal:
            verify_package(package, keys.public, digest)
        assert refusal.value.where == path
        flip(package / path, byte)
    verify_package(package, keys.public, digest)


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(package: Path, keys: Keys, digest: Digest) -> None:
    manifest = package / MANIFEST_PATH
    for byte in range(0, manifest.stat().st_size, 37):
        flip(manifest, byte, byte % 8)
        with pytest.raises(DigestMismatch, match=MANIFEST_PATH):
            verify_package(package, keys.public, digest)
        flip(manifest, byte, byte % 8)


def test_a_flipped_bit_in_the_signature_is_refused(package: Path, keys: Keys, digest: Digest) -> None:
    signature = package / SIGNATURE_PATH
    for byte in range(0, signature.stat().st_size, 5):
        flip(signature, byte, byte % 8)
        with pytest.raises(SignatureInvalid) as refusal:
            verify_package(package, keys.public, digest)
        assert refusal.value.where == SIGNATURE_PATH
        flip(signature, byte, byte % 8)
    verify_package(package, keys.public, digest)


def test_a_flipped_bit_that_base64_ignores_is_refused(package: Path, keys: Keys, digest: Digest) -> None:
    signature = package / SIGNATURE_PATH
    while (padding := signature.read_bytes().find(b'="')) < 0:  # not every signature needs padding
        signature.rename(package.parent / "old")
        sign(package, keys.private, package.parent / "new")
        (package.parent / "new").rename(signature)
    letter = signature.read_bytes().rfind(b"=", 0, padding + 1)
    while signature.read_bytes()[letter] == ord("="):
        letter -= 1
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    data = bytearray(signature.read_bytes())
    data[letter] = alphabet[alphabet.index(data[letter]) ^ 1]
    signature.write_bytes(data)
    with pytest.raises(SignatureInvalid):
        verify_package(package, keys.public, digest)


def test_another_key_is_not_trusted(package: Path, digest: Digest, tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid, match="trusted key"):
        verify_package(package, new_keys(tmp_path / "other").public, digest)


def test_a_package_signed_by_another_key_is_refused(tmp_path: Path, keys: Keys) -> None:
    digest = write_package(tmp_path / "forged", new_keys(tmp_path / "other"))
    with pytest.raises(SignatureInvalid) as refusal:
        verify_package(tmp_path / "forged", keys.public, digest)
    assert refusal.value.where == SIGNATURE_PATH


def test_without_a_plan_the_signature_determines_the_manifest(package: Path, keys: Keys, digest: Digest) -> None:
    assert digest_of(verify_package(package, keys.public).encode()) == digest
    flip(package / MANIFEST_PATH, 40)
    with pytest.raises(DigestMismatch) as refusal:
        verify_package(package, keys.public)
    assert refusal.value.where == MANIFEST_PATH


def test_without_a_plan_a_forged_manifest_is_refused(package: Path, keys: Keys) -> None:
    manifest = Manifest.decode((package / MANIFEST_PATH).read_bytes())
    rewrite_manifest(package, manifest.model_copy(update={"annotations": {}}))
    with pytest.raises(DigestMismatch, match=MANIFEST_PATH):
        verify_package(package, keys.public)


def test_a_signed_package_that_the_plan_does_not_name_is_refused(package: Path, keys: Keys) -> None:
    with pytest.raises(DigestMismatch, match=MANIFEST_PATH):
        verify_package(package, keys.public, digest_of(b"another manifest"))


def test_a_forged_manifest_that_matches_forged_files_is_refused(package: Path, keys: Keys) -> None:
    """The plan names the forged manifest too, so only the signature can reveal the forgery."""
    manifest = Manifest.decode((package / MANIFEST_PATH).read_bytes())
    forged = Descriptor.of(b"forged weights", WEIGHT, **{FILE_PATH: "model.onnx"})
    layers = tuple(forged if layer.annotations[FILE_PATH] == "model.onnx" else layer for layer in manifest.layers)
    (package / "model.onnx").write_bytes(b"forged weights")
    digest = rewrite_manifest(package, manifest.model_copy(update={"layers": layers}))
    with pytest.raises(SignatureInvalid):
        verify_package(package, keys.public, digest)


def extra(package: Path) -> str:
    (package / "tokenizer/more.json").write_text("{}")
    return "tokenizer/more.json"


def hidden(package: Path) -> str:
    (package / ".git").mkdir()
    (package / ".git/config").write_text("")
    return ".git/config"


def missing(package: Path) -> str:
    (package / "model.onnx").unlink()
    return "model.onnx"


def unsigned(package: Path) -> str:
    (package / SIGNATURE_PATH).unlink()
    return SIGNATURE_PATH


def no_manifest(package: Path) -> str:
    (package / MANIFEST_PATH).unlink()
    return MANIFEST_PATH


def linked(package: Path) -> str:
    target = package.parent / "elsewhere"
    (package / "model.onnx").rename(target)
    (package / "model.onnx").symlink_to(target)
    return "model.onnx"


def linked_folder(package: Path) -> str:
    (package / "tokenizer").rename(package.parent / "elsewhere")
    (package / "tokenizer").symlink_to(package.parent / "elsewhere")
    return "tokenizer"


def pipe(package: Path) -> str:
    os.mkfifo(package / "pipe")
    return "pipe"


@pytest.mark.parametrize(
    "damage", [extra, hidden, missing, unsigned, no_manifest, linked, linked_folder, pipe], ids=lambda f: f.__name__
)
def test_missing_and_unexpected_files_are_refused_and_named(
    damage: Callable[[Path], str], package: Path, keys: Keys, digest: Digest
) -> None:
    path = damage(package)
    with pytest.raises(SignatureInvalid) as refusal:
        verify_package(package, keys.public, digest)
    assert refusal.value.where == path


def test_a_shortened_file_is_named(package: Path, keys: Keys, digest: Digest) -> None:
    os.truncate(package / "model.onnx.data", 100)
    with pytest.raises(DigestMismatch, match=r"model\.onnx\.data has 100 bytes"):
        verify_package(package, keys.public, digest)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"verificationMaterial": {}}', "[" * 100_000, "\ud83d"])
def test_a_malformed_signature_is_refused(text: str, package: Path, keys: Keys, digest: Digest) -> None:
    (package / SIGNATURE_PATH).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SignatureInvalid):
        verify_package(package, keys.public, digest)


def test_an_oversized_manifest_or_signature_is_refused_unread(package: Path, keys: Keys, digest: Digest) -> None:
    for path in (MANIFEST_PATH, SIGNATURE_PATH):
        with (package / path).open("r+b") as sparse:
            sparse.truncate(1 << 34)
        with pytest.raises(DigestMismatch) as refusal:
            verify_package(package, keys.public, digest)
        assert refusal.value.where in (MANIFEST_PATH, SIGNATURE_PATH)


@pytest.mark.parametrize(
    "path",
    [
        "../escaped",
        "/etc/passwd",
        MANIFEST_PATH,
        SIGNATURE_PATH,
        "model.onnx",
        "MODEL.onnx",
        "Manifest.json",
        "a\nb",
        None,
    ],
)
def test_a_layer_without_a_valid_path_of_its_own_is_refused(path: str | None, package: Path, keys: Keys) -> None:
    manifest = Manifest.decode((package / MANIFEST_PATH).read_bytes())
    layer = Descriptor.of(b"x", WEIGHT, **({FILE_PATH: path} if path else {}))
    digest = rewrite_manifest(package, manifest.model_copy(update={"layers": (*manifest.layers, layer)}))
    with pytest.raises(InvalidMessage):
        verify_package(package, keys.public, digest)


def test_a_file_that_is_not_a_manifest_is_refused(package: Path, keys: Keys) -> None:
    (package / MANIFEST_PATH).write_bytes(b"{}")
    with pytest.raises(InvalidMessage):
        verify_package(package, keys.public, digest_of(b"{}"))


@pytest.mark.parametrize("content", [None, b"no key", b"private"])
def test_an_unusable_trusted_key_is_reported_as_a_wrong_setting(
    content: bytes | None, package: Path, keys: Keys, digest: Digest, tmp_path: Path
) -> None:
    path = tmp_path / "trusted.pem"
    if content is not None:
        path.write_bytes(keys.private.read_bytes() if content == b"private" else content)
    with pytest.raises(InvalidMessage) as refusal:
        verify_package(package, path, digest)
    assert refusal.value.where == str(path)
    assert "SLMOPS_TRUSTED_KEY" in (refusal.value.fix or "")


def test_an_unusable_signing_key_is_refused(tmp_path: Path, keys: Keys) -> None:
    check_signing_key(keys.private)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("secret")
    for path in (tmp_path / "missing.pem", garbage, keys.public, new_keys(tmp_path / "p384", ec.SECP384R1()).private):
        with pytest.raises(InvalidMessage) as refusal:
            check_signing_key(path)
        assert refusal.value.where == str(path)
        assert "secret" not in str(refusal.value)

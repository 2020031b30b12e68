"""Verifies that a folder is a complete package, signed by a trusted key.

These checks run in this order; the first failure rejects the package
1. `manifest.json` has the expected digest: the caller's (from the plan), or the one in the signature
2. the folder contains the manifest's layers and nothing else, as regular files
3. every layer has its size and digest
4. the OMS signature covers exactly these files, by the trusted key
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from slmops.contracts.descriptor import Descriptor, Digest, digest_of, digest_of_chunks
from slmops.contracts.errors import DigestMismatch, SignatureInvalid
from slmops.contracts.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_PATH, SIGNATURE_PATH, Manifest, layers_by_path
from slmops.kit.signature import signed_files

_CHUNK_BYTES = 1 << 20


def verify_package(directory: Path, public_key: Path, manifest_digest: Digest | None = None) -> Manifest:
    """Verifies a package and returns its manifest. Reads every file once.

    Raises `DigestMismatch` or `SignatureInvalid` with the file's name, and `InvalidMessage` if the manifest is invalid
    or the trusted key is not an EC public key.
    """
    files = set(files_below(directory))
    _check_parsed_files(directory, files)
    signature = directory / SIGNATURE_PATH
    wanted = manifest_digest or signed_manifest(signed_files(signature, public_key))
    manifest = _manifest(directory / MANIFEST_PATH, wanted)
    layers = layers_by_path(manifest)
    check_same_files(files - {MANIFEST_PATH, SIGNATURE_PATH}, set(layers))
    for path, layer in layers.items():
        check_content(directory / path, path, layer)
    check_signed(wanted, layers, signed_files(signature, public_key))
    return manifest


def signed_layers(directory: Path, public_key: Path) -> dict[str, Descriptor]:
    """Returns the layers of a package by path, from its manifest and signature alone. Other files may be missing.

    Raises what `verify_package` raises about these two.
    """
    _check_parsed_files(directory, set(files_below(directory)))
    signed = signed_files(directory / SIGNATURE_PATH, public_key)
    wanted = signed_manifest(signed)
    layers = layers_by_path(_manifest(directory / MANIFEST_PATH, wanted))
    check_signed(wanted, layers, signed)
    return layers


def _check_parsed_files(directory: Path, files: set[str]) -> None:
    """Raises `SignatureInvalid` or `DigestMismatch` if manifest or signature is missing or too large to be parsed."""
    for path in (MANIFEST_PATH, SIGNATURE_PATH):
        if path not in files:
            raise SignatureInvalid(f"the package has no {path}", where=path)
        if (directory / path).stat().st_size > MANIFEST_LIMIT_BYTES:
            raise DigestMismatch(f"{path} has more than {MANIFEST_LIMIT_BYTES} bytes", where=path)


def signed_manifest(signed: Mapping[str, Digest]) -> Digest:
    """Returns the signed digest of the manifest. Raises `SignatureInvalid` if the signature covers no manifest."""
    if MANIFEST_PATH not in signed:
        raise SignatureInvalid("the signature does not cover a manifest", where=SIGNATURE_PATH)
    return signed[MANIFEST_PATH]


def check_signed(manifest: Digest, layers: Mapping[str, Descriptor], signed: Mapping[str, Digest]) -> None:
    """Raises `SignatureInvalid` with the first file that is unsigned, missing, or signed with another digest."""
    there = {MANIFEST_PATH: manifest} | {path: layer.digest for path, layer in layers.items()}
    if other := sorted(path for path in there.keys() | signed.keys() if there.get(path) != signed.get(path)):
        raise SignatureInvalid(f"{other[0]} is not what the trusted key signed", where=other[0])


def files_below(directory: Path) -> Iterator[str]:
    """Yields the relative paths of all files. Raises `SignatureInvalid` for links, devices and other special files."""
    for folder, folders, files in os.walk(directory, followlinks=False):
        for name in (*folders, *files):
            path = Path(folder) / name
            relative = path.relative_to(directory).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield relative
            elif not stat.S_ISDIR(mode):
                raise SignatureInvalid(f"{relative} is neither a file nor a folder", where=relative)


def _manifest(path: Path, expected: Digest) -> Manifest:
    data = path.read_bytes()
    if (actual := digest_of(data)) != expected:
        raise DigestMismatch(f"{MANIFEST_PATH} is {actual}, not {expected}", where=MANIFEST_PATH)
    return Manifest.decode(data)


def check_same_files(there: set[str], named: set[str]) -> None:
    """Raises `SignatureInvalid` with the first additional or missing file."""
    if extra := sorted(there - named):
        raise SignatureInvalid(f"{extra[0]} is not part of the package", where=extra[0])
    if missing := sorted(named - there):
        raise SignatureInvalid(f"{missing[0]} of the package is missing", where=missing[0])


def check_content(file: Path, path: str, layer: Descriptor) -> None:
    """Raises `DigestMismatch`, naming the file `path`. Checks the size before reading."""
    if (size := file.stat().st_size) != layer.size:
        raise DigestMismatch(f"{path} has {size} bytes, not {layer.size}", where=path)
    with file.open("rb") as source:
        actual, _ = digest_of_chunks(iter(lambda: source.read(_CHUNK_BYTES), b""))
    if actual != layer.digest:
        raise DigestMismatch(f"{path} is {actual}, not {layer.digest}", where=path)

"""Whether a folder is the package that the plan names, whole and signed by the key that we trust.

Checked in this order, and the first that fails refuses
1. `manifest.json` is the manifest of the plan
2. the folder holds the manifest's layers and nothing else, as regular files
3. every layer has its size and digest
4. the OMS signature covers exactly these files, by the trusted key
"""

from __future__ import annotations

import json
import os
import stat
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import TypeAdapter, ValidationError

from slmops.contracts.descriptor import Descriptor, Digest, digest_of, digest_of_chunks
from slmops.contracts.errors import DigestMismatch, InvalidMessage, SignatureInvalid
from slmops.contracts.manifest import FILE_PATH, MANIFEST_PATH, SIGNATURE_PATH, Manifest
from slmops.contracts.model import FilePath

_LIMIT_BYTES = 4 << 20  # of the manifest and of the signature, which are read whole
_CHUNK_BYTES = 1 << 20
_PATH: TypeAdapter[str] = TypeAdapter(FilePath)


def verify_package(directory: Path, public_key: Path, manifest_digest: Digest) -> Manifest:
    """The manifest of a package that may be trusted. Reads every file twice: for its digest, and for the signature.

    Raises `DigestMismatch` or `SignatureInvalid`, naming the file, and `InvalidMessage` when the manifest is none or
    the trusted key is no EC public key.
    """
    files = set(_files(directory))
    for path in (MANIFEST_PATH, SIGNATURE_PATH):
        if path not in files:
            raise SignatureInvalid(f"the package has no {path}", where=path)
        if (directory / path).stat().st_size > _LIMIT_BYTES:
            raise DigestMismatch(f"{path} has more than {_LIMIT_BYTES} bytes", where=path)
    manifest = _manifest(directory / MANIFEST_PATH, manifest_digest)
    layers = _layers(manifest)
    _check_same_files(files - {MANIFEST_PATH, SIGNATURE_PATH}, set(layers))
    for path, layer in layers.items():
        _check_content(directory / path, path, layer)
    _check_signature(directory, public_key)
    return manifest


def _files(directory: Path) -> Iterator[str]:
    """Relative paths of all files. Raises `SignatureInvalid` for a link, a device or whatever else is no file."""
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


def _layers(manifest: Manifest) -> dict[str, Descriptor]:
    found: dict[str, Descriptor] = {}
    for layer in manifest.layers:
        try:
            path = _PATH.validate_python(layer.annotations.get(FILE_PATH))
        except ValidationError as error:
            raise InvalidMessage("a layer has no path inside its package", where=layer.digest) from error
        if path in (MANIFEST_PATH, SIGNATURE_PATH, *found):
            raise InvalidMessage(f"the manifest names {path} twice", where=path)
        found[path] = layer
    return found


def _check_same_files(there: set[str], named: set[str]) -> None:
    if extra := sorted(there - named):
        raise SignatureInvalid(f"{extra[0]} is not part of the package", where=extra[0])
    if missing := sorted(named - there):
        raise SignatureInvalid(f"{missing[0]} of the package is missing", where=missing[0])


def _check_content(file: Path, path: str, layer: Descriptor) -> None:
    if (size := file.stat().st_size) != layer.size:
        raise DigestMismatch(f"{path} has {size} bytes, not {layer.size}", where=path)
    with file.open("rb") as source:
        actual, _ = digest_of_chunks(iter(lambda: source.read(_CHUNK_BYTES), b""))
    if actual != layer.digest:
        raise DigestMismatch(f"{path} is {actual}, not {layer.digest}", where=path)


def _check_signature(directory: Path, public_key: Path) -> None:
    _check_key(public_key)
    # It brings sigstore and tuf, 0.4 s and tens of megabytes: loaded when a release arrives, not when a gateway starts.
    from model_signing.hashing import Config as Hashing
    from model_signing.verifying import Config as Verifying

    # Given, not guessed from the signature, which we do not trust yet; by default OMS would overlook .gitattributes.
    hashing = Hashing().use_file_serialization()  # type: ignore[no-untyped-call]
    hashing.set_ignored_paths(paths=[SIGNATURE_PATH], ignore_git_paths=False)
    verifier = Verifying().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
    verifier.set_hashing_config(hashing)
    try:
        _check_base64((directory / SIGNATURE_PATH).read_bytes())
        verifier.verify(directory, directory / SIGNATURE_PATH)
    except OSError:
        raise  # a disk that cannot be read says nothing about the signature
    except Exception as error:
        # The library lets through whatever its parsers raise on hostile bytes (KeyError, ValueError,
        # InvalidSignature …), and none of it may count as valid.
        raise SignatureInvalid(
            "the package is not signed by the trusted key",
            where=SIGNATURE_PATH,
            fix="Publish it again with the key that this gateway trusts, or give the gateway the right key.",
        ) from error


def _check_base64(bundle: bytes) -> None:
    """The last letter before base64's padding has bits that say nothing: changed ones would go unseen."""
    envelope = json.loads(bundle)["dsseEnvelope"]
    for text in (envelope["payload"], *(signature["sig"] for signature in envelope["signatures"])):
        if b64encode(b64decode(text, validate=True)).decode() != text:
            raise ValueError("base64 with loose bits")


def _check_key(path: Path) -> None:
    fix = "Point SLMOPS_TRUSTED_KEY to the public half of the packager's signing key."
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise InvalidMessage(f"the trusted key cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except ValueError as error:
        raise InvalidMessage("the trusted key is no PEM public key", where=str(path), fix=fix) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidMessage("the trusted key is no elliptic curve key", where=str(path), fix=fix)

"""Verifies an OMS bundle (OpenSSF Model Signing) and returns the signed paths and digests.

The files themselves are not read: the caller hashes them and compares.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidMessage, SignatureInvalid
from slmops.contracts.manifest import SIGNATURE_PATH


def signed_files(bundle: Path, public_key: Path) -> dict[str, Digest]:
    """Returns the signed digests by path. Raises `SignatureInvalid`, and `InvalidMessage` if the trusted key is not an
    EC public key."""
    _check_key(public_key)
    # It imports sigstore and tuf (0.4 s, tens of megabytes), so it is loaded when a release arrives, not at start.
    from model_signing.verifying import Config as Verifying

    verifier = Verifying().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
    signed = _Signed()
    verifier.set_hashing_config(signed)  # type: ignore[arg-type]
    try:
        _check_base64(bundle.read_bytes())
        verifier.verify(bundle.parent, bundle)
        return signed.files()
    except OSError:
        raise  # an unreadable disk does not mean that the signature is invalid
    except Exception as error:
        # The library passes on every exception that its parsers raise on hostile bytes (KeyError, ValueError,
        # InvalidSignature …). None of them may count as valid.
        raise SignatureInvalid(
            "the package is not signed by the trusted key",
            where=SIGNATURE_PATH,
            fix="Publish it again with the trusted key, or trust the right key.",
        ) from error


class _Signed:
    """Replaces the library's hashing of a folder: it keeps the contents of the verified bundle instead of comparing.

    The caller has already hashed all files, so the library would read them a second time.
    """

    def __init__(self) -> None:
        self._manifest: Any = None

    __hash__ = None  # type: ignore[assignment]

    def hash(self, _folder: Path, **_options: Any) -> _Signed:
        return self

    def add_ignored_paths(self, **_paths: Any) -> None:
        """Does nothing: no path is ignored, even if the bundle lists some."""

    def __eq__(self, signed: object) -> bool:
        self._manifest = signed
        return True

    def files(self) -> dict[str, Digest]:
        """Returns the signed files. Raises various errors if the library did not compare or no files are signed."""
        items = [(str(item.identifier), item.digest) for item in self._manifest.resource_descriptors()]
        if any(digest.algorithm != "sha256" for _, digest in items) or len(dict(items)) != len(items):
            raise ValueError("each file must be signed once, by its SHA-256")
        return {path: f"sha256:{digest.digest_hex}" for path, digest in items}


def _check_base64(bundle: bytes) -> None:
    """Rejects base64 with unused bits that are not 0, because a change of these bits would go unnoticed."""
    envelope = json.loads(bundle)["dsseEnvelope"]
    for text in (envelope["payload"], *(signature["sig"] for signature in envelope["signatures"])):
        if b64encode(b64decode(text, validate=True)).decode() != text:
            raise ValueError("unused bits of the base64 are not 0")


def _check_key(path: Path) -> None:
    fix = "Give the public half of the packager's signing key (a gateway: SLMOPS_TRUSTED_KEY)."
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise InvalidMessage(f"the trusted key cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except ValueError as error:
        raise InvalidMessage("the trusted key is not a PEM public key", where=str(path), fix=fix) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidMessage("the trusted key is not an elliptic curve key", where=str(path), fix=fix)

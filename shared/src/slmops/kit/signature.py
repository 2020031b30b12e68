"""What the trusted key has signed: the paths and digests in an OMS bundle (OpenSSF Model Signing).

The files themselves are not read here: whoever asks has hashed them, and compares.
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
    """Digest by path. Raises `SignatureInvalid`, and `InvalidMessage` when the trusted key is no EC public key."""
    _check_key(public_key)
    # It brings sigstore and tuf, 0.4 s and tens of megabytes: loaded when a release arrives, not when a gateway starts.
    from model_signing.verifying import Config as Verifying

    verifier = Verifying().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
    signed = _Signed()
    verifier.set_hashing_config(signed)  # type: ignore[arg-type]
    try:
        _check_base64(bundle.read_bytes())
        verifier.verify(bundle.parent, bundle)
        return signed.files()
    except OSError:
        raise  # a disk that cannot be read says nothing about the signature
    except Exception as error:
        # The library lets through whatever its parsers raise on hostile bytes (KeyError, ValueError,
        # InvalidSignature …), and none of it may count as valid.
        raise SignatureInvalid(
            "the package is not signed by the trusted key",
            where=SIGNATURE_PATH,
            fix="Publish it again with the key that is trusted here, or trust the right key.",
        ) from error


class _Signed:
    """Stands where the library would hash a folder and compare: it keeps what the verified bundle says.

    Everything is hashed by then, as blobs or as files, so that the library would only read it a second time.
    """

    def __init__(self) -> None:
        self._manifest: Any = None

    __hash__ = None  # type: ignore[assignment]

    def hash(self, _folder: Path, **_options: Any) -> _Signed:
        return self

    def add_ignored_paths(self, **_paths: Any) -> None:
        """Nothing is ignored, whatever the bundle says."""

    def __eq__(self, signed: object) -> bool:
        self._manifest = signed
        return True

    def files(self) -> dict[str, Digest]:
        """Raises whatever it meets when the library did not compare, or the bundle signs something else than files."""
        items = [(str(item.identifier), item.digest) for item in self._manifest.resource_descriptors()]
        if any(digest.algorithm != "sha256" for _, digest in items) or len(dict(items)) != len(items):
            raise ValueError("each file is signed once, by its SHA-256")
        return {path: f"sha256:{digest.digest_hex}" for path, digest in items}


def _check_base64(bundle: bytes) -> None:
    """The last letter before base64's padding has bits that say nothing: changed ones would go unseen."""
    envelope = json.loads(bundle)["dsseEnvelope"]
    for text in (envelope["payload"], *(signature["sig"] for signature in envelope["signatures"])):
        if b64encode(b64decode(text, validate=True)).decode() != text:
            raise ValueError("base64 with loose bits")


def _check_key(path: Path) -> None:
    fix = "Give the public half of the packager's signing key (a gateway: SLMOPS_TRUSTED_KEY)."
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise InvalidMessage(f"the trusted key cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except ValueError as error:
        raise InvalidMessage("the trusted key is no PEM public key", where=str(path), fix=fix) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidMessage("the trusted key is no elliptic curve key", where=str(path), fix=fix)

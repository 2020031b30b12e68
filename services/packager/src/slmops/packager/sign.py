"""The signature of a package: OpenSSF Model Signing (OMS) over its manifest and every file at its path.

The bundle covers paths and digests, so nothing can be changed, added or left out. `model_signing verify key` checks it
too. ECDSA draws a random number: signing again makes other bytes, equally valid.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.errors import InvalidMessage


def check_signing_key(path: Path) -> None:
    """Raises `InvalidMessage`, without any part of the key, unless it can sign packages."""
    fix = "Make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise InvalidMessage(f"the signing key cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except (ValueError, TypeError):
        raise InvalidMessage(
            "the signing key is not a PEM key without a passphrase", where=str(path), fix=fix
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidMessage("the signing key is not on the curve P-256", where=str(path), fix=fix)


def sign(directory: Path, private_key: Path, signature: Path) -> None:
    """Write the signature over everything in `directory` to `signature`, which lies outside of it. Reads every file."""
    # It brings sigstore and tuf, 0.4 s: the service starts without it.
    from model_signing.hashing import Config as Hashing
    from model_signing.signing import Config as Signing

    # By default OMS leaves out .gitattributes and the like; in a package every file is signed.
    hashing = Hashing().use_file_serialization()  # type: ignore[no-untyped-call]
    hashing.set_ignored_paths(paths=[], ignore_git_paths=False)
    signer = Signing().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
    signer.set_hashing_config(hashing).sign(directory, signature)

"""Signs a package: OpenSSF Model Signing (OMS) over its manifest and every file at its path.

The signature covers paths and digests, so no file can be changed, added or left out. `model_signing verify key` accepts
it too. ECDSA is randomized: signing again gives different bytes that are equally valid.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.errors import InvalidMessage


def check_signing_key(path: Path) -> None:
    """Raises `InvalidMessage` unless the key can sign packages. The error contains no part of the key."""
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
    """Signs all files in `directory` and writes the signature to `signature`, which must be outside of it."""
    # model_signing imports sigstore and tuf, which takes 0.4 s. Importing it here keeps the start fast.
    from model_signing.hashing import Config as Hashing
    from model_signing.signing import Config as Signing

    # By default OMS ignores .gitattributes and similar files; in a package every file is signed.
    hashing = Hashing().use_file_serialization()  # type: ignore[no-untyped-call]
    hashing.set_ignored_paths(paths=[], ignore_git_paths=False)
    signer = Signing().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
    signer.set_hashing_config(hashing).sign(directory, signature)

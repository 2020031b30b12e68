"""Private keys as PEM files (PKCS#8, Ed25519), read and used through `securesystemslib`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Key

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.trust import KeyValue, TrustedKey


def new_key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def key_file(role: str, keyid: str) -> str:
    """The name of a key's file: which role, and enough of the key's id to tell it from the one before."""
    return f"{role}-{keyid[:8]}.pem"


def load_key(pem: bytes, where: str, password: bytes | None = None) -> CryptoSigner:
    """Raises `InvalidMessage`, without any part of the key."""
    fix = "Point to a private key as `slmops trust ceremony` makes them: PEM, PKCS#8, without a passphrase."
    try:
        return CryptoSigner(load_pem_private_key(pem, password))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidMessage("this is no private key that can sign", where=where, fix=fix) from None


def read_key(path: Path) -> CryptoSigner:
    """Raises `InvalidMessage`."""
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise InvalidMessage(f"the key cannot be read: {error.strerror}", where=str(path)) from error
    return load_key(pem, str(path))


def read_keys(paths: Iterable[Path]) -> dict[str, CryptoSigner]:
    """By key id, which is what metadata names a key by."""
    found = [read_key(path) for path in sorted(paths)]
    return {signer.public_key.keyid: signer for signer in found}


def trusted(key: Key) -> TrustedKey:
    """The public half as a document."""
    public = str(key.keyval["public"])
    return TrustedKey(keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, keyval=KeyValue(public=public))


def usable(key: TrustedKey) -> Key:
    """The same as the library wants it. Raises `ValueError` or `KeyError` for a scheme that it does not know."""
    return Key.from_dict(key.keyid, key.model_dump(exclude={"keyid"}))

"""Private keys as PEM files (PKCS#8, Ed25519), used through `securesystemslib`. Keyholders may encrypt their keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.tuf_names import KeyValue, TrustedKey

Ask = Callable[[Path], bytes]
"""Returns the passphrase of a key file."""
_LOCKED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def new_key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def key_file(role: str, keyid: str) -> str:
    """Returns the name of a key's file: its role, and enough of the key id to distinguish it from the previous key."""
    return f"{role}-{keyid[:8]}.pem"


def load_key(pem: bytes, where: str, password: bytes | None = None) -> CryptoSigner:
    """Parses a private key. Raises `InvalidMessage`, which contains no part of the key."""
    fix = "Use a private key from `slmops trust ceremony` (PEM, PKCS#8)."
    try:
        return CryptoSigner(load_pem_private_key(pem, password))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidMessage("the file is not a private key for signing", where=where, fix=fix) from None


def locked(key: CryptoSigner, passphrase: bytes) -> bytes:
    """Returns the private key as PEM encrypted with the passphrase."""
    private = load_pem_private_key(key.private_bytes, None)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))


def read_key(path: Path, ask: Ask | None = None) -> CryptoSigner:
    """Reads a private key. `ask` returns the passphrase of a locked key; without `ask` a locked key is rejected.

    Raises `InvalidMessage`.
    """
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise InvalidMessage(f"the key cannot be read: {error.strerror}", where=str(path)) from error
    if not pem.lstrip().startswith(_LOCKED):
        return load_key(pem, str(path))
    if ask is None:
        fix = "Use a key without a passphrase: only keyholders' keys may be locked, because services start unattended."
        raise InvalidMessage("the key is locked with a passphrase", where=str(path), fix=fix)
    passphrase = ask(path)
    try:
        return load_key(pem, str(path), passphrase)
    except InvalidMessage as error:
        raise InvalidMessage("the passphrase does not open this key", where=str(path), fix="Try again.") from error


def read_keys(paths: Iterable[Path], ask: Ask | None = None) -> dict[str, CryptoSigner]:
    """Reads private keys and returns them by key id, which metadata uses to name a key."""
    found = [read_key(path, ask) for path in sorted(paths)]
    return {signer.public_key.keyid: signer for signer in found}


def trusted(key: Key) -> TrustedKey:
    """Returns the public key as a document."""
    public = str(key.keyval["public"])
    return TrustedKey(keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, keyval=KeyValue(public=public))


def usable(key: TrustedKey) -> Key:
    """Returns the key in the library's form. Raises `ValueError` or `KeyError` for a scheme unknown to the library."""
    return Key.from_dict(key.keyid, key.model_dump(exclude={"keyid"}))

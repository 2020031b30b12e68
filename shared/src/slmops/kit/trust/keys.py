"""Private keys as PEM files (PKCS#8, Ed25519), read and used through `securesystemslib`. Keyholders' may be locked."""

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
from slmops.contracts.trust import KeyValue, TrustedKey

Ask = Callable[[Path], bytes]
"""For the passphrase of a key file."""
_LOCKED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def new_key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def key_file(role: str, keyid: str) -> str:
    """The name of a key's file: which role, and enough of the key's id to tell it from the one before."""
    return f"{role}-{keyid[:8]}.pem"


def load_key(pem: bytes, where: str, password: bytes | None = None) -> CryptoSigner:
    """Raises `InvalidMessage`, without any part of the key."""
    fix = "Point to a private key as `slmops trust ceremony` makes them: PEM, PKCS#8."
    try:
        return CryptoSigner(load_pem_private_key(pem, password))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidMessage("this is no private key that can sign", where=where, fix=fix) from None


def locked(key: CryptoSigner, passphrase: bytes) -> bytes:
    """The private key as PEM that only the passphrase opens."""
    private = load_pem_private_key(key.private_bytes, None)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))


def read_key(path: Path, ask: Ask | None = None) -> CryptoSigner:
    """`ask` is called for the passphrase of a locked key; without it one is refused. Raises `InvalidMessage`."""
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise InvalidMessage(f"the key cannot be read: {error.strerror}", where=str(path)) from error
    if not pem.lstrip().startswith(_LOCKED):
        return load_key(pem, str(path))
    if ask is None:
        fix = "Only keyholders' keys may be locked: a service starts without anybody there to unlock it."
        raise InvalidMessage("the key is locked with a passphrase", where=str(path), fix=fix)
    passphrase = ask(path)
    try:
        return load_key(pem, str(path), passphrase)
    except InvalidMessage as error:
        raise InvalidMessage("the passphrase does not open this key", where=str(path), fix="Try again.") from error


def read_keys(paths: Iterable[Path], ask: Ask | None = None) -> dict[str, CryptoSigner]:
    """By key id, which is what metadata names a key by."""
    found = [read_key(path, ask) for path in sorted(paths)]
    return {signer.public_key.keyid: signer for signer in found}


def trusted(key: Key) -> TrustedKey:
    """The public half as a document."""
    public = str(key.keyval["public"])
    return TrustedKey(keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, keyval=KeyValue(public=public))


def usable(key: TrustedKey) -> Key:
    """The same as the library wants it. Raises `ValueError` or `KeyError` for a scheme that it does not know."""
    return Key.from_dict(key.keyid, key.model_dump(exclude={"keyid"}))

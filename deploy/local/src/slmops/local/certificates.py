"""A certificate authority for one system, and the certificates that it issues to the servers: NATS, S3 and HTTP.

Invariants:

- The authority's key stays in one file (0600). Clients get `trusted`, which holds certificates only.
- `trusted` is written first: at no time does a server have a certificate that clients do not trust yet.
- A new authority is added to `trusted`, and the old one stays there until it expires. So certificates of both are
  accepted while servers change theirs.
- Each server's certificate and key are in one file, replaced atomically, so they always match.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from slmops.contracts.errors import InvalidMessage
from slmops.local.private import write_atomically

SERVERS = ("nats", "s3", "http")
VALID_FOR = timedelta(days=90)
AUTHORITY_VALID_FOR = timedelta(days=3650)
RENEW_AFTER = 2 / 3
"""The share of its life after which a certificate is replaced."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_CLOCKS_DIFFER = timedelta(hours=1)
"""A certificate is valid from this long ago, for clients whose clocks are behind."""


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> str:
        encoding, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        private = self.key.private_bytes(encoding, pkcs8, serialization.NoEncryption())
        return (private + self.certificate.public_bytes(encoding)).decode()

    @classmethod
    def read(cls, path: Path) -> Issued | None:
        """Returns None if there is no such file, or it is damaged."""
        try:
            data = path.read_bytes()
            key = serialization.load_pem_private_key(data, password=None)
            certificate = x509.load_pem_x509_certificate(data)
        except (OSError, ValueError):
            return None
        return cls(certificate, key) if isinstance(key, ec.EllipticCurvePrivateKey) else None


@dataclass(frozen=True)
class Certificates:
    """The authority and the certificates in `folder`. `hosts` are names and addresses beside those of this machine."""

    folder: Path
    hosts: tuple[str, ...] = ()
    valid_for: timedelta = VALID_FOR

    @property
    def trusted(self) -> Path:
        """What clients trust, PEM."""
        return self.folder / "trusted-authorities.pem"

    @property
    def authority(self) -> Path:
        """The authority's certificate and key, PEM. Without this file, the next `renew` makes a new authority."""
        return self.folder / "authority.pem"

    def server(self, name: str) -> Path:
        """The certificate and key of a server of `SERVERS`, PEM."""
        return self.folder / f"{name}.pem"

    def renew(self, now: datetime) -> list[str]:
        """Issues what is missing, past two thirds of its life, of another authority, or without one of the names.

        Returns the servers that have a new certificate. Raises `InvalidMessage` for an invalid host, `DiskFull`,
        `Denied`.
        """
        self.folder.mkdir(exist_ok=True, mode=0o700)
        authority = Issued.read(self.authority)
        new = None
        if authority is None or _is_due(authority.certificate, now):
            authority = new = _new_authority(now)
        self._trust(authority.certificate, now)
        if new:
            write_atomically(self.authority, new.pem())
        return [name for name in SERVERS if self._renew_server(name, authority, now)]

    def _trust(self, authority: x509.Certificate, now: datetime) -> None:
        """Adds an authority to those that are trusted, and removes expired ones."""
        try:
            present = x509.load_pem_x509_certificates(self.trusted.read_bytes())
        except (FileNotFoundError, ValueError):
            present = []
        wanted = [authority, *(one for one in present if one != authority and one.not_valid_after_utc > now)]
        if wanted != present:
            write_atomically(self.trusted, "".join(map(_pem, wanted)))

    def _renew_server(self, name: str, authority: Issued, now: datetime) -> bool:
        present = Issued.read(self.server(name))
        has = _names(present.certificate) if present else []
        wanted = list(dict.fromkeys([*_LOCAL, *self.hosts, *has]))  # a name that was given once stays
        if (
            present
            and set(wanted) == set(has)
            and not _is_due(present.certificate, now)
            and _is_issued_by(present.certificate, authority.certificate)
        ):
            return False
        write_atomically(self.server(name), _issue(name, wanted, authority, now, self.valid_for).pem())
        return True


def _is_due(certificate: x509.Certificate, now: datetime) -> bool:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not start <= now < start + (end - start) * RENEW_AFTER


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError):
        return False
    return True


def _names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def _general_name(host: str) -> x509.GeneralName:
    """Raises `InvalidMessage`."""
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        if not host or host.strip() != host:
            raise ValueError
        return x509.DNSName(host)
    except ValueError:
        raise InvalidMessage(
            "this is not a host name or an address", where=host, fix="Write international names in their xn-- form."
        ) from None


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, valid_for: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + valid_for)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _new_authority(now: datetime) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name(f"slmops authority {secrets.token_hex(4)}")  # so that an old and a new one can be told apart
    certificate = (
        _builder(name, name, key, now, AUTHORITY_VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Issued(certificate, key)


def _issue(name: str, hosts: Sequence[str], authority: Issued, now: datetime, valid_for: timedelta) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_common_name(f"slmops {name}"), authority.certificate.subject, key, now, valid_for)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_general_names(hosts)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return Issued(certificate, key)


def _general_names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    return [_general_name(host) for host in hosts]

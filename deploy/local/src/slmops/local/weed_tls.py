"""Client certificates for SeaweedFS. Only its S3 API is for other programs; its other ports are for its own parts.

Master, volume, filer and admin server each open an HTTP and a gRPC port, by default without authentication. With
`security_config` all of them, and the gRPC port of S3, require the certificate of `new_identity`, which only SeaweedFS
has. ADR 15 has the measurements.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from slmops.local.ports import HOST

CONFIG_NAME = "security.toml"
"""SeaweedFS reads this file from its working directory. Without it, every port accepts everybody."""
_VALID_FOR = timedelta(days=36500)  # never renewed: only parts of the same process use the certificate
_GRPC = ("master", "volume", "filer", "s3", "admin", "worker", "client")
_HTTPS = ("master", "volume", "filer", "admin")


def new_identity() -> str:
    """Returns a new private key and its self-signed certificate, PEM.

    It is self-signed, so that no authority's key can sign a second certificate. Key and certificate are in one file:
    with two files that do not match, SeaweedFS only logs a warning and serves its gRPC ports without TLS. With a bad
    single file, its HTTP servers fail to start too, and the process ends.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "slmops object store")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # so that setting the clock back does not stop the object store
        .not_valid_after(now + _VALID_FOR)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    encoding, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(encoding, pkcs8, serialization.NoEncryption())
    return (private + certificate.public_bytes(encoding)).decode()


def security_config(identity: Path) -> str:
    """Returns `security.toml`, by which every port requires and presents the certificate in the file `identity`."""
    both = f'cert = "{identity}"\nkey = "{identity}"\n'
    authority = f'ca = "{identity}"\n'
    sections = [f"[grpc]\n{authority}"]
    sections += [f"[grpc.{component}]\n{both}" for component in _GRPC]
    sections += [f"[https.{component}]\n{both}{authority}" for component in _HTTPS]
    sections.append(f"[https.client]\nenabled = true\n{both}{authority}")
    return "\n".join(sections)

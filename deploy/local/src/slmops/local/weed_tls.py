"""Client certificates for SeaweedFS: of all its ports only the S3 API is for others, the rest talk to one another.

Master, volume, filer and admin server each open an HTTP and a gRPC port and ask nobody for a credential unless told to.
With `security_config` all of them, and the gRPC port of S3, demand the certificate of `new_identity`, which only
SeaweedFS itself holds. ADR 15 has the measurements.
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
"""SeaweedFS reads this file from its working directory, and without it opens every port to everybody."""
_VALID_FOR = timedelta(days=36500)  # the certificate proves that one process talks to itself: nobody has to renew it
_GRPC = ("master", "volume", "filer", "s3", "admin", "worker", "client")
_HTTPS = ("master", "volume", "filer", "admin")


def new_identity() -> str:
    """Returns a new private key and its self-signed certificate, PEM.

    Self-signed, so that there is no authority whose key could sign a second certificate. One text, because two files
    that do not belong together would open the gRPC ports: SeaweedFS logs a warning and serves them without TLS. With
    one file for everything its HTTP servers refuse to start for the same reason, and end the process.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "slmops object store")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # a clock that is set back must not stop the object store
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
    """Returns the text of `security.toml`: every port demands, and presents, the certificate in the file `identity`."""
    both = f'cert = "{identity}"\nkey = "{identity}"\n'
    authority = f'ca = "{identity}"\n'
    sections = [f"[grpc]\n{authority}"]
    sections += [f"[grpc.{component}]\n{both}" for component in _GRPC]
    sections += [f"[https.{component}]\n{both}{authority}" for component in _HTTPS]
    sections.append(f"[https.client]\nenabled = true\n{both}{authority}")
    return "\n".join(sections)

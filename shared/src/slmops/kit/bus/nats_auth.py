"""NATS decentralized authentication: signs operator, account and user JWTs, which the server enforces.

Claims are version 2 of https://github.com/nats-io/jwt, algorithm `ed25519-nkey`. Invariants:

- A private seed never crosses the wire: a gateway keeps its seed and sends only its public key to be signed.
- Gateways are signed by a *scoped* key: the permissions are a template in the account and not in the gateway's JWT. So
  the holder of that key (the rollout service) can name gateways but cannot give them more than the template.
- Service users are signed by a key of the services' account, each with its row of `contracts.permissions`.
- Streams, buckets and services are in the services' account. Gateways and the enrolment user are in two others, which
  import only what their permissions name. The server sends its own answers (acknowledgements, stored messages) to any
  reply subject without checking permissions. Across accounts it returns the answer to the account that sent the
  request, so a gateway's reply subject never reaches a stream, a bucket or a command.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import time
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import nkeys
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.names import check_name
from slmops.contracts.permissions import (
    ANSWERING_PERMISSIONS,
    ENROL_PERMISSIONS,
    ENROL_USER,
    GATEWAY_PERMISSIONS,
    PROVISIONER,
    PROVISIONER_PERMISSIONS,
    SERVICE_PERMISSIONS,
    Permissions,
    answering_user,
)
from slmops.contracts.subjects import INBOX

_PUBLIC_USER_LENGTH = 56
_MAX_CONTROL_LINE_BYTES = 32 << 10
_HANDSHAKE_S = 10  # the default of 2 s is short for a slow device on a slow network
_NO_LIMITS = {"subs": -1, "data": -1, "payload": -1}
_ACCOUNT_LIMITS = {**_NO_LIMITS, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
_JETSTREAM_LIMITS = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}


def _new_seed(prefix: int) -> str:
    seed: bytes = nkeys.encode_seed(secrets.token_bytes(32), prefix)
    return seed.decode()


def public_key(seed: str) -> str:
    """Returns the public nkey of a private seed."""
    key: bytes = nkeys.from_seed(seed.encode()).public_key
    return key.decode()


def sign(seed: str, data: bytes) -> bytes:
    """Returns the ed25519 signature of `data`, as NATS signs."""
    signature: bytes = nkeys.from_seed(seed.encode()).sign(data)
    return signature


def is_signed(public_key: str, data: bytes, signature: bytes) -> bool:
    """Returns whether the private half of a user's public nkey signed `data`. Raises `InvalidMessage` for an invalid
    key."""
    check_user_key(public_key)
    try:
        Ed25519PublicKey.from_public_bytes(base64.b32decode(public_key)[1:-2]).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def new_user_seed() -> str:
    """Generates the private key of a NATS user. Never send it anywhere."""
    return _new_seed(nkeys.PREFIX_BYTE_USER)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _jwt(
    issuer_seed: str,
    subject: str,
    name: str,
    nats: dict[str, Any],
    issued_at: datetime | None = None,
    expires_at: datetime | None = None,
) -> str:
    at = int(issued_at.timestamp() if issued_at else time.time())
    claims = {"iat": at, "iss": public_key(issuer_seed), "name": name, "sub": subject, "nats": nats}
    if expires_at:
        claims["exp"] = int(expires_at.timestamp())
    digest = hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).digest()
    claims["jti"] = base64.b32encode(digest).rstrip(b"=").decode()
    head = {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = ".".join(_base64(json.dumps(part, separators=(",", ":")).encode()) for part in (head, claims))
    return f"{signed}.{_base64(sign(issuer_seed, signed.encode()))}"


def _claims(permissions: Permissions) -> dict[str, Any]:
    return {
        "pub": {"allow": list(permissions.publish)},
        "sub": {"allow": list(permissions.subscribe)},
        **_NO_LIMITS,
    }


def _crossing(permissions: Permissions) -> list[dict[str, str]]:
    """Returns the exports of the services' account that another account imports to give its users `permissions`. A
    template's placeholders become wildcards; the users' own permissions narrow them again."""
    services = [{"name": subject, "subject": subject, "type": "service"} for subject in _open(permissions.publish)]
    heard = [subject for subject in _open(permissions.subscribe) if not subject.startswith(INBOX)]
    return [*services, *({"name": subject, "subject": subject, "type": "stream"} for subject in heard)]


def _open(subjects: tuple[str, ...]) -> list[str]:
    return [re.sub(r"\{\{.*?\}\}", "*", subject) for subject in subjects]


def user_of(creds: str) -> str:
    """Returns the user's name in the text of a `.creds` file. Raises `InvalidMessage`."""
    try:
        _, claims, _ = creds.split("-----BEGIN NATS USER JWT-----")[1].split()[0].split(".")
        return str(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["name"])
    except (IndexError, KeyError, ValueError) as error:
        raise InvalidMessage(
            "the file is not a credentials file", fix="Set SLMOPS_NATS_CREDS to a .creds file."
        ) from error


def creds_text(jwt: str, seed: str) -> str:
    """Returns the text of a `.creds` file, which NATS clients accept as `user_credentials`."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


def check_user_key(key: str) -> None:
    """Raises `InvalidMessage` for what is not the public nkey of a user."""
    try:
        raw = base64.b32decode(key)
    except ValueError as error:
        raise InvalidMessage(
            "a gateway's public key is not base32", fix="Send the public key of a user nkey."
        ) from error
    checksum = int.from_bytes(raw[-2:], "little")
    if len(key) != _PUBLIC_USER_LENGTH or raw[0] != nkeys.PREFIX_BYTE_USER or nkeys.crc16(raw[:-2]) != checksum:
        raise InvalidMessage("a gateway's public key is not a user nkey", fix="It starts with U and has 56 characters.")


def gateway_jwt(
    signing_key: str,
    public_key: str,
    gateway_id: str,
    blueprint: str,
    *,
    enrolment: int = 1,
    issued_at: datetime | None = None,
    expires_at: datetime | None = None,
) -> str:
    """Returns a gateway's credential, signed at enrolment. The gateway combines it with its seed (`creds_text`).

    `signing_key` is `Authority.gateway_signing_key`, `issued_at` now by default. Without `expires_at` it never expires.
    Raises `InvalidName`, `InvalidMessage`.
    """
    check_name(gateway_id, "gateway id")
    check_name(blueprint, "blueprint name")
    check_user_key(public_key)
    seed, account = signing_key.split()
    # The server rejects a user of a scoped key that claims any permissions.
    tags = [f"blueprint:{blueprint}", f"enrolment:{enrolment}"]
    claims = {"tags": tags, "issuer_account": account, "type": "user", "version": 2}
    return _jwt(seed, public_key, gateway_id, claims, issued_at, expires_at)


@dataclass(frozen=True)
class GatewayClaims:
    """What a gateway's credential says. Times are those of the service that signed it, in whole seconds."""

    gateway_id: str
    public_key: str
    blueprint: str
    enrolment: int
    issued_at: datetime
    expires_at: datetime | None

    @classmethod
    def of(cls, jwt: str) -> Self:
        """Reads a gateway's credential without verifying it. Raises `InvalidMessage`."""
        try:
            _, part, _ = jwt.split(".")
            claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
            tags = dict(tag.split(":", 1) for tag in claims["nats"]["tags"])
            return cls(
                gateway_id=str(claims["name"]),
                public_key=str(claims["sub"]),
                blueprint=tags["blueprint"],
                enrolment=int(tags.get("enrolment", 0)),
                issued_at=datetime.fromtimestamp(claims["iat"], UTC),
                expires_at=datetime.fromtimestamp(claims["exp"], UTC) if "exp" in claims else None,
            )
        except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
            raise InvalidMessage("this is not a gateway's credential", fix="Enrol the gateway again.") from error


@dataclass(frozen=True)
class Authority:
    """The private seeds that sign everything else. Keep them in one file that only its owner can read.

    `account`, `edge` and `enrolment` are the accounts of services, gateways and the enrolment user; `services` and
    `gateways` sign users of the first two.
    """

    operator: str
    system: str
    account: str
    edge: str
    enrolment: str
    services: str
    gateways: str

    @classmethod
    def generate(cls) -> Self:
        seeds = {name: _new_seed(nkeys.PREFIX_BYTE_ACCOUNT) for name in (field.name for field in fields(cls))}
        return cls(**(seeds | {"operator": _new_seed(nkeys.PREFIX_BYTE_OPERATOR)}))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the seeds. If an older release wrote the text, new seeds are added: write the result back."""
        return cls(**(asdict(cls.generate()) | json.loads(text)))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @property
    def gateway_signing_key(self) -> str:
        """The rollout service's signing key: the scoped seed, and the public key of the account for which it signs."""
        return f"{self.gateways}\n{public_key(self.edge)}\n"

    def service_creds(self, service: str) -> str:
        """Returns new credentials of a service, or of `console`. Older ones stay valid."""
        return self.user_creds(service, SERVICE_PERMISSIONS[service])

    def answering_creds(self, service: str) -> str:
        """Returns new credentials with which a service answers commands."""
        return self.user_creds(answering_user(service), ANSWERING_PERMISSIONS[service])

    def provisioner_creds(self) -> str:
        """Returns new credentials of the user that creates streams and buckets."""
        return self.user_creds(PROVISIONER, PROVISIONER_PERMISSIONS)

    def enrol_creds(self) -> str:
        """Returns new bootstrap credentials, which all gateways that are not enrolled yet share."""
        seed = new_user_seed()
        claims = {**_claims(ENROL_PERMISSIONS), "type": "user", "version": 2}
        return creds_text(_jwt(self.enrolment, public_key(seed), ENROL_USER, claims), seed)

    def user_creds(self, name: str, permissions: Permissions) -> str:
        """Returns credentials of a new user of the services' account with the given permissions."""
        seed = new_user_seed()
        claims = {**_claims(permissions), "issuer_account": public_key(self.account), "type": "user", "version": 2}
        return creds_text(_jwt(self.services, public_key(seed), name, claims), seed)

    def operator_jwt(self) -> str:
        claims = {"system_account": public_key(self.system), "type": "operator", "version": 2}
        return _jwt(self.operator, public_key(self.operator), "slmops", claims)

    def account_jwts(self) -> dict[str, str]:
        """Returns the JWT of each account by its public key."""
        scope = {
            "kind": "user_scope",
            "key": public_key(self.gateways),
            "role": "gateway",
            "template": _claims(GATEWAY_PERMISSIONS),
        }
        edge, enrolment = _crossing(GATEWAY_PERMISSIONS), _crossing(ENROL_PERMISSIONS)
        slmops = {
            "limits": {**_ACCOUNT_LIMITS, **_JETSTREAM_LIMITS},
            "signing_keys": [public_key(self.services)],
            "exports": [*edge, *enrolment],
        }
        return dict(
            (
                self._account_jwt("SYS", self.system, {}),
                self._account_jwt("slmops", self.account, slmops),
                self._account_jwt("edge", self.edge, {"signing_keys": [scope], "imports": self._imports(edge)}),
                # Shared: the server tells the service the sender's address, by which wrong tokens are limited.
                self._account_jwt("enrolment", self.enrolment, {"imports": self._imports(enrolment, share=True)}),
            )
        )

    def _imports(self, exports: list[dict[str, str]], *, share: bool = False) -> list[dict[str, Any]]:
        shared = {"share": True} if share else {}
        return [{**export, "account": public_key(self.account), **shared} for export in exports]

    def _account_jwt(self, name: str, seed: str, claims: dict[str, Any]) -> tuple[str, str]:
        common = {"default_permissions": {"pub": {}, "sub": {}}, "limits": _ACCOUNT_LIMITS, "version": 2}
        key = public_key(seed)
        return key, _jwt(self.operator, key, name, {**common, "type": "account", **claims})


def server_config(
    authority: Authority,
    store_dir: Path,
    *,
    port: int = -1,
    host: str = "127.0.0.1",
    ports_file_dir: Path | None = None,
    max_file_store: int | None = None,
    certificate: Path | None = None,
    websocket: str | None = None,
) -> str:
    """Returns the text of a nats-server configuration.

    With `port=-1` the server chooses a free port and writes it to `ports_file_dir`. `sync_interval` is `always` because
    the default (every two minutes) loses acknowledged writes when power fails. There is no monitoring port, because it
    has no authentication. `max_file_store` is the limit of JetStream in bytes; None: three quarters of the free disk.
    `certificate` is a file with the server's certificate and key; with it, only encrypted connections are accepted, and
    `websocket` is the `host:port` for encrypted websockets. The server reads the file again after SIGHUP.
    """
    limit = f", max_file_store: {max_file_store}" if max_file_store else ""
    lines = [
        "server_name: slmops",
        f"listen: {json.dumps(f'{host}:{port}')}",
        f"operator: {authority.operator_jwt()}",
        f"system_account: {public_key(authority.system)}",
        "resolver: MEMORY",
        "resolver_preload: {",
        *(f"  {key}: {jwt}" for key, jwt in authority.account_jwts().items()),
        "}",
        # A client's first line contains its JWT, which lists its permissions. The default is 4 kB.
        f"max_control_line: {_MAX_CONTROL_LINE_BYTES}",
        f"jetstream: {{ store_dir: {json.dumps(str(store_dir))}, sync_interval: always{limit} }}",
    ]
    if certificate:
        files = f"cert_file: {json.dumps(str(certificate))}, key_file: {json.dumps(str(certificate))}"
        # TLS comes before the greeting. Otherwise somebody on the way could replace the greeting, which asks for TLS.
        lines.append(f"tls: {{ {files}, timeout: {_HANDSHAKE_S}, handshake_first: true }}")
        if websocket:
            lines.append(f"websocket: {{ listen: {json.dumps(websocket)}, tls: {{ {files} }} }}")
    if ports_file_dir:
        lines.append(f"ports_file_dir: {json.dumps(str(ports_file_dir))}")
    return "\n".join(lines) + "\n"

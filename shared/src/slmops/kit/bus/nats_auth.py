"""NATS decentralized authentication: signs operator, account and user JWTs, which the server enforces.

Claims are version 2 of https://github.com/nats-io/jwt, algorithm `ed25519-nkey`. Invariants:

- A private seed never crosses the wire: a gateway keeps its seed and sends only its public key to be signed.
- Gateways are signed by a *scoped* key: the permissions are a template in the account and not in the gateway's JWT. So
  the holder of that key (the rollout service) can name gateways but cannot give them more than the template.
- Service users are signed by a key of the services' account, each with its row of `contracts.permissions`.
- People are signed by a scoped key too, one per role. So credentials contain a name and no permissions.
- Accounts are signed by a key that the access service holds too: it adds the revoked keys (`accounts`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import nkeys
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from slmops.contracts.errors import InvalidMessage
from slmops.contracts.identity import Actor, Role, person, service
from slmops.contracts.names import check_name
from slmops.contracts.permissions import (
    ANSWERING_PERMISSIONS,
    ENROL_PERMISSIONS,
    ENROL_USER,
    PROVISIONER,
    PROVISIONER_PERMISSIONS,
    SERVICE_PERMISSIONS,
    SYSTEM_PERMISSIONS,
    SYSTEM_USER,
    Permissions,
    answering_user,
)
from slmops.kit.bus.accounts import AccountKeys, Claims, account_claims, user_claims

_PUBLIC_USER_LENGTH = 56
_MAX_CONTROL_LINE_BYTES = 32 << 10
_HANDSHAKE_S = 10  # the default of 2 s is short for a slow device on a slow network
_ROLE_TAG = "role:"
_BEFORE_ALL = 1
"""The time at which the accounts in the server's configuration are issued: those that were pushed since are newer."""


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


def claims_of(jwt: str) -> dict[str, Any]:
    """Returns the claims of a JWT without checking it. Raises `ValueError`."""
    _, claims, _ = jwt.split(".")
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    return found


class Credentials(NamedTuple):
    """What a `.creds` file says: whose it is, its public key, and until when it is valid (None: always)."""

    who: Actor
    public_key: str
    until: datetime | None
    seed: str


def read_creds(creds: str) -> Credentials:
    """Reads the text of a `.creds` file. Only the server checks its signature. Raises `InvalidMessage`."""
    try:
        claims = claims_of(creds.split("-----BEGIN NATS USER JWT-----")[1].split()[0])
        seed = creds.split("-----BEGIN USER NKEY SEED-----")[1].split()[0]
        tags = claims["nats"].get("tags") or []
        role = next((Role(tag.removeprefix(_ROLE_TAG)) for tag in tags if tag.startswith(_ROLE_TAG)), None)
        name, until = str(claims["name"]), claims.get("exp")
        who = service(name) if role is None else person(name, role)
        return Credentials(who, str(claims["sub"]), datetime.fromtimestamp(until, UTC) if until else None, seed)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
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
        raise InvalidMessage("the public key is not base32", fix="Send the public key of a user nkey.") from error
    checksum = int.from_bytes(raw[-2:], "little")
    if len(key) != _PUBLIC_USER_LENGTH or raw[0] != nkeys.PREFIX_BYTE_USER or nkeys.crc16(raw[:-2]) != checksum:
        raise InvalidMessage("the public key is not a user nkey", fix="It starts with U and has 56 characters.")


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
            claims = claims_of(jwt)
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


def person_jwt(
    signing_key: str, account: str, public_key: str, who: Actor, until: datetime, issued_at: datetime | None = None
) -> str:
    """Returns a person's credential, valid `until` then. The person combines it with the seed of the key.

    `signing_key` is the seed for the person's role, `account` the public key of people's account. Raises `InvalidName`,
    `InvalidMessage`.
    """
    check_name(who.name, "user name")
    check_user_key(public_key)
    claims = {"tags": [f"{_ROLE_TAG}{who.role}"], "issuer_account": account, "type": "user", "version": 2}
    return _jwt(signing_key, public_key, who.name, claims, issued_at, until)


def account_jwts(
    signing_key: str, accounts: Mapping[str, tuple[str, Claims]], issued: int | None = None
) -> dict[str, str]:
    """Returns the JWT of each account by its public key. `issued`: Unix time; None: now."""
    at = None if issued is None else datetime.fromtimestamp(issued, UTC)
    return {key: _jwt(signing_key, key, name, claims, at) for key, (name, claims) in accounts.items()}


def accounts_folder(store_dir: Path) -> Path:
    """Returns the folder in which a server with this folder of JetStream keeps the accounts that were pushed to it."""
    return store_dir.parent / "accounts"


def revoked_keys(accounts: Path, account: str) -> dict[str, int]:
    """Returns the revoked keys of an account with their times, as a server's folder of accounts has them.

    Empty if the server was never started, or no account was pushed to it.
    """
    try:
        found: dict[str, int] = claims_of((accounts / f"{account}.jwt").read_text())["nats"].get("revocations") or {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    return found


@dataclass(frozen=True)
class Authority:
    """The private seeds that sign everything else. Keep them in one file that only its owner can read.

    `account`, `people`, `edge` and `enrolment` are the accounts of services, people, gateways and the enrolment user.
    `services` and `gateways` sign users, and the `role_…` seeds people. `accounts` signs the accounts for the operator.
    """

    operator: str
    system: str
    account: str
    edge: str
    enrolment: str
    services: str
    gateways: str
    people: str
    role_viewer: str
    role_operator: str
    role_approver: str
    role_admin: str
    accounts: str

    @classmethod
    def generate(cls) -> Self:
        seeds = {name: _new_seed(nkeys.PREFIX_BYTE_ACCOUNT) for name in (field.name for field in fields(cls))}
        return cls(**(seeds | {name: _new_seed(nkeys.PREFIX_BYTE_OPERATOR) for name in ("operator", "accounts")}))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the seeds. If an older release wrote the text, new seeds are added: write the result back.

        With the release that gave people accounts, the seed that signs services is replaced: it also signed the one
        user with which all operators worked, and that user's rights are in its credentials, wherever copies are.
        """
        found = json.loads(text)
        if "people" not in found:
            found.pop("services", None)
        return cls(**(asdict(cls.generate()) | found))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @property
    def gateway_signing_key(self) -> str:
        """The rollout service's signing key: the scoped seed, and the public key of the account for which it signs."""
        return f"{self.gateways}\n{public_key(self.edge)}\n"

    @property
    def account_keys(self) -> AccountKeys:
        return AccountKeys(
            system=public_key(self.system),
            services=public_key(self.account),
            people=public_key(self.people),
            edge=public_key(self.edge),
            enrolment=public_key(self.enrolment),
            service_users=public_key(self.services),
            gateway_users=public_key(self.gateways),
            roles={str(role): public_key(self.role_seed(role)) for role in Role},
        )

    def role_seed(self, role: Role) -> str:
        return str(getattr(self, f"role_{role}"))

    def service_creds(self, service: str) -> str:
        """Returns new credentials of a service. Older ones stay valid."""
        return self.user_creds(service, SERVICE_PERMISSIONS[service])

    def answering_creds(self, service: str) -> str:
        """Returns new credentials with which a service answers commands."""
        return self.user_creds(answering_user(service), ANSWERING_PERMISSIONS[service])

    def provisioner_creds(self) -> str:
        """Returns new credentials of the user that creates streams and buckets."""
        return self.user_creds(PROVISIONER, PROVISIONER_PERMISSIONS)

    def enrol_creds(self) -> str:
        """Returns new bootstrap credentials, which all gateways that are not enrolled yet share."""
        return _new_user(self.enrolment, ENROL_USER, user_claims(ENROL_PERMISSIONS))

    def system_creds(self) -> str:
        """Returns new credentials of the user that tells the server what changed in accounts."""
        return _new_user(self.system, SYSTEM_USER, user_claims(SYSTEM_PERMISSIONS))

    def person_creds(self, who: Actor, until: datetime, seed: str | None = None) -> str:
        """Returns credentials of a person with a role, with the key `seed`; None: a new key."""
        assert who.role is not None, "a person has a role"
        seed = seed or new_user_seed()
        jwt = person_jwt(self.role_seed(who.role), public_key(self.people), public_key(seed), who, until)
        return creds_text(jwt, seed)

    def user_creds(self, name: str, permissions: Permissions) -> str:
        """Returns credentials of a new user of the services' account with the given permissions."""
        return _new_user(self.services, name, {**user_claims(permissions), "issuer_account": public_key(self.account)})

    def operator_jwt(self) -> str:
        signing = [public_key(self.accounts)]
        claims = {"system_account": public_key(self.system), "signing_keys": signing, "type": "operator", "version": 2}
        return _jwt(self.operator, public_key(self.operator), "slmops", claims)

    def account_jwts(self) -> dict[str, str]:
        """Returns the JWT of each account by its public key, for the server's first start."""
        return account_jwts(self.accounts, account_claims(self.account_keys), _BEFORE_ALL)


def _new_user(signing_key: str, name: str, claims: Claims) -> str:
    seed = new_user_seed()
    return creds_text(_jwt(signing_key, public_key(seed), name, {**claims, "type": "user", "version": 2}), seed)


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
        # It keeps the accounts that the access service pushed, with their revoked keys, also when it starts again.
        f"resolver: {{ type: full, dir: {json.dumps(str(accounts_folder(store_dir)))}, allow_delete: false }}",
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

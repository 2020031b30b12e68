"""The data folder: its paths, and the keys that are generated in it once."""

from __future__ import annotations

import getpass
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.errors import Denied, InvalidMessage
from slmops.contracts.identity import Role, person
from slmops.contracts.names import NAME_PATTERN
from slmops.contracts.permissions import (
    ANSWERING_PERMISSIONS,
    ENROL_USER,
    PROVISIONER,
    SERVICE_PERMISSIONS,
    SYSTEM_USER,
    answering_user,
)
from slmops.kit.bus.access_keys import AccessKeys, FirstAdmin
from slmops.kit.bus.nats_auth import (
    Authority,
    accounts_folder,
    new_user_seed,
    public_key,
    read_creds,
    revoked_keys,
)
from slmops.kit.clock import utc_now
from slmops.kit.data_folder import FolderLayout
from slmops.kit.trust.ceremony import ceremony
from slmops.kit.trust.folder import Folder
from slmops.local.certificates import Certificates
from slmops.local.private import write_atomically
from slmops.local.weed_tls import new_identity

FOLDER = FolderLayout(kind="slmops up", marks=("keys",))
"""The layout of the data folder. A change that older folders need is a migration here."""
ADMIN: Final = "console"
"""Whose credentials the command line uses: an admin's. The file has the name that it had when all operators were one
user."""
_ADMIN_FOR = timedelta(days=90)


@dataclass(frozen=True)
class S3Credentials:
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Layout:
    """The paths below `root`. `prepare` creates missing files and keeps existing ones, so a restart continues."""

    root: Path

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def ports_file(self) -> Path:
        return self.root / "ports.json"

    @property
    def state_file(self) -> Path:
        return self.root / "state.json"

    @property
    def client_file(self) -> Path:
        return self.root / "client.json"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    @property
    def signing_key(self) -> Path:
        """Private key that signs packages, EC P-256, PEM."""
        return self.keys / "package-signing.pem"

    @property
    def trusted_key(self) -> Path:
        """Public key with which gateways verify packages, PEM."""
        return self.keys / "package-trusted.pem"

    @property
    def trust(self) -> Folder:
        """Keys and metadata of the trust repository. The offline keys are here too: move them off this machine."""
        return Folder(self.keys / "tuf")

    @property
    def trusted_root(self) -> Path:
        """The root of trust from which gateways verify packages and plans."""
        return self.trust.first_root

    @property
    def plan_signing_key(self) -> Path:
        """Private key that signs plans."""
        return self.trust.plan_key

    @property
    def enrolment_token(self) -> Path:
        return self.keys / "enrolment-token"

    @property
    def gateway_signing_key(self) -> Path:
        return self.keys / "gateway-signing"

    @property
    def access_keys(self) -> Path:
        """The keys with which the access service signs accounts and people."""
        return self.keys / "access-keys.json"

    @property
    def first_admin(self) -> Path:
        """Names the person whose credentials are `creds(ADMIN)`. It holds no secret."""
        return self.keys / "first-admin.json"

    @property
    def weed_identity(self) -> Path:
        """Private key and certificate with which the parts of SeaweedFS authenticate one another, PEM."""
        return self.keys / "weed.pem"

    @property
    def certificates(self) -> Certificates:
        """The local authority and the certificates of NATS, S3 and HTTP."""
        return Certificates(self.keys / "tls")

    @property
    def nats_store(self) -> Path:
        """JetStream's folder."""
        return self.home("nats") / "store"

    @property
    def nats_accounts(self) -> Path:
        """The folder in which the server keeps the accounts that the access service pushed."""
        return accounts_folder(self.nats_store)

    def creds(self, user: str) -> Path:
        return self.keys / f"{user}.creds"

    def log(self, process: str) -> Path:
        return self.logs / f"{process}.log"

    def trace(self, process: str) -> Path:
        return self.traces / f"{process}.jsonl"

    def home(self, process: str) -> Path:
        """The private folder of one process."""
        return self.root / process

    def create(self) -> None:
        """Creates the folder, which only its owner can read. Raises `Denied`, and `IncompatibleFolder` before that."""
        FOLDER.check(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.root.chmod(0o700)
        except OSError as error:
            raise Denied(
                f"cannot use the data folder: {error.strerror}",
                where=str(self.root),
                fix="Choose a folder with write permission.",
            ) from error

    def prepare(self, accounts: Path | None = None) -> None:
        """Creates the folder and its keys, and migrates an older folder.

        `accounts` is the server's folder of accounts (default: `nats_accounts`). If they revoke the key of the person
        who starts the system, that person gets a new key. Raises `Denied`, `DiskFull`, `IncompatibleFolder`.
        """
        self.create()
        FOLDER.migrate(self.root)
        for folder in (self.keys, self.logs, self.traces):
            folder.mkdir(exist_ok=True)
        authority = self.authority()
        write_atomically(self.gateway_signing_key, authority.gateway_signing_key)
        self._write_once(self.enrolment_token, lambda: secrets.token_urlsafe(32))
        self._write_once(self.weed_identity, new_identity)
        self._write_signing_keys()
        if not self.trusted_root.exists():
            ceremony(self.trust, utc_now()).apply()
        # Signed again at each start, so that a changed permission table takes effect.
        for service in SERVICE_PERMISSIONS:
            write_atomically(self.creds(service), authority.service_creds(service))
        for service in ANSWERING_PERMISSIONS:
            write_atomically(self.creds(answering_user(service)), authority.answering_creds(service))
        write_atomically(self.creds(ENROL_USER), authority.enrol_creds())
        write_atomically(self.creds(PROVISIONER), authority.provisioner_creds())
        write_atomically(self.creds(SYSTEM_USER), authority.system_creds())
        write_atomically(self.access_keys, AccessKeys.of(authority).model_dump_json())
        self._write_first_admin(authority, accounts or self.nats_accounts)

    def _write_first_admin(self, authority: Authority, accounts: Path) -> None:
        """Signs the credentials of the person who starts the system: the same name at each start, and the same key
        unless it was revoked."""
        path, until = self.creds(ADMIN), utc_now() + _ADMIN_FOR
        try:
            kept = read_creds(path.read_text())
        except (OSError, InvalidMessage):
            kept = None
        if kept is None or kept.who.role is None:  # none, or of a release in which all operators were one user
            who, seed = person(login_name(), Role.ADMIN), new_user_seed()
        else:
            revoked = kept.public_key in revoked_keys(accounts, authority.account_keys.people)
            who, seed = kept.who, new_user_seed() if revoked else kept.seed
        write_atomically(path, authority.person_creds(who, until, seed))
        given = FirstAdmin(user=who.name, public_key=public_key(seed), expires_at=until)
        write_atomically(self.first_admin, given.model_dump_json())

    def authority(self) -> Authority:
        file = self.keys / "nats-authority.json"
        kept = self._write_once(file, lambda: Authority.generate().to_json())
        authority = Authority.from_json(kept)
        if authority.to_json() != kept:
            write_atomically(file, authority.to_json())
        return authority

    def s3_credentials(self) -> S3Credentials:
        def generate() -> str:
            return json.dumps({"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(30)})

        return S3Credentials(**json.loads(self._write_once(self.keys / "s3.json", generate)))

    def _write_signing_keys(self) -> None:
        pem = self._write_once(self.signing_key, _new_private_pem)
        key = serialization.load_pem_private_key(pem.encode(), password=None)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        write_atomically(self.trusted_key, public.decode())

    @staticmethod
    def _write_once(path: Path, generate: Callable[[], str]) -> str:
        if not path.exists():
            write_atomically(path, generate())
        return path.read_text()


def login_name() -> str:
    """Returns the name of the person who runs this, or `admin` if it is not a valid user name."""
    try:
        found = getpass.getuser()
    except (OSError, KeyError):
        return "admin"
    return found if found != "root" and re.fullmatch(NAME_PATTERN, found) else "admin"


def _new_private_pem() -> str:
    return (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        .decode()
    )

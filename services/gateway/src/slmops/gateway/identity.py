"""The credentials of this gateway on the bus: its own nkey, which never leaves it, and the JWT from enrolment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from nats.aio.client import RawCredentials

from slmops.contracts.commands import EnrolGateway
from slmops.contracts.errors import InvalidMessage, NotReady
from slmops.contracts.permissions import ENROL_USER
from slmops.contracts.plan import Identity
from slmops.contracts.subjects import inbox
from slmops.gateway.settings import Settings
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import creds_text, new_user_seed, public_key

_TOKEN_EVERY = timedelta(seconds=15)


@dataclass(frozen=True)
class Credentials:
    """Makes connections as this gateway."""

    identity: Identity
    seed: str
    jwt: str

    async def connect(self, settings: Settings) -> BusClient:
        """Raises `Unreachable`, `CredentialsRefused`."""
        return await BusClient.connect(
            settings,
            name=self.identity.gateway_id,
            user_credentials=RawCredentials(creds_text(self.jwt, self.seed)),
            inbox_prefix=inbox(self.identity.gateway_id).encode(),
        )


async def enrol(settings: Settings, *, again: bool = False) -> Credentials:
    """The credentials of this gateway, asked for once and kept; `again`: those kept are of no use any more.

    Raises `Unreachable`, `NotReady`, `Denied`, `InvalidMessage`.
    """
    identity = Identity(gateway_id=settings.gateway_id, blueprint=settings.blueprint, labels=settings.labels)
    seed, jwt_file = own_seed(settings.data_dir), settings.data_dir / "user.jwt"
    if jwt_file.exists() and not again:
        return Credentials(identity, seed, jwt_file.read_text().strip())
    command = EnrolGateway(
        gateway_id=identity.gateway_id,
        blueprint=identity.blueprint,
        labels=identity.labels,
        public_key=public_key(seed),
        token=_token(settings.enrolment_token),
    )
    client = await BusClient.connect(
        settings,
        name=identity.gateway_id,
        patient=False,
        user_credentials=str(settings.enrol_creds),
        inbox_prefix=inbox(ENROL_USER).encode(),
    )
    try:
        answer = await client.request(command)
    finally:
        await client.close()
    _write_private(jwt_file, answer.jwt)
    return Credentials(identity, seed, answer.jwt)


def own_seed(home: Path) -> str:
    """The private key of this gateway, made when it is first asked for."""
    seed_file = home / "nkey.seed"
    if not seed_file.exists():
        home.mkdir(parents=True, exist_ok=True)
        _write_private(seed_file, new_user_seed())
    return seed_file.read_text().strip()


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError as error:
        # A device may be given it after it was switched on; what came with it serves meanwhile.
        raise NotReady(
            "there is no enrolment token yet",
            where=str(path),
            fix="Put the site's token there, or set SLMOPS_ENROLMENT_TOKEN to where it is.",
            delay=_TOKEN_EVERY,
        ) from error
    except OSError as error:
        raise InvalidMessage(
            "the enrolment token cannot be read", where=str(path), fix="Set SLMOPS_ENROLMENT_TOKEN to the token's file."
        ) from error


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and readable by the owner only from the first moment."""
    new = path.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new.replace(path)

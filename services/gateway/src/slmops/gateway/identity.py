"""The bus credentials of this gateway: its nkey, whose private half never leaves the device, and the enrolment JWT."""

from __future__ import annotations

import asyncio
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
    """The nkey seed and the JWT with which this gateway connects to the bus."""

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
    """Returns the credentials of this gateway. Requests them once and stores them; `again` replaces the stored ones.

    Raises `Unreachable`, `NotReady`, `Denied`, `InvalidMessage`.
    """
    identity = Identity(gateway_id=settings.gateway_id, blueprint=settings.blueprint, labels=settings.labels)
    seed = await asyncio.to_thread(own_seed, settings.data_dir)
    jwt_file = settings.data_dir / "user.jwt"
    if not again and (jwt := await asyncio.to_thread(_stored, jwt_file)):
        return Credentials(identity, seed, jwt)
    command = EnrolGateway(
        gateway_id=identity.gateway_id,
        blueprint=identity.blueprint,
        labels=identity.labels,
        public_key=public_key(seed),
        token=await asyncio.to_thread(_token, settings.enrolment_token),
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
    await asyncio.to_thread(_write_private, jwt_file, answer.jwt)
    return Credentials(identity, seed, answer.jwt)


def own_seed(home: Path) -> str:
    """Returns the private key of this gateway. The first call generates it."""
    seed_file = home / "nkey.seed"
    if not seed_file.exists():
        home.mkdir(parents=True, exist_ok=True)
        _write_private(seed_file, new_user_seed())
    return seed_file.read_text().strip()


def _stored(jwt_file: Path) -> str:
    """Returns the stored JWT; empty if there is none."""
    return jwt_file.read_text().strip() if jwt_file.exists() else ""


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError as error:
        # The token may be delivered after the device was switched on. Until then the factory release serves.
        raise NotReady(
            "there is no enrolment token yet",
            where=str(path),
            fix="Put the site's token there, or set SLMOPS_ENROLMENT_TOKEN to the token's file.",
            delay=_TOKEN_EVERY,
        ) from error
    except OSError as error:
        raise InvalidMessage(
            "cannot read the enrolment token", where=str(path), fix="Set SLMOPS_ENROLMENT_TOKEN to the token's file."
        ) from error


def _write_private(path: Path, text: str) -> None:
    """Writes the file atomically and durably, from the start with permissions for the owner only."""
    new = path.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # a device that lost its key could not enrol under its name again
    finally:
        os.close(folder)

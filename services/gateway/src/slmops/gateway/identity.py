"""The bus credentials of this gateway: its nkey, whose private half never leaves the device, and the JWT of its key.

The JWT says to which blueprint the gateway belongs and until when it is valid. It is the only record of both.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

from nats.aio.client import RawCredentials

from slmops.contracts.commands import EnrolGateway, Enrolment, RenewCredential, RenewExpiredCredential
from slmops.contracts.commands.gateways import STATEMENT_AGE
from slmops.contracts.errors import Denied, InvalidMessage, NotFound, NotReady, Unreachable
from slmops.contracts.permissions import ENROL_USER
from slmops.contracts.plan import Identity
from slmops.contracts.subjects import inbox
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.settings import Settings
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import GatewayClaims, creds_text, new_user_seed, public_key, sign
from slmops.kit.clock import utc_now

log = logging.getLogger(__name__)
_TOKEN_EVERY = timedelta(seconds=15)


@dataclass(frozen=True)
class Credentials:
    """The nkey seed and the JWT with which this gateway connects to the bus."""

    identity: Identity
    seed: str
    jwt: str

    @cached_property
    def claims(self) -> GatewayClaims:
        return GatewayClaims.of(self.jwt)

    async def connect(self, settings: Settings) -> BusClient:
        """Raises `Unreachable`, `CredentialsRefused`."""
        return await BusClient.connect(
            settings,
            name=self.identity.gateway_id,
            user_credentials=RawCredentials(creds_text(self.jwt, self.seed)),
            inbox_prefix=inbox(self.identity.gateway_id).encode(),
        )


def stored(settings: Settings) -> Credentials | None:
    """Returns the stored credentials; None if there are none, or if they are not of this gateway's key."""
    try:
        jwt = _jwt_file(settings).read_text().strip()
        claims = GatewayClaims.of(jwt)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, InvalidMessage) as error:
        log.warning("cannot use the stored credentials, asking for new ones: %s", error)
        return None
    seed = own_seed(settings.data_dir)
    if claims.public_key != public_key(seed) or claims.gateway_id != settings.gateway_id:
        log.warning("the stored credentials are those of another key or gateway; asking for new ones")
        return None
    return Credentials(_identity(settings, claims.blueprint), seed, jwt)


def own_identity(settings: Settings, known: Credentials | None) -> Identity:
    """Returns who this gateway is. Its credential decides about the blueprint: an admin may have moved it."""
    if known is None:
        return _identity(settings, settings.blueprint)
    if known.identity.blueprint != settings.blueprint:
        log.info("this gateway was moved from %s to %s", settings.blueprint, known.identity.blueprint)
    return known.identity


async def enrol(settings: Settings) -> Credentials:
    """Returns the stored credentials, or requests them and stores them.

    Raises `Unreachable`, `NotReady`, `Denied`, `CredentialRevoked`, `InvalidMessage`, `DiskFull`.
    """
    if (known := await asyncio.to_thread(stored, settings)) is not None:
        return known
    if (settings.data_dir / "nkey.seed").exists() and _jwt_file(settings).exists():
        return await readmit(settings)  # only the credential was lost
    command = await asyncio.to_thread(_enrolment, settings)
    async with _bootstrap(settings) as client:
        return await asyncio.to_thread(_keep, settings, await client.request(command))


async def readmit(settings: Settings) -> Credentials:
    """Requests new credentials for the own key, which the bus refuses or does not know any more, and stores them.

    A signature of the key is enough if it is enrolled; otherwise the site's token is needed.
    Raises `Unreachable`, `NotReady`, `Denied`, `CredentialRevoked`, `InvalidMessage`, `DiskFull`.
    """
    async with _bootstrap(settings) as client:
        try:
            answer = await _renewed_by_signature(settings, client)
        except (NotFound, Unreachable) as error:  # not enrolled, or a rollout service of an earlier release
            log.info("no credentials by signature: %s", error)
            answer = await client.request(await asyncio.to_thread(_enrolment, settings))
    return await asyncio.to_thread(_keep, settings, answer)


async def renew(settings: Settings, client: BusClient) -> Credentials:
    """Requests new credentials over the gateway's own connection, and stores them.

    Raises `TemporaryError`, `NotFound`, `Denied`, `CredentialRevoked`.
    """
    key = public_key(await asyncio.to_thread(own_seed, settings.data_dir))
    answer = await client.request(RenewCredential(gateway_id=settings.gateway_id, public_key=key))
    return await asyncio.to_thread(_keep, settings, answer)


async def _renewed_by_signature(settings: Settings, client: BusClient) -> Enrolment:
    """Signs by the services' time as soon as it is known: the clock of a device that was off for long may be wrong."""
    try:
        return await client.request(await asyncio.to_thread(_statement, settings, client.clock_ahead))
    except NotReady:
        if client.clock_ahead is None or abs(client.clock_ahead) < STATEMENT_AGE:
            raise
        return await client.request(await asyncio.to_thread(_statement, settings, client.clock_ahead))


def _statement(settings: Settings, clock_ahead: timedelta | None) -> RenewExpiredCredential:
    seed = own_seed(settings.data_dir)
    bare = RenewExpiredCredential(
        gateway_id=settings.gateway_id,
        public_key=public_key(seed),
        signed_at=utc_now() - (clock_ahead or timedelta()),
    )
    return bare.model_copy(update={"signature": base64.b64encode(sign(seed, bare.statement)).decode()})


def _enrolment(settings: Settings) -> EnrolGateway:
    return EnrolGateway(
        gateway_id=settings.gateway_id,
        blueprint=settings.blueprint,
        labels=settings.labels,
        public_key=public_key(own_seed(settings.data_dir)),
        token=_token(settings.enrolment_token),
    )


@asynccontextmanager
async def _bootstrap(settings: Settings) -> AsyncIterator[BusClient]:
    """Connects as the user that all gateways without a credential share."""
    client = await BusClient.connect(
        settings,
        name=settings.gateway_id,
        patient=False,
        user_credentials=str(settings.enrol_creds),
        inbox_prefix=inbox(ENROL_USER).encode(),
    )
    try:
        yield client
    finally:
        await client.close()


def _keep(settings: Settings, answer: Enrolment) -> Credentials:
    """Stores an answer. The file before stays until the new one is on the disk. Raises `Denied`, `DiskFull`."""
    seed = own_seed(settings.data_dir)
    if GatewayClaims.of(answer.jwt).public_key != public_key(seed):
        raise Denied(f"the credential for {settings.gateway_id} is for another key")
    with raise_disk_full("to store the credentials", settings.data_dir):
        _write_private(_jwt_file(settings), answer.jwt)
    return Credentials(_identity(settings, answer.blueprint), seed, answer.jwt)


def _identity(settings: Settings, blueprint: str) -> Identity:
    return Identity(gateway_id=settings.gateway_id, blueprint=blueprint, labels=settings.labels)


def _jwt_file(settings: Settings) -> Path:
    return settings.data_dir / "user.jwt"


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

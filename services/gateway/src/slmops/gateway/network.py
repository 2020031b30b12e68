"""The gateway's connection: enrols, connects, renews the credential before it expires, and connects again.

The gateway serves meanwhile, whatever happens here. Nothing is lost when the connection is replaced: messages wait in
the spool until they are acknowledged, and the plan is read again at every connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Any

from slmops.contracts.errors import (
    CredentialRevoked,
    CredentialsRefused,
    PermanentError,
    Problem,
    SlmopsError,
    TemporaryError,
)
from slmops.gateway import identity, renewal
from slmops.gateway.identity import Credentials
from slmops.gateway.settings import Settings
from slmops.kit.bus.client import BusClient
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.clock import utc_now

log = logging.getLogger("slmops.gateway")
_ENROL_AGAIN_EVERY_S = 15.0
_CONNECT_AGAIN_S = 1.0
_LOOK_EVERY_S = 3600.0
"""How often the clock is looked at while the credential is not due: it may have been corrected."""
_RENEW_AGAIN_S = 60.0
_LEAST_S = 30.0
"""Least time between two renewals, should the service answer a move with the blueprint before."""
Work = Callable[[BusClient], Sequence[Coroutine[Any, Any, None]]]


class Network:
    """Runs `work` on each connection. `adopted` is called with new credentials before their first use."""

    def __init__(self, settings: Settings, work: Work, adopted: Callable[[Credentials], None]) -> None:
        self._settings = settings
        self._work = work
        self._adopted = adopted
        self._renew_now = asyncio.Event()
        self._blueprint = settings.blueprint
        self._renewed_at = -_LEAST_S
        self._refusals = 0
        self.client: BusClient | None = None
        self.refused: Problem | None = None
        """Why the services refuse this gateway; None while they do not."""

    def belongs_to(self, blueprint: str) -> None:
        """Renews the credential if it is for another blueprint: an admin moved this gateway."""
        if blueprint != self._blueprint:
            log.info("this gateway was moved to %s; renewing its credentials", blueprint)
            self._renew_now.set()

    async def run(self) -> None:
        """Runs until cancelled. Retries without limit while the gateway serves.

        Connects again when the connection is closed for good, which the client never repairs: the server closes it when
        it rejects the credentials, also when they expire, or after a protocol error. Raises `PermanentError` if a
        gateway that was never enrolled is refused.
        """
        credentials = await self._enrolled()
        while True:
            self.client, credentials = await self._connected(credentials)
            self.refused, self._refusals = None, 0
            renewing = asyncio.create_task(self._renewed(self.client, credentials))
            tasks = [
                renewing,
                *(asyncio.create_task(part) for part in self._work(self.client)),
                asyncio.create_task(_closed(self.client)),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await cancel_and_wait(tasks)
            if renewing in done:
                credentials = renewing.result()
                await self.client.close()
                log.info("credentials renewed until %s", credentials.claims.expires_at)
            else:
                log.warning("the connection to the bus was closed; connecting again")
                await asyncio.sleep(_CONNECT_AGAIN_S)
                credentials = await self._enrolled()

    async def _enrolled(self) -> Credentials:
        while True:
            try:
                return self._adopt(await identity.enrol(self._settings))
            except CredentialRevoked as error:
                await self._wait_refused(error)
            except TemporaryError as error:
                log.warning("could not enrol, retrying: %s", error)
                await asyncio.sleep(error.delay.total_seconds())

    def _adopt(self, credentials: Credentials) -> Credentials:
        self._blueprint = credentials.identity.blueprint
        self._adopted(credentials)
        return credentials

    async def _connected(self, credentials: Credentials) -> tuple[BusClient, Credentials]:
        while True:
            try:
                return await credentials.connect(self._settings), credentials
            except CredentialsRefused as error:
                log.warning("%s; asking for new ones", error)
                credentials = await self._readmitted(credentials)
            except TemporaryError as error:
                log.warning("no network: %s", error)
                await asyncio.sleep(error.delay.total_seconds())

    async def _readmitted(self, refused: Credentials) -> Credentials:
        """Asks for new credentials for the same key: they expired, or the keys of the bus changed. If that fails, waits
        and returns `refused`, so that the caller retries: the gateway keeps serving although the bus refuses it."""
        try:
            return self._adopt(await identity.readmit(self._settings))
        except CredentialRevoked as error:
            await self._wait_refused(error)
        except SlmopsError as error:
            log.warning("could not get new credentials, retrying: %s", error)
            self.refused = Problem.of(error) if isinstance(error, PermanentError) else self.refused
            await asyncio.sleep(_ENROL_AGAIN_EVERY_S)
        return refused

    async def _wait_refused(self, error: CredentialRevoked) -> None:
        """Logs that this gateway is revoked, and waits: only an admin can change it."""
        self.refused = Problem.of(error)
        pause = renewal.patience(self._refusals).total_seconds() * random.uniform(0.75, 1.25)
        self._refusals += 1
        log.error("the fleet refuses this gateway, which keeps serving: %s. Asking again in %.0f s", error, pause)
        await asyncio.sleep(pause)

    # ---- renewal ------------------------------------------------------------------------------------------

    async def _renewed(self, client: BusClient, credentials: Credentials) -> Credentials:
        """Returns new credentials when they are due or the gateway was moved."""
        connected_at = _services_time(client)
        while True:
            await self._wait_until(renewal.due(credentials.claims, connected_at), client)
            try:
                found = self._adopt(await identity.renew(self._settings, client))
            except SlmopsError as error:
                # The server closes the connection of a gateway that was revoked. Until then, ask seldom.
                seldom = isinstance(error, PermanentError)
                self.refused = Problem.of(error) if seldom else self.refused
                log.warning("could not renew the credentials, retrying: %s", error)
                await asyncio.sleep((_LOOK_EVERY_S if seldom else _RENEW_AGAIN_S) * random.uniform(0.75, 1.25))
            else:
                self._renew_now.clear()
                self._renewed_at = time.monotonic()
                return found

    async def _wait_until(self, due: datetime, client: BusClient) -> None:
        while not self._renew_now.is_set() and (left := (due - _services_time(client)).total_seconds()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._renew_now.wait(), min(left, _LOOK_EVERY_S))
        await asyncio.sleep(max(0.0, self._renewed_at + _LEAST_S - time.monotonic()))


def _services_time(client: BusClient) -> datetime:
    """Returns the time by the services' clock, as far as it is known."""
    return utc_now() - (client.clock_ahead or timedelta())


async def _closed(client: BusClient) -> None:
    await client.closed.wait()

"""Compares the server's accounts with the store and pushes those that differ.

It is level-triggered: what was missed while the server or this service did not run is pushed at the next comparison.
The server disconnects the users of a key that a pushed account revokes, and keeps the account in a folder of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path

from nats.errors import Error as NatsError

from slmops.access import store
from slmops.access.domain import with_moved
from slmops.access.store import Holders
from slmops.contracts.errors import (
    InternalError,
    InvalidMessage,
    MessageTooLarge,
    SlmopsError,
    TemporaryError,
    Unreachable,
)
from slmops.kit.bus.access_keys import AccessKeys
from slmops.kit.bus.accounts import Claims, account_claims
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.exchange import HEADER_ROOM_BYTES
from slmops.kit.bus.nats_auth import account_jwts, claims_of
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal
from slmops.kit.settings import BusSettings

log = logging.getLogger("slmops.access")
_ANSWER_WITHIN_S = 10.0
_GATHER_S = 10.0
"""How long moves of gateways are gathered, because each comparison may push a megabyte."""
_KEY_BYTES = 96
"""Size of one revoked key in an account's JWT: `"U…":1700000000,` in base64."""


async def _nothing() -> None: ...


class Accounts:
    """One comparison runs at a time. `open` connects to the server's own account; `run` compares until cancelled."""

    def __init__(
        self,
        journal: Journal,
        keys: Callable[[], AccessKeys],
        settings: BusSettings,
        system_creds: Path,
        clock: Clock,
        compare_every: timedelta,
    ) -> None:
        self._journal = journal
        self._keys = keys
        self._settings = settings.model_copy(update={"nats_creds": system_creds})
        self._clock = clock
        self._every = compare_every
        self._changed = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self.read: Callable[[], Awaitable[None]] = _nothing
        """Reads the revocations that the store lacks. Awaited before each comparison, which would otherwise remove them
        from the server's accounts."""
        self._client: BusClient | None = None

    async def open(self) -> None:
        """Connects. Raises `Unreachable`, `CredentialsRefused`, `InvalidMessage`."""
        self._client = await BusClient.connect(self._settings, name="access-system")
        self._client.on_reconnect(self.changed)

    async def close(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
        if self._client is not None:
            await self._client.close()

    def changed(self) -> None:
        """Makes `run` compare soon."""
        self._changed.set()

    def changes_soon(self) -> None:
        """Makes `run` compare within ten seconds, once for all changes until then."""
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(_GATHER_S, self._gathered)

    def _gathered(self) -> None:
        self._gathering = None
        self.changed()

    async def run(self) -> None:
        """Compares at once, at every change and reconnection, and regularly; until cancelled."""
        self._changed.set()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._every.total_seconds())
            self._changed.clear()
            try:
                await self._journal.transact(lambda unit: store.forget_expired(unit.connection, self._clock()))
                await self.reconcile()
            except TemporaryError as error:
                log.warning("could not compare the server's accounts, retrying: %s", error)
                await asyncio.sleep(error.delay.total_seconds())
                self._changed.set()
            except (MessageTooLarge, InternalError) as error:
                log.error("%s", error)

    async def reconcile(self) -> int:
        """Pushes the accounts that differ from the server's; returns their number. O(revoked keys).

        Raises `Unreachable`, and `MessageTooLarge` if an account has too many revoked keys for a message.
        """
        async with self._lock:
            await self.read()
            wanted = await self._wanted()
            different = {key: one for key, one in wanted.items() if await self._held(key) != one[1]}
            failed: list[SlmopsError] = []
            for key, jwt in account_jwts(self._keys().signing_key, different).items():
                try:
                    await self._push(key, jwt)
                except SlmopsError as error:  # one account must not hold up the others
                    failed.append(error)
            if failed:
                raise failed[0]
            return len(different)

    async def revoked_people(self) -> Mapping[str, int]:
        """Returns the keys of people that the server refuses, with their times. Raises `Unreachable`."""
        claims = await self._held(self._keys().accounts.people)
        return (claims or {}).get("revocations") or {}

    async def _wanted(self) -> dict[str, tuple[str, Claims]]:
        now = self._clock()
        people, gateways, moved = await self._journal.read(
            lambda c: tuple(store.revoked_keys(c, holders, now) for holders in Holders)
        )
        keys = self._keys().accounts
        wanted = account_claims(keys, people=people, gateways=gateways)
        if not moved:
            return wanted
        [size] = (len(jwt) for jwt in account_jwts(self._keys().signing_key, {keys.edge: wanted[keys.edge]}).values())
        room = max(0, self._limit_bytes() - size) // _KEY_BYTES
        if len(moved) > room:
            log.warning("no room in the gateways' account for %s of %s moved gateways", len(moved) - room, len(moved))
        return account_claims(keys, people=people, gateways=with_moved(gateways, moved, room))

    async def _held(self, account: str) -> Claims | None:
        """Returns the claims by which the server knows an account; None if it does not know the account."""
        jwt = await self._ask(f"$SYS.REQ.ACCOUNT.{account}.CLAIMS.LOOKUP", b"")
        try:
            claims: Claims = claims_of(jwt.decode())["nats"]
        except (ValueError, KeyError):
            return None
        return claims

    async def _push(self, account: str, jwt: str) -> None:
        limit = self._limit_bytes()
        if len(jwt) > limit:
            raise MessageTooLarge(
                f"the account has {len(jwt)} bytes with its revoked keys, and the bus takes {limit}",
                where=account,
                fix="Raise max_payload of the bus. Until then the newest revocations are not enforced.",
            )
        answer = await self._ask(f"$SYS.REQ.ACCOUNT.{account}.CLAIMS.UPDATE", jwt.encode())
        try:
            refused = json.loads(answer).get("error")
        except ValueError as error:
            raise InvalidMessage("the server's answer to an account is not JSON", where=account) from error
        if refused:
            raise InternalError(f"the server refuses the account: {refused.get('description')}", where=account)
        log.info("the server has account %s with its revoked keys", account)

    def _limit_bytes(self) -> int:
        assert self._client is not None, "opened"
        return self._client.connection.max_payload - HEADER_ROOM_BYTES

    async def _ask(self, subject: str, payload: bytes) -> bytes:
        assert self._client is not None, "opened"
        try:
            return bytes((await self._client.connection.request(subject, payload, timeout=_ANSWER_WITHIN_S)).data)
        except (TimeoutError, NatsError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"the server did not take an account: {reason}", where=subject) from error

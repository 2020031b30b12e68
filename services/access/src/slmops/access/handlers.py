"""Handles the commands about people, and the revoked keys of gateways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy import Connection

from slmops.access import store
from slmops.access.accounts import Accounts
from slmops.access.domain import Person, add, renew, revoke
from slmops.contracts.commands import AddUser, ListUsers, RenewUser, RevokeUser, UserCredential, UserList, UserView
from slmops.contracts.errors import Denied, TemporaryError, Unreachable
from slmops.contracts.events import Event, GatewayEnrolled, GatewayRevoked, UserRevoked
from slmops.contracts.identity import Actor, person
from slmops.kit.acting import current_actor
from slmops.kit.bus.access_keys import AccessKeys
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import check_user_key, person_jwt
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork

_PAGE = 200
E = TypeVar("E", bound=Event)


class Handlers:
    """The access service's handlers. `lifetime` is how long a person's credentials are valid."""

    def __init__(
        self, journal: Journal, accounts: Accounts, keys: Callable[[], AccessKeys], clock: Clock, lifetime: timedelta
    ) -> None:
        self._journal = journal
        self._accounts = accounts
        self._keys = keys
        self._clock = clock
        self._lifetime = lifetime
        self._people = self._gateways = 0  # the last sequences of revocations that were read

    # ---- events -------------------------------------------------------------------------------------------

    async def on_gateway_revoked(self, event: GatewayRevoked, delivered: MessageContext) -> None:
        """Records a gateway's revoked key. `Accounts.run` pushes it to the server soon."""
        await self._journal.transact(lambda unit: store.record_gateway(unit.connection, event))
        self._accounts.changed()

    async def on_gateways_enrolled(self, batch: Batch[GatewayEnrolled]) -> Refused:
        """Records which gateways were moved. Their credentials for the blueprint before are refused soon."""
        moved = [received.body for received in batch if received.body.moved_from is not None]
        if moved:
            await self._record(moved, store.record_moved)
            self._accounts.changes_soon()
        return {}

    async def read_revocations(self, client: BusClient) -> None:
        """Records the stored revocations that were not read here yet: those whose delivery failed, and after a loss of
        the database all. Growth: the new ones; at a start all, and after a loss of the database all enrolments.

        Raises `Unreachable`.
        """
        self._people = await self._read(client, UserRevoked, UserRevoked.type, store.record_person, self._people)
        pattern = f"{GatewayRevoked.type}.*.*"
        self._gateways = await self._read(client, GatewayRevoked, pattern, store.record_gateway, self._gateways)
        # The stream of enrolments has a message for each gateway, so it is read only once.
        if not await self._journal.read(lambda connection: store.was_read(connection, GatewayEnrolled.type)):
            await self._read(client, GatewayEnrolled, f"{GatewayEnrolled.type}.*", store.record_moved, 0)
            await self._journal.transact(lambda unit: store.set_read(unit.connection, GatewayEnrolled.type))

    async def _read(
        self, client: BusClient, kind: type[E], pattern: str, record: Callable[[Connection, E], None], after: int
    ) -> int:
        """Records the stored events of a kind after a sequence, in pages. Returns the last sequence."""
        page: list[E] = []
        async for sequence, _subject, data in client.stored(pattern, after):
            after = sequence
            with suppress(ValidationError):  # its consumer dead-letters it
                page.append(kind.model_validate_json(data))
            if len(page) >= _PAGE:
                await self._record(page, record)
                page = []
        await self._record(page, record)
        return after

    async def _record(self, page: Sequence[E], record: Callable[[Connection, E], None]) -> None:
        def work(unit: UnitOfWork) -> None:
            for event in page:
                record(unit.connection, event)

        if page:
            await self._journal.transact(work)

    # ---- commands -----------------------------------------------------------------------------------------

    async def add_user(self, command: AddUser) -> UserCredential:
        """Raises `AlreadyExists` for somebody with another key or role, `InvalidMessage` for an invalid key."""
        check_user_key(command.public_key)

        def work(unit: UnitOfWork) -> tuple[Person, datetime]:
            now = self._clock()
            known, version = store.load(unit, command.user)
            unit.append(store.stream(command.user), version, add(known, command, now + self._lifetime, now))
            return _present(unit, command.user), now

        return self._credential(*await self._journal.transact(work))

    async def renew_user(self, _command: RenewUser) -> UserCredential:
        """Raises `NotFound` for a sender who was never added."""
        sender = _sender()

        def work(unit: UnitOfWork) -> tuple[Person, datetime]:
            now = self._clock()
            known, version = store.load(unit, sender.name)
            unit.append(store.stream(sender.name), version, renew(known, sender.name, now + self._lifetime, now))
            return _present(unit, sender.name), now

        return self._credential(*await self._journal.transact(work))

    async def revoke_user(self, command: RevokeUser) -> UserView:
        """Returns when the server has been told. Raises `NotFound`, `Denied` for the last admin, `Unreachable`."""

        def work(unit: UnitOfWork) -> UserView:
            now = self._clock()
            known, version = store.load(unit, command.user)
            others = store.other_admins(unit.connection, command.user, now)
            unit.append(store.stream(command.user), version, revoke(known, command, others, now))
            return store.view(unit.connection, command.user)

        view = await self._journal.transact(work)
        try:
            await self._accounts.reconcile()
        except TemporaryError as error:
            self._accounts.changed()
            raise Unreachable(
                f"{command.user} is revoked, but the bus does not enforce it yet: {error.what}",
                fix="No action needed: the access service retries until the bus accepts it.",
            ) from error
        return view

    # ---- queries ------------------------------------------------------------------------------------------

    async def list_users(self, query: ListUsers) -> UserList:
        found = await self._journal.read(lambda c: store.page(c, query.cursor or "", query.limit + 1))
        more = len(found) > query.limit
        users = tuple(found[: query.limit])
        return UserList(users=users, cursor=users[-1].user if more else None)

    def _credential(self, of: Person, decided_at: datetime) -> UserCredential:
        """Signs as of the decision: a revocation after it refuses this credential, whenever it is signed."""
        who = person(of.user, of.role)
        keys = self._keys()
        jwt = person_jwt(keys.roles[of.role], keys.accounts.people, of.public_key, who, of.expires_at, decided_at)
        return UserCredential(user=of.user, role=of.role, jwt=jwt, expires_at=of.expires_at)


def _present(unit: UnitOfWork, user: str) -> Person:
    found, _ = store.load(unit, user)
    assert found is not None, "just decided"
    return found


def _sender() -> Actor:
    sender = current_actor()
    if sender is None or sender.role is None:
        raise Denied("only a person has credentials to renew")
    return sender


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(GatewayRevoked, handlers.on_gateway_revoked)
    bus.on_batches(GatewayEnrolled, handlers.on_gateways_enrolled)
    bus.serve(AddUser, handlers.add_user)
    bus.serve(RenewUser, handlers.renew_user)
    bus.serve(RevokeUser, handlers.revoke_user)
    bus.serve(ListUsers, handlers.list_users)

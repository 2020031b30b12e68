"""Enrols gateways, renews their credentials, and carries out what operators decide about single gateways.

Every decision is made in the transaction that records it, so two processes of this service cannot decide differently.
"""

from __future__ import annotations

from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import NamedTuple

from slmops.contracts.commands import (
    EnrolGateway,
    Enrolment,
    GatewayRemoval,
    GatewayView,
    MoveGateway,
    ReenrolGateway,
    RemoveGateway,
    RenewCredential,
    RenewExpiredCredential,
    RevokeGateway,
)
from slmops.contracts.commands.gateways import STATEMENT_AGE
from slmops.contracts.errors import Denied, NotFound, NotReady
from slmops.contracts.events import Event, GatewayEnrolled
from slmops.kit.bus.nats_auth import is_signed
from slmops.kit.bus.service_bus import Bus
from slmops.kit.bus.throttle import Throttle
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import enrolment, inventory_rows, membership_rows, store
from slmops.rollout.domain import membership as domain
from slmops.rollout.domain.membership import LastCredential, Membership
from slmops.rollout.domain.views import gateway_view
from slmops.rollout.overlays import Overlays
from slmops.rollout.reconcile import Reconciler

Decide = Callable[[Membership, LastCredential, datetime], list[Event]]


class _Granted(NamedTuple):
    enrolled: GatewayEnrolled
    at: datetime


class MembershipHandlers:
    def __init__(
        self,
        journal: Journal,
        reconciler: Reconciler,
        overlays: Overlays,
        credentials: enrolment.Enrolment,
        enrolment_of: Callable[[str], Awaitable[GatewayEnrolled | None]],
        clock: Clock,
    ) -> None:
        self._journal = journal
        self._reconciler = reconciler
        self._overlays = overlays
        self._credentials = credentials
        self._enrolment_of = enrolment_of
        self._clock = clock

    # ---- requests of gateways -----------------------------------------------------------------------------

    async def enrol(self, command: EnrolGateway) -> Enrolment:
        """Enrols a gateway.

        Raises `Denied` for a wrong token or another key, `CredentialRevoked`, `AlreadyExists` for another blueprint.
        """
        self._credentials.check(command)
        life = self._credentials.life
        return await self._grant(
            command.gateway_id, lambda member, last, now: domain.enrol(member, command, now, now + life, last)
        )

    async def renew(self, command: RenewCredential) -> Enrolment:
        """Renews the credential of a connected gateway. Raises `NotFound`, `Denied`, `CredentialRevoked`."""
        return await self._renew(command.gateway_id, command.public_key)

    async def renew_expired(self, command: RenewExpiredCredential) -> Enrolment:
        """Renews a credential by a signature of its key.

        Raises `NotReady` for a statement that is too old or too far ahead, `Denied` for one that the key did not sign,
        and as `renew`. A wrong time is not counted as a rejection, because many devices of a site may have it.
        """
        age = self._clock() - command.signed_at
        if abs(age) > STATEMENT_AGE:
            raise NotReady(
                f"the statement of {command.gateway_id} is {age.total_seconds():.0f} s old",
                fix="Sign it by the services' time, which every answer states.",
            )
        if not is_signed(command.public_key, command.statement, _signature(command)):
            raise Denied(f"the statement of {command.gateway_id} is not signed by the key that it names")
        return await self._renew(command.gateway_id, command.public_key)

    async def _renew(self, gateway_id: str, public_key: str) -> Enrolment:
        life = self._credentials.life
        return await self._grant(
            gateway_id, lambda member, _last, now: domain.renew(member, public_key, now, now + life)
        )

    async def _grant(self, gateway_id: str, decide: Decide) -> Enrolment:
        """Decides, records and signs. The signature's time is that of the decision, so a later revocation covers it."""
        elsewhere = await self._known_elsewhere(gateway_id)

        def work(unit: UnitOfWork) -> _Granted:
            now, member = self._clock(), membership_rows.load(unit, gateway_id)
            if member.state is domain.State.UNKNOWN and elsewhere is not None:
                membership_rows.project(unit.connection, elsewhere)
                member = membership_rows.load(unit, gateway_id)
            last = membership_rows.last_credential(unit.connection, gateway_id)
            member = membership_rows.commit(unit, member, decide(member, last, now))
            assert member.enrolled is not None, "whoever is not enrolled is refused"
            membership_rows.record_credential(unit.connection, gateway_id, now, now + self._credentials.life)
            return _Granted(member.enrolled, now)

        enrolled, now = await self._journal.transact(work)
        jwt = self._credentials.sign(enrolled, now)
        return Enrolment(gateway_id=gateway_id, blueprint=enrolled.blueprint, jwt=jwt)

    async def _known_elsewhere(self, gateway_id: str) -> GatewayEnrolled | None:
        """Returns the enrolment on the bus of a gateway that our database does not know: it may be younger."""
        if await self._journal.read(lambda connection: membership_rows.exists(connection, gateway_id)):
            return None
        return await self._enrolment_of(gateway_id)

    # ---- commands of operators ----------------------------------------------------------------------------

    async def revoke(self, command: RevokeGateway) -> GatewayView:
        return await self._change(
            command.gateway_id, lambda member, last, now: domain.revoke(member, command.reason, last, now)
        )

    async def reenrol(self, command: ReenrolGateway) -> GatewayView:
        return await self._change(
            command.gateway_id, lambda member, _last, now: domain.allow_reenrolment(member, command, now)
        )

    async def move(self, command: MoveGateway) -> GatewayView:
        """Moves a gateway. Raises `NotFound`, also for a blueprint that was not applied, and `IllegalTransition`."""
        name = command.blueprint
        if await self._journal.read(lambda connection: store.plan_row(connection, name)) is None:
            raise NotFound(f"there is no blueprint named {name}", fix="Apply it first: slmops blueprint apply FILE.")
        return await self._change(command.gateway_id, lambda member, _last, now: domain.move(member, name, now))

    async def remove(self, command: RemoveGateway) -> GatewayRemoval:
        def work(unit: UnitOfWork) -> Membership:
            return self._decided(
                unit, command.gateway_id, lambda m, last, now: domain.remove(m, command.reason, last, now)
            )

        gone = (await self._journal.transact(work)).removed
        assert gone is not None, "whoever was never enrolled is not found"
        await self._left(gone.blueprint)
        return GatewayRemoval(gateway_id=gone.gateway_id, blueprint=gone.blueprint, at=gone.at)

    async def _change(self, gateway_id: str, decide: Decide) -> GatewayView:
        """Decides and records a change, tells the bus, and returns the gateway as it is then."""

        def work(unit: UnitOfWork) -> GatewayView:
            self._decided(unit, gateway_id, decide)
            member = inventory_rows.one(unit.connection, gateway_id)
            assert member is not None, "whoever is not enrolled is not found"
            plan = store.plan_in(store.plan_row(unit.connection, member.identity.blueprint))
            return gateway_view(member, plan, self._clock())

        view = await self._journal.transact(work)
        await self._left(view.blueprint)
        return view

    def _decided(self, unit: UnitOfWork, gateway_id: str, decide: Decide) -> Membership:
        member = membership_rows.load(unit, gateway_id)
        last = membership_rows.last_credential(unit.connection, gateway_id)
        return membership_rows.commit(unit, member, decide(member, last, self._clock()))

    async def _left(self, blueprint: str) -> None:
        """Acts on a change at once. If the bus is unreachable, the next tick repeats it."""
        await self._overlays.tell()
        self._reconciler.mark([blueprint])


def _signature(command: RenewExpiredCredential) -> bytes:
    try:
        return b64decode(command.signature, validate=True)
    except NotBase64:
        return b""


def routes(bus: Bus, handlers: MembershipHandlers) -> None:
    # All gateways without a credential share one user, so what is rejected is limited by the sender's address.
    bus.serve(EnrolGateway, handlers.enrol, Throttle())
    bus.serve(RenewExpiredCredential, handlers.renew_expired, Throttle())
    bus.serve(RenewCredential, handlers.renew)
    bus.serve(RevokeGateway, handlers.revoke)
    bus.serve(RemoveGateway, handlers.remove)
    bus.serve(ReenrolGateway, handlers.reenrol)
    bus.serve(MoveGateway, handlers.move)

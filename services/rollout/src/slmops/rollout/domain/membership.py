"""Who belongs to the fleet: the life of one gateway under its id, and the decisions about its key and its blueprint.

Invariants
1. One key at a time: a new one under a known id needs an admin's consent, and revokes the one before.
2. A revoked key never gets a credential again, unless an admin allows this key itself to return.
3. A gateway counts for the blueprint of its credential. From the order to move until it has the new credential, it
   counts for none.

A command whose result already exists causes no event, so a retry does not act twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import reduce
from typing import Any, Final, NamedTuple

from slmops.contracts.commands import EnrolGateway, ReenrolGateway
from slmops.contracts.errors import AlreadyExists, CredentialRevoked, Denied, IllegalTransition, NotFound, NotReady
from slmops.contracts.events import (
    Event,
    GatewayEnrolled,
    GatewayMoved,
    GatewayReenrolmentAllowed,
    GatewayRemoved,
    GatewayRevoked,
)


class State(StrEnum):
    UNKNOWN = "unknown"
    ENROLLED = "enrolled"
    MOVING = "moving"
    REVOKED = "revoked"
    REMOVED = "removed"


class Trigger(StrEnum):
    ENROL = "enrol"
    ALLOW_REENROLMENT = "allow_reenrolment"
    MOVE = "move"
    MOVE_BACK = "move_back"
    REVOKE = "revoke"
    REMOVE = "remove"


TRANSITIONS: Final[dict[tuple[State, Trigger], State]] = {
    (State.UNKNOWN, Trigger.ENROL): State.ENROLLED,
    (State.ENROLLED, Trigger.ALLOW_REENROLMENT): State.ENROLLED,
    (State.ENROLLED, Trigger.MOVE): State.MOVING,
    (State.ENROLLED, Trigger.REVOKE): State.REVOKED,
    (State.MOVING, Trigger.ENROL): State.ENROLLED,
    (State.MOVING, Trigger.ALLOW_REENROLMENT): State.MOVING,
    (State.MOVING, Trigger.MOVE): State.MOVING,
    (State.MOVING, Trigger.MOVE_BACK): State.ENROLLED,
    (State.MOVING, Trigger.REVOKE): State.REVOKED,
    # Its key or another one, with an admin's consent.
    (State.REVOKED, Trigger.ENROL): State.ENROLLED,
    (State.REVOKED, Trigger.ALLOW_REENROLMENT): State.REVOKED,
    (State.REVOKED, Trigger.REMOVE): State.REMOVED,
    # Another device under the free id.
    (State.REMOVED, Trigger.ENROL): State.ENROLLED,
}


def next_state(state: State, trigger: Trigger) -> State:
    """Returns the next state. Raises `IllegalTransition` with the allowed triggers."""
    found = TRANSITIONS.get((state, trigger))
    if found is None:
        allowed = ", ".join(t for s, t in TRANSITIONS if s is state)
        raise IllegalTransition(f"a gateway that is {state} does not allow {trigger}", fix=f"Allowed now: {allowed}.")
    return found


class LastCredential(NamedTuple):
    """When the newest credential of a key was issued, and when its last one expires; None: never, or not known."""

    issued_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class Membership:
    """The life of a gateway, computed from its stream. `enrolled` is its newest enrolment, None if it has none now.

    `enrolments` counts all enrolments under the id. `earlier`: blueprints to which the id belonged since it was last
    free. `revoked_keys` maps each key that was ever revoked to the time.
    """

    gateway_id: str
    version: int = 0
    state: State = State.UNKNOWN
    enrolled: GatewayEnrolled | None = None
    enrolments: int = 0
    earlier: frozenset[str] = frozenset()
    moving_to: str | None = None
    revoked: GatewayRevoked | None = None
    revoked_keys: tuple[tuple[str, datetime], ...] = ()
    consent: GatewayReenrolmentAllowed | None = None
    removed: GatewayRemoved | None = None

    @property
    def belongs_to(self) -> str | None:
        """The blueprint of its next credential."""
        return self.moving_to or (self.enrolled.blueprint if self.enrolled else None)

    def revoked_at(self, public_key: str) -> datetime | None:
        return dict(self.revoked_keys).get(public_key)

    def allows(self, public_key: str, now: datetime) -> bool:
        """Returns whether an admin allowed this key, now."""
        consent = self.consent
        if consent is None or self.enrolled is None or now >= consent.until:
            return False
        return (public_key == self.enrolled.public_key) == consent.same_key


def replay(gateway_id: str, events: Iterable[Event]) -> Membership:
    return reduce(evolve, events, Membership(gateway_id))


def evolve(member: Membership, event: Event) -> Membership:
    """Returns the membership after `event`. Raises `IllegalTransition` for an impossible history."""
    member = replace(member, version=member.version + 1)
    changes: dict[str, Any] = {}
    match event:
        case GatewayEnrolled():
            trigger = Trigger.ENROL
            earlier = member.earlier | {event.blueprint} if member.enrolled else frozenset({event.blueprint})
            changes = {"enrolled": event, "enrolments": event.enrolment, "earlier": earlier}
            changes |= {"moving_to": None, "revoked": None, "consent": None, "removed": None}
        case GatewayMoved():
            back = member.enrolled is not None and event.blueprint == member.enrolled.blueprint
            trigger = Trigger.MOVE_BACK if back else Trigger.MOVE
            changes = {"moving_to": None if back else event.blueprint, "earlier": member.earlier | {event.blueprint}}
        case GatewayReenrolmentAllowed():
            trigger = Trigger.ALLOW_REENROLMENT
            changes = {"consent": event}
        case GatewayRevoked():
            trigger = Trigger.REVOKE
            keys = dict(member.revoked_keys) | {event.public_key: event.revoked_at}
            changes = {"revoked": event, "revoked_keys": tuple(keys.items())}
        case GatewayRemoved():
            trigger = Trigger.REMOVE
            changes = {"enrolled": None, "moving_to": None, "revoked": None, "consent": None, "removed": event}
        case _:
            raise IllegalTransition(f"the stream of gateway {member.gateway_id} contains an unexpected {event.type}")
    return replace(member, state=next_state(member.state, trigger), **changes)


# ---- a gateway's own requests -----------------------------------------------------------------------------


def enrol(
    member: Membership, command: EnrolGateway, now: datetime, expires_at: datetime, last: LastCredential
) -> list[Event]:
    """Decides an enrolment with the right token. No event: the key is enrolled already, and gets its credential again.

    `expires_at`: of the credential that it would get; `last`: the last credential of the key before.
    Raises `CredentialRevoked`, `Denied` for another key, `AlreadyExists` for another blueprint, `NotReady`.
    """
    key, known = command.public_key, member.enrolled
    if known is not None and command.blueprint not in member.earlier:
        raise AlreadyExists(
            f"{member.gateway_id} is enrolled under blueprint {member.belongs_to}, not {command.blueprint}",
            fix=f"Choose another gateway id, or move it: slmops gateway move {member.gateway_id}"
            f" --blueprint {command.blueprint}.",
        )
    _check_key(member, key, now)
    gone: list[Event] = []
    if known is not None and known.public_key != key:
        gone = _revocation(member, "another key was enrolled under its id", last, now)
    elif member.state is State.ENROLLED:
        return []
    blueprint = member.belongs_to or command.blueprint
    return [*gone, _enrolment(member, key, blueprint, command.labels, now, expires_at)]


def renew(member: Membership, public_key: str, now: datetime, expires_at: datetime) -> list[Event]:
    """Decides a renewal by the holder of an enrolled key: usually no event; after a move or with consent an enrolment.

    Raises `NotFound` if the gateway is not enrolled, `CredentialRevoked`, `Denied` for another key, `NotReady`.
    """
    known = member.enrolled
    if known is None and member.revoked_at(public_key) is None:
        raise NotFound(f"{member.gateway_id} is not enrolled", fix="Enrol it with the site's token.")
    _check_key(member, public_key, now)
    assert known is not None, "a key without an enrolment is refused above"
    blueprint = member.belongs_to or known.blueprint
    if member.state is State.ENROLLED:
        return []
    return [_enrolment(member, public_key, blueprint, known.labels, now, expires_at)]


def _check_key(member: Membership, key: str, now: datetime) -> None:
    """Raises `CredentialRevoked`, or `Denied` for another key than the enrolled one, unless an admin allowed it."""
    known, revoked_at = member.enrolled, member.revoked_at(key)
    own = known is not None and known.public_key == key
    if revoked_at is not None and (member.revoked is not None or not own):
        if not (own and member.allows(key, now)):
            raise _was_revoked(member, key, revoked_at)
        if int(now.timestamp()) <= revoked_at.timestamp():
            # The server refuses credentials that were issued in the second of the revocation.
            raise NotReady(f"{member.gateway_id} was revoked in this second", delay=timedelta(seconds=1))
    if known is not None and not own and not member.allows(key, now):
        raise Denied(
            f"{member.gateway_id} is enrolled with another key",
            fix=f"If the device was set up again, allow its new key: slmops gateway re-enrol {member.gateway_id}."
            " Otherwise choose another gateway id.",
        )


def check_not_revoked(known: GatewayEnrolled, revoked: GatewayRevoked | None) -> None:
    """Raises `CredentialRevoked` if an enrolment that the bus keeps is of a revoked key, for a database that is younger
    than both. The key may have returned since, which is an enrolment in a later second."""
    if revoked is not None and known.at < revoked.revoked_at + timedelta(seconds=1):
        raise CredentialRevoked(
            f"the key of {known.gateway_id} was revoked at {revoked.revoked_at:%Y-%m-%d %H:%M} UTC: {revoked.reason}",
            fix="Set the device up again under another id.",
        )


def _was_revoked(member: Membership, key: str, at: datetime) -> CredentialRevoked:
    name, event = member.gateway_id, member.revoked
    if event is not None and event.public_key == key:
        why = f": {event.reason}" if event.reason else ""
        fix = (
            f"If this device may return: slmops gateway re-enrol {name} --same-key."
            f" If it was set up again: slmops gateway re-enrol {name}."
        )
    else:
        why, fix = "", "Set the device up again, so that it makes a new key."
    return CredentialRevoked(f"the key of {name} was revoked at {at:%Y-%m-%d %H:%M} UTC{why}", fix=fix)


def _enrolment(
    member: Membership, key: str, blueprint: str, labels: dict[str, str], now: datetime, expires_at: datetime
) -> GatewayEnrolled:
    known = member.enrolled
    moved = known is not None and known.public_key == key and known.blueprint != blueprint
    return GatewayEnrolled(
        gateway_id=member.gateway_id,
        blueprint=blueprint,
        public_key=key,
        labels=labels,
        enrolment=member.enrolments + 1,
        moved_from=known.blueprint if known is not None and moved else None,
        expires_at=expires_at,
        at=now,
    )


# ---- an admin's commands -------------------------------------------------------------------------------


def revoke(member: Membership, reason: str, last: LastCredential, now: datetime) -> list[Event]:
    """Decides a revocation. `last`: the last credential of the key. Raises `NotFound`."""
    _enrolled(member)
    return _revocation(member, reason, last, now)


def remove(member: Membership, reason: str, last: LastCredential, now: datetime) -> list[Event]:
    """Decides a removal, which revokes first. Raises `NotFound` if there never was such a gateway."""
    if member.removed is not None:
        return []
    known = _enrolled(member)
    gone = GatewayRemoved(gateway_id=member.gateway_id, blueprint=known.blueprint, reason=reason, at=now)
    return [*_revocation(member, reason or "removed", last, now), gone]


def allow_reenrolment(member: Membership, command: ReenrolGateway, now: datetime) -> list[Event]:
    """Decides a consent. A new one replaces the one before. Raises `NotFound`, and `IllegalTransition` if the key that
    should return is not revoked."""
    _enrolled(member)
    if command.same_key and member.revoked is None:
        raise IllegalTransition(
            f"the key of {member.gateway_id} is not revoked, so it needs no consent",
            fix=f"For a device that was set up again: slmops gateway re-enrol {member.gateway_id}.",
        )
    until = now + timedelta(seconds=command.within_s)
    return [GatewayReenrolmentAllowed(gateway_id=member.gateway_id, until=until, same_key=command.same_key, at=now)]


def move(member: Membership, blueprint: str, now: datetime) -> list[Event]:
    """Decides a move. Raises `NotFound`, and `IllegalTransition` for a revoked gateway."""
    _enrolled(member)
    if member.revoked is not None:
        next_state(member.state, Trigger.MOVE)
    before = member.belongs_to
    if before is None or before == blueprint:
        return []
    return [GatewayMoved(gateway_id=member.gateway_id, previous=before, blueprint=blueprint, at=now)]


def _revocation(member: Membership, reason: str, last: LastCredential, now: datetime) -> list[Event]:
    if member.enrolled is None or member.revoked is not None:
        return []
    # Another process of this service, whose clock is ahead, may have issued the newest credential.
    at = max(now, last.issued_at) if last.issued_at else now
    return [
        GatewayRevoked(
            gateway_id=member.gateway_id,
            public_key=member.enrolled.public_key,
            revoked_at=at,
            reason=reason,
            expires_at=last.expires_at,
        )
    ]


def _enrolled(member: Membership) -> GatewayEnrolled:
    if member.enrolled is None:
        raise NotFound(f"there is no gateway {member.gateway_id}", fix="List them: slmops gateway ls.")
    return member.enrolled

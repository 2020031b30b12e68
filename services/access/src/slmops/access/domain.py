"""Decides about people: one stream of events per person, and one key at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from slmops.contracts.commands import AddUser, RevokeUser
from slmops.contracts.errors import AlreadyExists, Denied, NotFound
from slmops.contracts.events import Event, UserAdded, UserRenewed, UserRevoked
from slmops.contracts.identity import Role
from slmops.contracts.names import Name


@dataclass(frozen=True)
class Person:
    user: Name
    role: Role
    public_key: str
    expires_at: datetime
    revoked: bool = False

    def active(self, now: datetime) -> bool:
        return not self.revoked and self.expires_at > now


def replay(events: Iterable[Event]) -> Person | None:
    """Returns a person as of their events, oldest first; None if nobody was added."""
    person: Person | None = None
    for event in events:
        if isinstance(event, UserAdded):
            person = Person(event.user, event.role, event.public_key, event.expires_at)
        elif isinstance(event, UserRenewed) and person:
            person = replace(person, expires_at=event.expires_at)
        elif isinstance(event, UserRevoked) and person:
            person = replace(person, revoked=True)
    return person


def add(known: Person | None, command: AddUser, until: datetime, now: datetime) -> list[Event]:
    """Returns nothing if the same key has this role already. Raises `AlreadyExists` for another key or role."""
    if known is not None and known.active(now):
        if (known.role, known.public_key) == (command.role, command.public_key):
            return []
        raise AlreadyExists(
            f"{command.user} has the role {known.role} already, with another key",
            fix=f"Revoke that first: slmops user revoke {command.user}.",
        )
    return [
        UserAdded(user=command.user, role=command.role, public_key=command.public_key, expires_at=until, at=now),
    ]


def renew(known: Person | None, user: Name, until: datetime, now: datetime) -> list[Event]:
    """Raises `NotFound` for somebody who was never added, and `Denied` for one who was revoked."""
    if known is None:
        raise NotFound(f"there is no user {user}", fix="Ask an admin: slmops user add.")
    if known.revoked:
        raise Denied(f"the access of {user} was revoked", fix="Ask an admin: slmops user add.")
    return [UserRenewed(user=user, expires_at=until, at=now)]


def revoke(known: Person | None, command: RevokeUser, other_admins: int, now: datetime) -> list[Event]:
    """Returns nothing for somebody who was revoked already. `other_admins` have credentials besides this person.

    Raises `NotFound`, and `Denied` for the last admin.
    """
    if known is None:
        raise NotFound(f"there is no user {command.user}", fix="List them: slmops user ls.")
    if known.revoked:
        return []
    if known.role is Role.ADMIN and known.active(now) and other_admins == 0:
        raise Denied(
            f"{command.user} is the last admin, and only an admin can add people", fix="Add another admin first."
        )
    return [UserRevoked(user=command.user, public_key=known.public_key, reason=command.reason, at=now)]


def record_first_admin(known: Person | None, given: Person, key_is_revoked: bool, now: datetime) -> list[Event]:
    """Gives the first admin, whom the owner of the system's keys named, this key, and revokes an older one.

    Returns nothing for the same key and expiry. Raises `Denied` for a revoked key.
    """
    if key_is_revoked or (known is not None and known.revoked and known.public_key == given.public_key):
        raise Denied(
            f"the key of the first admin {given.user} was revoked, so it is not added again",
            fix="Run `slmops up`, or the init container of compose, again: it makes a new key for the first admin.",
        )
    if known is not None and not known.revoked and known.public_key == given.public_key and known.role == given.role:
        later = given.expires_at > known.expires_at
        return [UserRenewed(user=given.user, expires_at=given.expires_at, at=now)] if later else []
    found: list[Event] = []
    if known is not None and known.active(now) and known.public_key != given.public_key:
        reason = "replaced by the owner of the system's keys"
        found.append(UserRevoked(user=given.user, public_key=known.public_key, reason=reason, at=now))
    found.append(
        UserAdded(user=given.user, role=given.role, public_key=given.public_key, expires_at=given.expires_at, at=now)
    )
    return found


def with_moved(revoked: Mapping[str, int], moved: Mapping[str, int], room: int) -> dict[str, int]:
    """Returns the keys of gateways that the server should refuse, with the time up to which.

    `room` is how many further keys the account can hold. Revoked keys come first, so a move of a large fleet cannot
    displace them. Of the `moved` ones, which are sorted with the newest first, those without room are left out.
    """
    found = dict(revoked)
    for key, at in moved.items():
        if key in found:
            found[key] = max(found[key], at)
        elif room > 0:
            found[key] = at
            room -= 1
    return found

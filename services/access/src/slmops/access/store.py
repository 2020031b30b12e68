"""The access service's storage: one stream per person, and read tables of people and of revoked keys.

A revoked key stays until its last credentials have expired. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)

from slmops.access.domain import Person, replay
from slmops.contracts.commands import UserView
from slmops.contracts.events import Event, GatewayEnrolled, GatewayRevoked, UserAdded, UserRenewed, UserRevoked
from slmops.contracts.identity import LONGEST_CREDENTIAL_LIFE, Role
from slmops.kit.acting import current_actor
from slmops.kit.journal import UnitOfWork

MIGRATIONS = Path(__file__).parent / "migrations"
_TABLES = MetaData()
_KEEP_AFTER_EXPIRY = timedelta(days=1)
"""The server's clock may be behind ours, and then accepts credentials for longer."""

_people = Table(
    "people",
    _TABLES,
    Column("user", String(63), primary_key=True),
    Column("role", String(20), nullable=False, index=True),
    Column("public_key", String(56), nullable=False),
    Column("added_at", Double, nullable=False),
    Column("added_by", String(140), nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("revoked_at", Double),
    Column("revoked_by", String(140), nullable=False),
    Column("reason", String(200), nullable=False),
)
_revoked = Table(
    "revoked_keys",
    _TABLES,
    Column("public_key", String(56), primary_key=True),
    Column("holders", String(20), primary_key=True),
    Column("revoked_at", BigInteger, nullable=False),  # whole seconds, as in credentials
    Column("expires_at", Double, index=True),  # null: credentials of this key never expire
)
_read_again = Table("read_again", _TABLES, Column("events", String(120), primary_key=True))
"""The kinds of events that this database has read from their stream since it was created."""


class Holders(StrEnum):
    """Whose keys, and why. People and gateways have an account of their own.

    `MOVED` are keys of gateways that were moved to another blueprint. Only the credentials from before the move are
    refused.
    """

    PEOPLE = "people"
    GATEWAYS = "gateways"
    MOVED = "moved"


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def stream(user: str) -> str:
    return f"user:{user}"


def load(unit: UnitOfWork, user: str) -> tuple[Person | None, int]:
    """Returns a person's current state and the version of their stream."""
    events, version = unit.load(stream(user))
    return replay(events), version


def project(connection: Connection, event: Event) -> None:
    match event:
        case UserAdded():
            _add(connection, event)
        case UserRenewed():
            values = {"expires_at": event.expires_at.timestamp()}
            connection.execute(update(_people).where(_people.c.user == event.user).values(values))
        case UserRevoked():
            _revoke(connection, event)


def _add(connection: Connection, event: UserAdded) -> None:
    connection.execute(delete(_people).where(_people.c.user == event.user))
    row = {
        "user": event.user,
        "role": str(event.role),
        "public_key": event.public_key,
        "added_at": event.at.timestamp(),
        "added_by": _actor(),
        "expires_at": event.expires_at.timestamp(),
        "revoked_by": "",
        "reason": "",
    }
    connection.execute(insert(_people), row)


def _revoke(connection: Connection, event: UserRevoked) -> None:
    mine = _people.c.user == event.user
    values = {"revoked_at": event.at.timestamp(), "revoked_by": _actor(), "reason": event.reason}
    until = connection.execute(select(_people.c.expires_at).where(mine)).scalar()
    connection.execute(update(_people).where(mine).values(values))
    record_revoked(connection, Holders.PEOPLE, event.public_key, event.at, until)


def _actor() -> str:
    return str(current_actor() or "")


# ---- revoked keys ------------------------------------------------------------------------------------------


def record_gateway(connection: Connection, event: GatewayRevoked) -> None:
    until = event.expires_at.timestamp() if event.expires_at else None
    record_revoked(connection, Holders.GATEWAYS, event.public_key, event.revoked_at, until)


def record_moved(connection: Connection, event: GatewayEnrolled) -> None:
    """Records that a gateway's credentials from before a move are refused. Ignores other enrolments.

    The server refuses credentials of the recorded second, too. The new credential was issued in the second of the
    enrolment, so the second before is recorded. An old credential of the enrolment's own second stays valid.
    """
    if event.moved_from is not None:
        before = event.at - timedelta(seconds=1)
        record_revoked(connection, Holders.MOVED, event.public_key, before, before.timestamp())


def record_person(connection: Connection, event: UserRevoked) -> None:
    """Records a person's revoked key as an event states it, also if this database does not know the person."""
    record_revoked(connection, Holders.PEOPLE, event.public_key, event.at, event.at.timestamp())


def record_revoked(
    connection: Connection, holders: Holders, public_key: str, at: datetime, expires_at: float | None
) -> None:
    """Records a revoked key; the latest revocation of a key counts, and None as expiry is for ever.

    A key is kept for the longest life that a credential may have, whatever its last known expiry: an earlier credential
    of the same key may expire later.
    """
    mine = (_revoked.c.public_key == public_key, _revoked.c.holders == str(holders))
    known = connection.execute(select(_revoked).where(*mine)).first()
    revoked_at = max(int(at.timestamp()), known.revoked_at if known else 0)
    if known and known.expires_at is None:
        expires_at = None
    if expires_at is not None:
        expires_at = max(expires_at, revoked_at + LONGEST_CREDENTIAL_LIFE.total_seconds())
    connection.execute(delete(_revoked).where(*mine))
    row = {"public_key": public_key, "holders": str(holders), "revoked_at": revoked_at, "expires_at": expires_at}
    connection.execute(insert(_revoked), row)


def revoked_keys(connection: Connection, holders: Holders, now: datetime) -> Mapping[str, int]:
    """Returns key → time of the revoked keys whose credentials may still be valid, the newest first. O(such keys)."""
    counts = (_revoked.c.expires_at.is_(None)) | (_revoked.c.expires_at > (now - _KEEP_AFTER_EXPIRY).timestamp())
    rows = connection.execute(
        select(_revoked.c.public_key, _revoked.c.revoked_at)
        .where(_revoked.c.holders == str(holders), counts)
        .order_by(_revoked.c.revoked_at.desc(), _revoked.c.public_key)
    )
    return {row.public_key: row.revoked_at for row in rows}


def is_revoked(connection: Connection, holders: Holders, public_key: str) -> bool:
    mine = (_revoked.c.public_key == public_key, _revoked.c.holders == str(holders))
    return connection.execute(select(_revoked.c.public_key).where(*mine)).first() is not None


def was_read(connection: Connection, events: str) -> bool:
    """Returns whether all stored events of a kind were read since this database was created."""
    return connection.execute(select(_read_again).where(_read_again.c.events == events)).first() is not None


def set_read(connection: Connection, events: str) -> None:
    if not was_read(connection, events):
        connection.execute(insert(_read_again), {"events": events})


def forget_expired(connection: Connection, now: datetime) -> int:
    """Forgets revoked keys of which every credential has expired; returns how many."""
    before = (now - _KEEP_AFTER_EXPIRY).timestamp()
    return connection.execute(delete(_revoked).where(_revoked.c.expires_at <= before)).rowcount


# ---- queries -----------------------------------------------------------------------------------------------


def other_admins(connection: Connection, user: str, now: datetime) -> int:
    """Returns how many other people have the role admin and valid credentials."""
    table = _people.c
    active = (table.role == str(Role.ADMIN), table.revoked_at.is_(None), table.expires_at > now.timestamp())
    return connection.execute(select(func.count()).where(table.user != user, *active)).scalar_one()


def view(connection: Connection, user: str) -> UserView:
    (found,) = _views(connection, _people.c.user == user, 1)
    return found


def page(connection: Connection, after: str, limit: int) -> list[UserView]:
    """Returns people whose names follow `after`, by name."""
    return _views(connection, _people.c.user > after, limit)


def _views(connection: Connection, condition: object, limit: int) -> list[UserView]:
    rows = connection.execute(
        select(_people).where(condition).order_by(_people.c.user).limit(limit)  # type: ignore[arg-type]
    )
    return [
        UserView(
            user=row.user,
            role=Role(row.role),
            public_key=row.public_key,
            added_at=_time(row.added_at),
            added_by=row.added_by,
            expires_at=_time(row.expires_at),
            revoked_at=None if row.revoked_at is None else _time(row.revoked_at),
            revoked_by=row.revoked_by,
            reason=row.reason,
        )
        for row in rows
    ]


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)

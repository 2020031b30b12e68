"""The streams of gateways, and what they say in the tables: who counts, whose credential ends when, and what the bus
still has to be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import reduce
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, case, delete, insert, literal, select, update

from slmops.contracts.commands import Standing
from slmops.contracts.events import (
    Event,
    GatewayEnrolled,
    GatewayEvent,
    GatewayMoved,
    GatewayReenrolmentAllowed,
    GatewayRemoved,
    GatewayRevoked,
)
from slmops.kit.journal import UnitOfWork, put
from slmops.rollout import progress_rows
from slmops.rollout.domain.attention import credential_due
from slmops.rollout.domain.membership import LastCredential, Membership, evolve, replay
from slmops.rollout.inventory_rows import NOTHING_REPORTED, labels_text, put_labels
from slmops.rollout.tables import (
    FORGOTTEN,
    GATEWAY_LABELS,
    GATEWAYS,
    OVERLAY_WRITES,
    SIGHTINGS,
    matches,
    time_of,
)


def project(connection: Connection, event: GatewayEvent) -> None:
    """Updates the tables, and the gateway's place. Growth: its own rows, whatever the size of the fleet."""
    _project(connection, event)
    progress_rows.refresh(connection, [event.gateway_id])


def _project(connection: Connection, event: GatewayEvent) -> None:
    match event:
        case GatewayEnrolled():
            _enrolled(connection, event)
        case GatewayMoved():
            known = GATEWAYS.c.gateway_id == event.gateway_id
            back = GATEWAYS.c.blueprint == event.blueprint
            to = case((back, None), else_=event.blueprint)
            revoked = GATEWAYS.c.revoked_at.is_not(None)
            standing = case((revoked, Standing.REVOKED), (back, Standing.ENROLLED), else_=Standing.MOVING)
            connection.execute(update(GATEWAYS).where(known).values(moving_to=to, standing=standing))
            put(connection, OVERLAY_WRITES, {"gateway_id": event.gateway_id}, {"blueprint": event.blueprint})
        case GatewayReenrolmentAllowed():
            known = GATEWAYS.c.gateway_id == event.gateway_id
            connection.execute(update(GATEWAYS).where(known).values(reenrol_until=event.until.timestamp()))
        case GatewayRevoked():
            known = GATEWAYS.c.gateway_id == event.gateway_id
            values: dict[str, Any] = {"revoked_at": event.revoked_at.timestamp(), "revoked_because": event.reason}
            values["standing"] = Standing.REVOKED
            connection.execute(update(GATEWAYS).where(known).values(**values))
        case GatewayRemoved():
            for table in (GATEWAYS, SIGHTINGS, GATEWAY_LABELS):
                connection.execute(delete(table).where(table.c.gateway_id == event.gateway_id))
            put(connection, OVERLAY_WRITES, {"gateway_id": event.gateway_id}, {"blueprint": None})
            if not is_forgotten(connection, event.gateway_id):
                connection.execute(insert(FORGOTTEN).values(gateway_id=event.gateway_id))


def _enrolled(connection: Connection, event: GatewayEnrolled) -> None:
    """Records an enrolment. With another key everything that the device before reported is forgotten, also its
    sequence: the counter of a device that was set up again starts anew."""
    key = {"gateway_id": event.gateway_id}
    row = connection.execute(select(GATEWAYS).where(*matches(GATEWAYS, key))).first()
    before = GatewayEnrolled.model_validate_json(row.enrolled) if row is not None and row.enrolled else None
    same_key = before is not None and before.public_key == event.public_key
    endless = event.expires_at is None or bool(same_key and row is not None and row.endless)
    values: dict[str, Any] = {
        "blueprint": event.blueprint,
        "enrolled": event.model_dump_json(),
        "enrolment": event.enrolment,
        **dict.fromkeys(("revoked_at", "revoked_because", "moving_to", "reenrol_until")),
        "issued_at": event.at.timestamp(),
        "expires_at": event.expires_at.timestamp() if event.expires_at else None,
        "endless": endless,
        "standing": Standing.ENROLLED,
        "due_at": _timestamp(credential_due(event.at, event.expires_at)),
    }
    if not same_key:
        values |= {"sequence": 0, "report": None, "failure": None, **NOTHING_REPORTED}
        # It was there to enrol, so it is not offline before its first report.
        seen = {"at": event.at.timestamp(), "clock_ahead_s": None, "last_sequence": None}
        put(connection, SIGHTINGS, key, seen)
    elif before is not None and before.blueprint != event.blueprint:
        values |= {"failure": None}
    if not (same_key and row is not None and row.report):
        put_labels(connection, {event.gateway_id: event.labels})
        values["labels"] = labels_text(event.labels)
    put(connection, GATEWAYS, key, values)
    connection.execute(delete(FORGOTTEN).where(*matches(FORGOTTEN, key)))


def load(unit: UnitOfWork, gateway_id: str) -> Membership:
    """Returns the membership by its stream; by its row if the database is younger than the enrolment."""
    events, _ = unit.load(_gateway_stream(gateway_id))
    if events:
        return replay(gateway_id, events)
    query = select(GATEWAYS.c.enrolled).where(GATEWAYS.c.gateway_id == gateway_id)
    known = unit.connection.execute(query).scalar()
    member = Membership(gateway_id)
    return replace(evolve(member, GatewayEnrolled.model_validate_json(known)), version=0) if known else member


def commit(unit: UnitOfWork, member: Membership, events: Sequence[Event]) -> Membership:
    """Appends to the gateway's stream; `project` updates the tables in the same transaction."""
    # An enrolment that only its row has becomes the beginning of the stream, so that it can be replayed.
    first = [member.enrolled] if events and member.version == 0 and member.enrolled else []
    unit.append(_gateway_stream(member.gateway_id), member.version, [*first, *events])
    return reduce(evolve, events, member)


def exists(connection: Connection, gateway_id: str) -> bool:
    return (
        connection.execute(select(GATEWAYS.c.gateway_id).where(GATEWAYS.c.gateway_id == gateway_id)).first() is not None
    )


def removed(connection: Connection, journal: Table, gateway_ids: Iterable[str]) -> set[str]:
    """Returns those of some hundred gateways that were removed and not enrolled again, by their streams in `journal`,
    with one statement."""
    streams = {_gateway_stream(gateway_id): gateway_id for gateway_id in gateway_ids}
    kinds = (GatewayEnrolled.type, GatewayRemoved.type)
    query = select(journal.c.stream, journal.c.type).where(journal.c.stream.in_(streams), journal.c.type.in_(kinds))
    last = {row.stream: row.type for row in connection.execute(query.order_by(journal.c.version))}
    return {streams[stream] for stream, kind in last.items() if kind == GatewayRemoved.type}


def last_credential(connection: Connection, gateway_id: str) -> LastCredential:
    row = connection.execute(select(GATEWAYS).where(GATEWAYS.c.gateway_id == gateway_id)).first()
    if row is None:
        return LastCredential()
    return LastCredential(time_of(row.issued_at), None if row.endless else time_of(row.expires_at))


def record_credential(connection: Connection, gateway_id: str, issued_at: datetime, expires_at: datetime) -> None:
    due = credential_due(issued_at, expires_at)
    values = {"issued_at": issued_at.timestamp(), "expires_at": expires_at.timestamp(), "due_at": _timestamp(due)}
    connection.execute(update(GATEWAYS).where(GATEWAYS.c.gateway_id == gateway_id).values(**values))


def _timestamp(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()


class OverlayWrite(NamedTuple):
    """A gateway's overlay has to name this blueprint; None: it has to be empty."""

    blueprint: str | None


def overlay_writes(connection: Connection, limit: int) -> list[str]:
    """Returns gateways whose overlay has to be written."""
    query = select(OVERLAY_WRITES.c.gateway_id).order_by(OVERLAY_WRITES.c.gateway_id)
    return list(connection.execute(query.limit(limit)).scalars())


def overlay_write(connection: Connection, gateway_id: str) -> OverlayWrite | None:
    row = connection.execute(select(OVERLAY_WRITES).where(OVERLAY_WRITES.c.gateway_id == gateway_id)).first()
    return OverlayWrite(row.blueprint) if row is not None else None


def overlay_written(connection: Connection, gateway_id: str, blueprint: str | None) -> None:
    same = OVERLAY_WRITES.c.blueprint == blueprint if blueprint else OVERLAY_WRITES.c.blueprint.is_(None)
    connection.execute(delete(OVERLAY_WRITES).where(OVERLAY_WRITES.c.gateway_id == gateway_id, same))


def forgotten(connection: Connection, journal: Table, limit: int) -> list[str]:
    """Returns removed gateways whose enrolment is still on its stream, if all their events in `journal` are published.

    Otherwise an enrolment that is still in the outbox would be stored after the deletion.
    """
    waiting = select(journal.c.stream).where(journal.c.published.is_(False))
    query = select(FORGOTTEN.c.gateway_id).where((literal("gateway:") + FORGOTTEN.c.gateway_id).not_in(waiting))
    return list(connection.execute(query.order_by(FORGOTTEN.c.gateway_id).limit(limit)).scalars())


def is_forgotten(connection: Connection, gateway_id: str) -> bool:
    return connection.execute(select(FORGOTTEN).where(FORGOTTEN.c.gateway_id == gateway_id)).first() is not None


def enrolment_removed(connection: Connection, gateway_id: str) -> None:
    connection.execute(delete(FORGOTTEN).where(FORGOTTEN.c.gateway_id == gateway_id))


def _gateway_stream(gateway_id: str) -> str:
    return f"gateway:{gateway_id}"

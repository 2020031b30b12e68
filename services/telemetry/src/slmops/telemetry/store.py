"""Batches that wait for their window to close. What was told is gone from here; the consumed ids remain."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Connection, Double, MetaData, String, Table, Text, delete, insert, select

from slmops.contracts.cloudevent import event_id
from slmops.contracts.errors import Conflict
from slmops.contracts.events import Event
from slmops.contracts.measurement import MeasurementBatch
from slmops.kit.journal import Unit
from slmops.telemetry.domain import Pending

_TABLES = MetaData()
_pending = Table(
    "pending_batches",
    _TABLES,
    Column("id", String(64), primary_key=True),
    Column("ended_at", Double, nullable=False, index=True),  # Unix seconds
    Column("data", Text, nullable=False),
    Column("traceparent", String(64)),
)


def schema() -> MetaData:
    """A copy of the tables for one journal, which adds its own."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def project(_connection: Connection, _event: Event) -> None:
    """Nothing is read from windows that were told: consumers keep their own."""


def add(unit: Unit, item: Pending) -> bool:
    """Keep a batch until its window closes; False when it was here before."""
    identity = _identity(item.batch)
    if not unit.first_time("telemetry", identity):
        return False
    row = {
        "id": identity,
        "ended_at": item.batch.ended_at.timestamp(),
        "data": item.batch.model_dump_json(),
        "traceparent": item.traceparent,
    }
    unit.connection.execute(insert(_pending).values(row))
    return True


def ended_before(connection: Connection, limit: datetime) -> list[Pending]:
    rows = connection.execute(
        select(_pending).where(_pending.c.ended_at < limit.timestamp()).order_by(_pending.c.ended_at)
    ).all()
    return [Pending(MeasurementBatch.model_validate_json(row.data), row.traceparent) for row in rows]


def take_ended_before(connection: Connection, limit: datetime) -> list[Pending]:
    """The same, removed. Raises `Conflict` when another process of ours takes them just now."""
    found = ended_before(connection, limit)
    for item in found:
        gone = connection.execute(delete(_pending).where(_pending.c.id == _identity(item.batch))).rowcount == 0
        if gone:
            raise Conflict("another process closes the same windows")
    return found


def _identity(batch: MeasurementBatch) -> str:
    # With the gateway in it, nobody can make us take another gateway's batch for a repetition.
    return event_id(batch.gateway_id, batch.batch_id)

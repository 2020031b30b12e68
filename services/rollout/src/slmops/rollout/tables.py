"""The read tables of the rollout service.

Documents are stored as JSON, with separate columns for the fields on which queries select. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    insert,
    true,
    update,
)

_TABLES = MetaData()

PACKAGES = Table(
    "packages",
    _TABLES,
    Column("model", String(63), primary_key=True),
    Column("version", String(64), primary_key=True),
    Column("profile", String(63), primary_key=True),
    Column("at", Double, nullable=False),
    Column("data", Text, nullable=False),
)
WITHDRAWN = Table(
    "withdrawn",
    _TABLES,
    Column("manifest", String(80), primary_key=True),
    Column("at", Double, nullable=False),
)
GATEWAYS = Table(
    "gateways",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63), nullable=False, index=True),
    Column("enrolled", Text),
    Column("sequence", BigInteger, nullable=False, default=0),
    Column("report", Text),
    Column("failure", Text),
    Column("enrolment", Integer, nullable=False, server_default="1"),
    Column("revoked_at", Double, index=True),
    Column("revoked_because", Text),
    Column("moving_to", String(63)),
    Column("reenrol_until", Double),
    # Of the newest credential of its key. `endless`: the key had one that never expires.
    Column("issued_at", Double),
    Column("expires_at", Double),
    Column("endless", Boolean, nullable=False, server_default=true()),
)
# Overlays that still have to be written to the bus. A row is deleted when its overlay is written.
OVERLAY_WRITES = Table(
    "overlay_writes",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63)),  # NULL: the gateway was removed
)
FORGOTTEN = Table("forgotten_enrolments", _TABLES, Column("gateway_id", String(63), primary_key=True))
SIGHTINGS = Table(
    "sightings",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("at", Double, nullable=False),
    Column("clock_ahead_s", Double),
)
WINDOWS = Table(
    "windows",
    _TABLES,
    Column("id", String(64), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("data", Text, nullable=False),
    Index("windows_by_time", "blueprint", "ended_at"),
)
BLUEPRINTS = Table(
    "blueprints",
    _TABLES,
    Column("name", String(63), primary_key=True),
    Column("plan", Text, nullable=False),
    Column("judged", Boolean, nullable=False),
)
ENDED = Table(
    "ended_rollouts", _TABLES, Column("rollout", String(80), primary_key=True), Column("view", Text, nullable=False)
)


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def matches(table: Table, key: dict[str, str]) -> Iterable[Any]:
    return [table.c[column] == value for column, value in key.items()]


def put(connection: Connection, table: Table, key: dict[str, str], values: dict[str, Any]) -> None:
    """Updates the row or inserts it, with statements that every database supports."""
    if connection.execute(update(table).where(*matches(table, key)).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(**key, **values))


def time_of(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

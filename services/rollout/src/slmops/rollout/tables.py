"""The read tables of the rollout service.

Documents are stored as JSON, with separate columns for the fields on which queries select. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    bindparam,
    false,
    insert,
    text,
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
    Column("blueprint", String(63), nullable=False),
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
    # What queries select on (`inventory_rows`). `standing` is NULL without an enrolment, `labels` a JSON object.
    Column("standing", String(8)),
    Column("phase", String(16), nullable=False, server_default="idle"),
    Column("running_version", String(64)),
    Column("failed", Boolean, nullable=False, server_default=false()),
    Column("dropped", Boolean, nullable=False, server_default=false()),
    Column("labels", Text, nullable=False, server_default="{}"),
    Column("due_at", Double, index=True),  # from when its credential is late to be renewed
    # A page needs the ids in order under each filter, the summary every value of the second index and nothing else.
    Index("gateways_by_blueprint", "blueprint", "gateway_id"),
    Index("gateways_by_values", "blueprint", "standing", "phase", "running_version", "failed", "dropped"),
    Index("gateways_by_standing", "standing", "gateway_id"),
    Index("gateways_by_phase", "phase", "gateway_id"),
    Index("gateways_by_version", "running_version", "gateway_id"),
    Index("gateways_by_failed", "failed", "gateway_id"),
    Index("gateways_by_dropped", "dropped", "gateway_id"),
)
GATEWAY_LABELS = Table(
    "gateway_labels",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("gateways_by_label", "key", "value", "gateway_id"),
)
# Overlays that still have to be written to the bus. A row is deleted when its overlay is written.
OVERLAY_WRITES = Table(
    "overlay_writes",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63)),  # NULL: the gateway was removed
)
FORGOTTEN = Table("forgotten_enrolments", _TABLES, Column("gateway_id", String(63), primary_key=True))
# When something of a gateway last arrived, and what it said about itself then. Growth: one row per gateway.
SIGHTINGS = Table(
    "sightings",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("at", Double, nullable=False, index=True),  # offline gateways are those below a time
    Column("clock_ahead_s", Double, index=True),
    Column("last_sequence", BigInteger),  # of the newest report that its newest presence message names
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
    Column("profile", String(63)),  # of its newest revision
    Column("generation", Integer),  # of the first plan of the rollout under way; NULL: none is
    Column("filled_to", String(63)),  # the last gateway that has its place in that rollout; NULL: all have
)
NOT_COMMITTED = text("progress <> 'committed'")
# The place of each gateway in the newest rollout that gave it the candidate: see `domain.stages`.
MEMBERS = Table(
    "members",
    _TABLES,
    Column("gateway_id", String(63), primary_key=True),
    Column("blueprint", String(63), nullable=False),
    Column("rollout", String(80), nullable=False),
    Column("stage", Integer, nullable=False),
    Column("progress", String(16), nullable=False),
    Column("problem", Text, nullable=False),
    # Only for naming gateways that wait or failed. Most rows have committed, and need not be in it.
    Index(
        "members_to_name",
        "rollout",
        "progress",
        "stage",
        "gateway_id",
        sqlite_where=NOT_COMMITTED,
        postgresql_where=NOT_COMMITTED,
    ),
)
# The number of those rows, by stage and progress, of the newest rollout of each blueprint.
COUNTS = Table(
    "member_counts",
    _TABLES,
    Column("rollout", String(80), primary_key=True),
    Column("stage", Integer, primary_key=True),
    Column("progress", String(16), primary_key=True),
    Column("blueprint", String(63), nullable=False, index=True),
    Column("gateways", Integer, nullable=False),
)
ENDED = Table(
    "ended_rollouts",
    _TABLES,
    Column("rollout", String(80), primary_key=True),
    Column("view", Text, nullable=False),
    Column("blueprint", String(63), nullable=False, server_default=""),
    Column("started_at", Double, nullable=False, server_default="0"),
    Index("ended_rollouts_by_time", "started_at", "rollout"),
    Index("ended_rollouts_of_blueprint", "blueprint", "started_at", "rollout"),
)


def schema() -> MetaData:
    """Returns a copy of the tables for one journal, which adds its own tables. `MIGRATIONS` lead to these tables."""
    own = MetaData()
    for table in _TABLES.tables.values():
        table.to_metadata(own)
    return own


def matches(table: Table, key: dict[str, str]) -> Iterable[Any]:
    return [table.c[column] == value for column, value in key.items()]


def change_all(connection: Connection, table: Table, key: str, rows: Sequence[dict[str, Any]]) -> None:
    """Updates rows by their key column with one statement. All rows have the same columns."""
    if rows:
        values: dict[str, Any] = {column: bindparam(f"new_{column}") for column in rows[0] if column != key}
        statement = update(table).where(table.c[key] == bindparam("key")).values(**values)
        renamed = [{"key" if name == key else f"new_{name}": value for name, value in row.items()} for row in rows]
        connection.execute(statement, renamed)


def add_all(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Inserts rows with one statement."""
    if rows:
        connection.execute(insert(table), list(rows))


def time_of(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

"""The sums of open windows: one row for each window, cohort and gateway, so that a gateway's part can be taken out.

Growth: a batch changes one row. Closing a window is one GROUP BY in the database and one DELETE, whatever the number of
batches; it reads a row for each gateway that measured in the window.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final

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
    literal_column,
    select,
)

from slmops.contracts.errors import Conflict
from slmops.telemetry.domain.windows import Cohort, Ended, Pending, Sums, window_start
from slmops.telemetry.upsert import Upsert, inserting

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_KEY: Final = ("started_us", "blueprint", "release", "version", "gateway_id")
_INTEGERS: Final = tuple(name for name in Sums._fields if not name.endswith("_seconds"))


def window_sums(metadata: MetaData) -> Table:
    """Adds the table to `metadata`."""
    return Table(
        "window_sums",
        metadata,
        # The start of the window in microseconds of Unix time. Rows that an earlier release left have a batch's end.
        Column("started_us", BigInteger, primary_key=True, autoincrement=False),
        Column("blueprint", String(63), primary_key=True),
        Column("release", String(80), primary_key=True),
        Column("version", String(64), primary_key=True),
        Column("gateway_id", String(63), primary_key=True, index=True),
        *(Column(name, BigInteger if name in _INTEGERS else Double, nullable=False) for name in Sums._fields),
        Column("traceparent", String(64)),
    )


_sums = window_sums(MetaData())


def add(connection: Connection, items: Iterable[Pending], length: timedelta) -> None:
    """Adds batches to the sums of their windows. One statement, run for each window, cohort and gateway."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in items:
        batch = item.batch
        started = (window_start(item.ended_at, length) - _EPOCH) // _MICROSECOND
        key = (started, batch.blueprint, batch.release, batch.version, batch.gateway_id)
        row = rows.setdefault(key, dict(zip(_KEY, key, strict=True)))
        for name in Sums._fields:
            row[name] = row.get(name, 0) + getattr(batch, name)
        row["traceparent"] = item.traceparent or row.get("traceparent")
    if rows:
        connection.execute(_adding(connection.dialect.name), list(rows.values()))


@cache
def _adding(dialect: str) -> Upsert:
    insert = inserting(dialect, _sums)
    new = insert.excluded
    changed: Any = {name: _sums.c[name] + new[name] for name in Sums._fields}
    changed["traceparent"] = func.coalesce(new.traceparent, _sums.c.traceparent)
    return insert.on_conflict_do_update(index_elements=_KEY, set_=changed)


def any_ended(connection: Connection, limit: datetime) -> bool:
    """Returns whether there are sums of windows that started before `limit`. Reads one row."""
    return connection.execute(select(_sums.c.started_us).where(_before(limit)).limit(1)).first() is not None


def take_ended(connection: Connection, limit: datetime, length: timedelta) -> list[Ended]:
    """Removes and returns the sums of the windows that started before `limit`, oldest window first.

    Raises `Conflict` if another process of this service takes them at the same time.
    """
    found = ended(connection, limit, length)
    if connection.execute(delete(_sums).where(_before(limit))).rowcount != sum(each.rows for each in found):
        raise Conflict("another process is closing the same windows")
    return found


def ended(connection: Connection, limit: datetime, length: timedelta) -> list[Ended]:
    number = (_sums.c.started_us // literal_column(str(length // _MICROSECOND), BigInteger)).label("number")
    cohort = (number, _sums.c.blueprint, _sums.c.release, _sums.c.version)
    query = (
        select(
            *cohort,
            func.count(_sums.c.gateway_id.distinct()).label("gateways"),
            func.count().label("rows"),
            func.max(_sums.c.traceparent).label("traceparent"),
            *(func.sum(_sums.c[name]).label(name) for name in Sums._fields),
        )
        .where(_before(limit))
        .group_by(*cohort)
        .order_by(*cohort)
    )
    return [_ended(row, length) for row in connection.execute(query)]


def _ended(row: Any, length: timedelta) -> Ended:
    cohort = Cohort(_EPOCH + row.number * length, row.blueprint, row.release, row.version)
    figures = {name: int(row._mapping[name]) if name in _INTEGERS else row._mapping[name] for name in Sums._fields}
    return Ended(cohort, row.gateways, row.rows, Sums(**figures), row.traceparent)


def forget_gateway(connection: Connection, gateway_id: str) -> None:
    """Takes what a gateway measured out of all open windows."""
    connection.execute(delete(_sums).where(_sums.c.gateway_id == gateway_id))


def _before(limit: datetime) -> Any:
    return _sums.c.started_us < (limit - _EPOCH) // _MICROSECOND

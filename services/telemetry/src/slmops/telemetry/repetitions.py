"""Recognizes batches that were counted before.

A batch carries its number since its gateway's agent started (`boot`, `sequence`), so one row per start of an agent is
enough, whatever the number of batches. A gateway of an earlier release sends no numbers: each of its batches leaves an
id (`Journal.first_times`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Double, MetaData, String, Table, Text, delete, select

from slmops.contracts.cloudevent import event_id
from slmops.contracts.measurement import MeasurementBatch
from slmops.kit.journal import UnitOfWork
from slmops.telemetry.domain.sequences import Seen
from slmops.telemetry.domain.windows import Pending
from slmops.telemetry.upsert import Upsert, inserting


def sequences(metadata: MetaData) -> Table:
    """Adds the table to `metadata`."""
    return Table(
        "sequences",
        metadata,
        Column("id", String(130), primary_key=True),  # gateway and start of its agent
        Column("highest", BigInteger, nullable=False),
        Column("gaps", Text, nullable=False),
        Column("at", Double, nullable=False),  # Unix seconds of the last change
    )


_seen = sequences(MetaData())


def first_times(unit: UnitOfWork, items: Iterable[Pending], now: datetime) -> list[Pending]:
    """Returns the batches that were not counted before, and remembers them. At most four statements."""
    numbered: list[Pending] = []
    by_id: dict[str, Pending] = {}
    for item in items:
        if item.batch.boot and item.batch.sequence is not None:
            numbered.append(item)
        else:
            # The id includes the gateway, so a gateway cannot make another one's batch look like a repetition.
            by_id[event_id(item.batch.gateway_id, item.batch.batch_id)] = item
    new = _numbered(unit.connection, numbered, now) if numbered else []
    return new + [by_id[identity] for identity in unit.first_times("telemetry", by_id)] if by_id else new


def _numbered(connection: Connection, items: list[Pending], now: datetime) -> list[Pending]:
    keys = [_key(item.batch) for item in items]
    rows = connection.execute(select(_seen).where(_seen.c.id.in_(set(keys))))
    known = {row.id: Seen(row.highest, tuple(map(tuple, json.loads(row.gaps)))) for row in rows}
    new: list[Pending] = []
    changed: set[str] = set()
    for key, item in zip(keys, items, strict=True):
        seen, number = known.get(key, Seen()), item.batch.sequence
        assert number is not None
        if number not in seen:
            known[key] = seen.also(number)
            changed.add(key)
            new.append(item)
    if changed:
        at = now.timestamp()
        values = [
            {"id": key, "highest": known[key].highest, "gaps": json.dumps(known[key].gaps), "at": at} for key in changed
        ]
        connection.execute(_writing(connection.dialect.name), values)
    return new


def _key(batch: MeasurementBatch) -> str:
    return f"{batch.gateway_id}/{batch.boot}"


@cache
def _writing(dialect: str) -> Upsert:
    insert = inserting(dialect, _seen)
    written: Any = {name: insert.excluded[name] for name in ("highest", "gaps", "at")}
    return insert.on_conflict_do_update(index_elements=["id"], set_=written)


def forget_before(connection: Connection, before: datetime) -> None:
    """Forgets the starts of agents whose last batch was counted before that time."""
    connection.execute(delete(_seen).where(_seen.c.at < before.timestamp()))

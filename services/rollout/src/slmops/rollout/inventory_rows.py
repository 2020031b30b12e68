"""The inventory in the tables: pages of gateways under filters, and the figures of the whole fleet.

Growth: a page reads `limit` rows through the index of one of its filters, in the order of ids, wherever it is in the
list; further filters read what that one gives and drop the rest. Filters by age read the index of ages, so they cost as
many entries as match. A report changes one row, and rows of labels only if it changes labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    delete,
    false,
    func,
    literal,
    or_,
    select,
    union,
)

from slmops.contracts import freshness
from slmops.contracts.clocks import TOLERANCE
from slmops.contracts.commands import Attention, ListGateways, Standing
from slmops.contracts.events import GatewayEnrolled, GatewayReported
from slmops.contracts.plan import Identity
from slmops.rollout.domain.attention import has_dropped, is_failure
from slmops.rollout.domain.fleet import Member, Sighting
from slmops.rollout.domain.summary import Cell
from slmops.rollout.tables import GATEWAY_LABELS, GATEWAYS, SIGHTINGS, add_all, time_of

MOST_LABELS, KEY_LENGTH, VALUE_LENGTH = 64, 128, 256
"""What of a gateway's labels can be searched. A gateway sends any number of any length, and each one is a row."""
_AT_ONCE: Final = 50
"""Gateways that are read together: a report may have up to a megabyte."""
_RARE: Final = 2000
"""Rows up to which a condition on a time is read before all others."""

# ---- filling the columns ----------------------------------------------------------------------------------


def values_of(report: GatewayReported) -> dict[str, Any]:
    """Returns the columns of a gateway's newest report on which queries select, without the labels."""
    return {
        "phase": report.phase.value,
        "running_version": report.running_version,
        "failed": is_failure(report),
        "dropped": has_dropped(report),
    }


NOTHING_REPORTED: Final[dict[str, Any]] = {"phase": "idle", "running_version": None, "failed": False, "dropped": False}


def labels_text(labels: Mapping[str, str]) -> str:
    """Returns the column `labels`."""
    return json.dumps(searchable(labels))


def put_labels(connection: Connection, labels: Mapping[str, Mapping[str, str]]) -> None:
    """Replaces the rows of gateways' labels. Growth: two statements, and a row for each label."""
    if not labels:
        return
    connection.execute(delete(GATEWAY_LABELS).where(GATEWAY_LABELS.c.gateway_id.in_(list(labels))))
    found = {gateway_id: searchable(own) for gateway_id, own in labels.items()}
    rows = [{"gateway_id": g, "key": key, "value": value} for g, own in found.items() for key, value in own.items()]
    add_all(connection, GATEWAY_LABELS, rows)


def searchable(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns the labels that can be searched: not too many, not too long, and nothing that a database refuses."""
    fit = {k: v for k, v in labels.items() if len(k) <= KEY_LENGTH and len(v) <= VALUE_LENGTH and "\0" not in k + v}
    return dict(sorted(fit.items())[:MOST_LABELS])


# ---- pages ------------------------------------------------------------------------------------------------


def page(connection: Connection, asked: ListGateways, after: str, limit: int, now: datetime) -> list[str]:
    """Returns the ids of the next `limit` gateways that match every filter, in order, after the id `after`."""
    found = [_ids(connection, asked, now, kind, after).limit(limit) for kind in asked.attention or (None,)]
    if len(found) == 1:
        return list(connection.execute(found[0]).scalars())
    every = union(*(select(one.subquery().c.gateway_id) for one in found)).subquery()
    query = select(every.c.gateway_id).order_by(every.c.gateway_id).limit(limit)
    return list(connection.execute(query).scalars())


def count(connection: Connection, asked: ListGateways, now: datetime) -> int:
    """Returns how many gateways match. Growth: reads an entry of an index for each one."""
    found = [_ids(connection, asked, now, kind).order_by(None) for kind in asked.attention or (None,)]
    every = found[0].subquery() if len(found) == 1 else union(*found).subquery()
    return connection.execute(select(func.count()).select_from(every)).scalar_one()


def load(connection: Connection, ids: Sequence[str]) -> Iterator[Member]:
    """Yields gateways by id in this order, read a few at a time. One that is gone meanwhile is left out."""
    for start in range(0, len(ids), _AT_ONCE):
        rows = connection.execute(_fleet().where(GATEWAYS.c.gateway_id.in_(ids[start : start + _AT_ONCE])))
        yield from map(_member, rows)


def members(connection: Connection, blueprint: str | None = None) -> list[Member]:
    """Returns the gateways that count, of one blueprint or all: neither revoked ones, nor ones that are being moved.

    Growth: reads and parses every one of them.
    """
    query = _fleet().where(GATEWAYS.c.standing == Standing.ENROLLED)
    if blueprint is not None:
        query = query.where(GATEWAYS.c.blueprint == blueprint)
    return [_member(row) for row in connection.execute(query)]


def count_offline(connection: Connection, blueprint: str | None, now: datetime) -> int:
    """Returns how many gateways that are not revoked are offline. For the whole fleet it reads only indexes: those of
    ages and of revoked gateways."""
    if blueprint is not None:
        return count(connection, ListGateways(blueprint=blueprint, attention=(Attention.OFFLINE,)), now)
    silent = SIGHTINGS.c.at < freshness.offline_before(now).timestamp()
    every = select(func.count()).select_from(SIGHTINGS).where(silent)
    seen = GATEWAYS.join(SIGHTINGS, GATEWAYS.c.gateway_id == SIGHTINGS.c.gateway_id)
    revoked = select(func.count()).select_from(seen).where(silent, GATEWAYS.c.standing == Standing.REVOKED)
    return connection.execute(every).scalar_one() - connection.execute(revoked).scalar_one()


def one(connection: Connection, gateway_id: str) -> Member | None:
    return next(load(connection, [gateway_id]), None)


def _ids(
    connection: Connection, asked: ListGateways, now: datetime, attention: Attention | None, after: str = ""
) -> Select[Any]:
    """Returns the query for the ids of gateways that match, in order. If a label is asked for, its index leads.

    A condition on a time that few gateways meet leads too: then the others are written so that no index has them. One
    that many meet is checked in the order of ids, so that a page ends early, and all pages together read each row once.
    """
    ages = [*_by_age(asked, now), *_seen_wrong(attention, now)]
    late = [GATEWAYS.c.due_at < now.timestamp()] if attention is Attention.CREDENTIAL else []
    rare = any(_is_rare(connection, condition) for condition in (*ages, *late))
    tables: FromClause = GATEWAYS
    if ages:
        tables = tables.join(SIGHTINGS, GATEWAYS.c.gateway_id == SIGHTINGS.c.gateway_id)
    wanted = [*ages, *late, *_by_value(asked, rare), *_marked(attention)]
    if asked.online is not None or attention not in (None, Attention.REVOKED):
        wanted.append(GATEWAYS.c.standing != Standing.REVOKED)
    gateway_id: ColumnElement[Any] = GATEWAYS.c.gateway_id
    for key, value in asked.labels.items():
        labels = GATEWAY_LABELS.alias()
        tables = tables.join(labels, labels.c.gateway_id == GATEWAYS.c.gateway_id)
        known = searchable({key: value})  # any other label is in no row
        wanted += [_plain(labels.c.key, rare) == key, labels.c.value == value] if known else [false()]
        gateway_id = labels.c.gateway_id
    if after:
        wanted.append(_plain(gateway_id, rare) > after)
    query = select(gateway_id.label("gateway_id")).select_from(tables).where(*wanted)
    return query.order_by(_plain(gateway_id, rare))


def _is_rare(connection: Connection, condition: ColumnElement[bool]) -> bool:
    """Returns whether at most `_RARE` rows meet a condition on an indexed column. Reads no more of them."""
    some = select(literal(1)).where(condition).limit(_RARE + 1).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one() <= _RARE


def _plain(column: ColumnElement[Any], rare: bool) -> ColumnElement[Any]:
    """Returns the column; if `rare`, as an expression that no index has."""
    return column.concat("") if rare else column


def _by_value(asked: ListGateways, rare: bool) -> list[ColumnElement[bool]]:
    g = GATEWAYS.c
    same = [
        (g.standing, asked.standing),
        (g.blueprint, asked.blueprint),
        (g.gateway_id, asked.gateway_id),
        (g.phase, asked.phase),
        (g.running_version, asked.version),
    ]
    return [g.standing.is_not(None), *(_plain(column, rare) == value for column, value in same if value is not None)]


def _by_age(asked: ListGateways, now: datetime) -> list[ColumnElement[bool]]:
    wanted: list[ColumnElement[bool]] = []
    if asked.online is not None:
        oldest = freshness.offline_before(now).timestamp()
        wanted.append(SIGHTINGS.c.at >= oldest if asked.online else SIGHTINGS.c.at < oldest)
    if asked.silent_for_s is not None:
        wanted.append(SIGHTINGS.c.at < now.timestamp() - asked.silent_for_s)
    return wanted


def _seen_wrong(attention: Attention | None, now: datetime) -> list[ColumnElement[bool]]:
    """Returns the conditions of reasons that depend on what was seen of a gateway."""
    seen, most = SIGHTINGS.c, TOLERANCE.total_seconds()
    match attention:
        case Attention.OFFLINE:
            return [seen.at < freshness.offline_before(now).timestamp()]
        case Attention.CLOCK:
            return [or_(seen.clock_ahead_s > most, seen.clock_ahead_s < -most)]
    return []


def _marked(attention: Attention | None) -> list[ColumnElement[bool]]:
    """Returns the conditions of reasons that are columns."""
    match attention:
        case Attention.REVOKED:
            return [GATEWAYS.c.standing == Standing.REVOKED]
        case Attention.FAILED:
            return [GATEWAYS.c.failed.is_(True)]
        case Attention.DROPPED:
            return [GATEWAYS.c.dropped.is_(True)]
    return []


# ---- figures ----------------------------------------------------------------------------------------------


def cells(connection: Connection, blueprint: str | None) -> list[Cell]:
    """Returns the fleet as numbers of gateways by their values. Reads one index in its order, nothing of the rows."""
    g = GATEWAYS.c
    values = (g.blueprint, g.standing, g.phase, g.running_version, g.failed, g.dropped)
    query = select(*values, func.count()).where(g.standing.is_not(None)).group_by(*values)
    if blueprint is not None:
        query = query.where(g.blueprint == blueprint)
    return [Cell(row[0], Standing(row[1]), *row[2:]) for row in connection.execute(query)]


# ---- rows -------------------------------------------------------------------------------------------------


def with_sightings() -> Select[Any]:
    """Returns the query for the rows of gateways, with what was seen of each."""
    return select(GATEWAYS, SIGHTINGS.c.at, SIGHTINGS.c.clock_ahead_s).select_from(
        GATEWAYS.outerjoin(SIGHTINGS, GATEWAYS.c.gateway_id == SIGHTINGS.c.gateway_id)
    )


def _fleet() -> Select[Any]:
    return with_sightings().where(GATEWAYS.c.standing.is_not(None)).order_by(GATEWAYS.c.gateway_id)


def _member(row: Any) -> Member:
    report = _report(row.report) if row.report else None
    known = GatewayEnrolled.model_validate_json(row.enrolled)
    # A gateway resolves its plan with its own labels, so the prediction uses the newest labels that it reported.
    labels = (report.labels if report else {}) or known.labels
    return Member(
        identity=Identity(gateway_id=row.gateway_id, blueprint=row.blueprint, labels=labels),
        enrolled_at=known.at,
        report=report,
        failure=_report(row.failure) if row.failure else None,
        seen=sighting(row),
        standing=Standing(row.standing),
        enrolment=row.enrolment,
        moving_to=row.moving_to,
        revoked_at=time_of(row.revoked_at),
        revoked_because=row.revoked_because or "",
        reenrol_until=time_of(row.reenrol_until),
        credential_expires_at=time_of(row.expires_at),
        credential_due_at=time_of(row.due_at),
    )


def sighting(row: Any) -> Sighting | None:
    """Returns what was seen of a gateway, from a row of `with_sightings`; None if nothing was."""
    if row.at is None:
        return None
    ahead = timedelta(seconds=row.clock_ahead_s) if row.clock_ahead_s is not None else None
    return Sighting(datetime.fromtimestamp(row.at, UTC), ahead)


def _report(data: str) -> GatewayReported:
    return GatewayReported.model_validate_json(data)

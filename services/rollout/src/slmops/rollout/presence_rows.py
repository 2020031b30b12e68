"""When something of each gateway last arrived, how far its clock was off then, and who is offline.

Growth: one row per gateway. Recording a batch takes two calls of the database, whatever the size of the fleet. The
queries read an index, and only as many rows as they return.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from slmops.contracts import freshness
from slmops.contracts.clocks import TOLERANCE
from slmops.rollout.domain.clocks import WrongClock
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.tables import GATEWAYS, SIGHTINGS

_INSERT: Final[dict[str, Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_LOOKED_AT = 500


class Known(NamedTuple):
    """What the tables say of a gateway. `sequence`: of its newest recorded report; `last_sequence`: that of the newest
    report by its newest presence message, None without one."""

    enrolment: int
    revoked: bool
    sequence: int
    last_sequence: int | None


class Seen(NamedTuple):
    """A sign of life. `last_sequence`: what a presence message says; None for a report."""

    gateway_id: str
    sighting: Sighting
    last_sequence: int | None = None


def known(connection: Connection, gateway_ids: Collection[str]) -> dict[str, Known]:
    """Returns the enrolled ones of some hundred gateways, with one statement."""
    query = (
        select(
            GATEWAYS.c.gateway_id,
            GATEWAYS.c.enrolment,
            GATEWAYS.c.revoked_at,
            GATEWAYS.c.sequence,
            SIGHTINGS.c.last_sequence,
        )
        .select_from(GATEWAYS.outerjoin(SIGHTINGS, GATEWAYS.c.gateway_id == SIGHTINGS.c.gateway_id))
        .where(GATEWAYS.c.gateway_id.in_(gateway_ids), GATEWAYS.c.enrolled.is_not(None))
    )
    return {
        row.gateway_id: Known(row.enrolment, row.revoked_at is not None, row.sequence, row.last_sequence)
        for row in connection.execute(query)
    }


def saw(connection: Connection, seen: Iterable[Seen]) -> None:
    """Records signs of life, with one call of the database. An older one than the recorded one changes nothing.

    A difference of clocks that is not known now leaves the recorded one.
    """
    rows = [
        {
            "gateway_id": gateway_id,
            "at": sighting.at.timestamp(),
            "clock_ahead_s": sighting.clock_ahead.total_seconds() if sighting.clock_ahead is not None else None,
            "last_sequence": last_sequence,
        }
        # In order, because two processes that lock the same rows in different orders wait for each other.
        for gateway_id, sighting, last_sequence in sorted(seen, key=lambda one: (one.gateway_id, one.sighting.at))
    ]
    if not rows:
        return
    statement = _INSERT[connection.dialect.name](SIGHTINGS)
    new, old = statement.excluded, SIGHTINGS.c
    statement = statement.on_conflict_do_update(
        index_elements=[old.gateway_id],
        set_={
            "at": new.at,
            "clock_ahead_s": func.coalesce(new.clock_ahead_s, old.clock_ahead_s),
            "last_sequence": func.coalesce(new.last_sequence, old.last_sequence),
        },
        where=new.at >= old.at,
    )
    connection.execute(statement, rows)


def wrong_clocks(
    connection: Connection, now: datetime, blueprint: str | None = None, limit: int = 6
) -> list[WrongClock]:
    """Returns up to `limit` gateways that count, are not offline and have a wrong clock, of one blueprint or all.

    Growth: reads at most `_LOOKED_AT` wrong clocks from an index. If there are more, some of a blueprint may be missed.
    """
    # Not a join: without statistics the database may begin it with all gateways of the blueprint.
    ahead, tolerated = SIGHTINGS.c.clock_ahead_s, TOLERANCE.total_seconds()
    wrong = or_(ahead > tolerated, ahead < -tolerated)
    connected = SIGHTINGS.c.at >= freshness.offline_before(now).timestamp()
    query = select(SIGHTINGS.c.gateway_id, ahead).where(wrong, connected).limit(_LOOKED_AT)
    found = {row.gateway_id: row.clock_ahead_s for row in connection.execute(query)}
    if not found:
        return []
    counted = select(GATEWAYS.c.gateway_id).where(
        GATEWAYS.c.gateway_id.in_(found), GATEWAYS.c.revoked_at.is_(None), GATEWAYS.c.moving_to.is_(None)
    )
    if blueprint is not None:
        counted = counted.where(GATEWAYS.c.blueprint == blueprint)
    ids = connection.execute(counted.order_by(GATEWAYS.c.gateway_id).limit(limit)).scalars()
    return [WrongClock(gateway_id, timedelta(seconds=found[gateway_id])) for gateway_id in ids]

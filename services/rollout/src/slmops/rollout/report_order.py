"""Which report of a gateway is newer, if its sequence did not grow."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, select

from slmops.contracts.clocks import ReportMark, supersedes
from slmops.contracts.events import GatewayReported
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.tables import SIGHTINGS

log = logging.getLogger("slmops.rollout")


def counter_restarted(connection: Connection, event: GatewayReported, seen: Sighting, newest: str | None) -> bool:
    """Returns whether a report is newer than the `newest` stored one although its sequence is not higher, because the
    gateway lost its counter. Call it only then: it reads one row."""
    if newest is None or not event.boot:
        return False
    known = GatewayReported.model_validate_json(newest)
    if known.boot == event.boot:
        return False
    row = connection.execute(select(SIGHTINGS).where(SIGHTINGS.c.gateway_id == event.gateway_id)).first()
    before = Sighting(known.at)
    if row is not None:
        ahead = timedelta(seconds=row.clock_ahead_s) if row.clock_ahead_s is not None else None
        before = Sighting(datetime.fromtimestamp(row.at, UTC), ahead)
    restarted = supersedes(_mark(event, seen), _mark(known, before))
    if restarted:
        log.warning(
            "%s counts its reports from %d again, after %d: it lost its counter, or its disk was restored from a copy",
            event.gateway_id,
            event.sequence,
            known.sequence,
        )
    return restarted


def _mark(event: GatewayReported, seen: Sighting) -> ReportMark:
    return ReportMark.of(event.boot, event.sequence, event.at, seen.at, seen.clock_ahead)

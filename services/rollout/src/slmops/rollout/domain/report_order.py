"""Which report of a gateway is newer, if its sequence did not grow."""

from __future__ import annotations

import logging

from slmops.contracts.clocks import ReportMark, supersedes
from slmops.contracts.events import GatewayReported
from slmops.rollout.domain.fleet import Sighting

log = logging.getLogger("slmops.rollout")


def counter_restarted(event: GatewayReported, seen: Sighting, known: GatewayReported, known_seen: Sighting) -> bool:
    """Returns whether a report is newer than the newest `known` one although its sequence is not higher, because the
    gateway lost its counter. Says so in the log."""
    if not event.boot or known.boot == event.boot or not supersedes(_mark(event, seen), _mark(known, known_seen)):
        return False
    log.warning(
        "%s counts its reports from %d again, after %d: it lost its counter, or its disk was restored from a copy",
        event.gateway_id,
        event.sequence,
        known.sequence,
    )
    return True


def _mark(event: GatewayReported, seen: Sighting) -> ReportMark:
    return ReportMark.of(event.boot, event.sequence, event.at, seen.at, seen.clock_ahead)

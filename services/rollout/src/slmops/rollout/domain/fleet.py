"""The fleet inventory: gateways with their newest reports, and when these arrived."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from slmops.contracts.commands import Standing
from slmops.contracts.events import GatewayReported
from slmops.contracts.plan import Identity


@dataclass(frozen=True)
class Sighting:
    """When the newest report arrived, by our time, and how far the gateway's clock is ahead of it (None: unknown)."""

    at: datetime
    clock_ahead: timedelta | None = None

    @classmethod
    def of(cls, event: GatewayReported, arrived_at: datetime, clock_ahead: timedelta | None) -> Sighting:
        """Returns the sighting for a report. A report from the future is proof of a clock that is ahead, whether or not
        the time of its publication is known."""
        if clock_ahead is None and event.at > arrived_at:
            clock_ahead = event.at - arrived_at
        return cls(arrived_at, clock_ahead)


@dataclass(frozen=True)
class Member:
    """A gateway of the inventory. `report` is its newest report, `failure` its newest report with phase `failed`.

    The failure is kept separately because a failed gateway then reports that it is idle again.
    """

    identity: Identity
    enrolled_at: datetime
    report: GatewayReported | None = None
    failure: GatewayReported | None = None
    seen: Sighting | None = None
    standing: Standing = Standing.ENROLLED
    enrolment: int = 1
    moving_to: str | None = None
    revoked_at: datetime | None = None
    revoked_because: str = ""
    reenrol_until: datetime | None = None
    credential_expires_at: datetime | None = None
    credential_due_at: datetime | None = None

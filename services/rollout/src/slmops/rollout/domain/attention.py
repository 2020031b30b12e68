"""Why a person should look at a gateway. `inventory_rows` has the same rules as conditions on columns."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

from slmops.contracts import freshness
from slmops.contracts.clocks import is_wrong
from slmops.contracts.commands import Attention, Standing
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.rollout.domain.fleet import Member

EVERY: Final = tuple(Attention)


def attention_of(member: Member, now: datetime) -> tuple[Attention, ...]:
    """Returns the reasons in the order of `Attention`. A gateway that is revoked is expected to be offline."""
    if member.standing is Standing.REVOKED:
        return (Attention.REVOKED,)
    return tuple(_reasons(member, now))


def _reasons(member: Member, now: datetime) -> Iterator[Attention]:
    report, seen = member.report, member.seen
    if report is not None and is_failure(report):
        yield Attention.FAILED
    if freshness.is_offline(seen.at if seen else member.enrolled_at, now):
        yield Attention.OFFLINE
    if seen is not None and is_wrong(seen.clock_ahead):
        yield Attention.CLOCK
    if report is not None and has_dropped(report):
        yield Attention.DROPPED
    if member.credential_due_at is not None and member.credential_due_at < now:
        yield Attention.CREDENTIAL


def is_failure(report: GatewayReported) -> bool:
    """Returns whether a report is about a failure. A gateway repeats it as long as its plan names what failed."""
    return report.phase is UpdatePhase.FAILED or report.problem is not None


def has_dropped(report: GatewayReported) -> bool:
    return bool(report.dropped_reports or report.dropped_measurements)


def credential_due(issued_at: datetime, expires_at: datetime | None) -> datetime | None:
    """Returns from when a credential is late to be renewed; None if it never expires."""
    return issued_at + (expires_at - issued_at) * freshness.CREDENTIAL_DUE if expires_at else None

"""Batches into windows. Pure.

What always holds
1. A window is [n·length, (n+1)·length) of Unix time, so those of all releases and gateways coincide.
2. A batch lies in the window that its end lies in, and is summed once. A window of which batches come after it was
   closed is published again with those batches alone: windows add up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Final, NamedTuple

from slmops.contracts.errors import InvalidMessage, PermanentError
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.contracts.subjects import measurements

MAX_AHEAD: Final = timedelta(minutes=5)
"""A batch that ends further in the future has a wrong clock: its window would stay open until then."""
MAX_AGE: Final = timedelta(days=365)
"""An older one has a wrong clock too: a spool holds days."""
MAX_FIGURE: Final = 1e12
"""Far above what one interval can hold, and low enough that sums stay finite."""


class Cohort(NamedTuple):
    """What one window is of."""

    blueprint: str
    release: str
    version: str
    started_at: datetime


@dataclass(frozen=True)
class Pending:
    """A batch whose window is not published yet, with the trace that it came in."""

    batch: MeasurementBatch
    traceparent: str | None = None


def check(batch: MeasurementBatch, subject: str, now: datetime) -> None:
    """Raises `PermanentError` for a foreign subject, `InvalidMessage` for figures that cannot be."""
    if subject != measurements(batch.gateway_id):
        raise PermanentError(f"{batch.gateway_id} measures on another gateway's subject", where=subject)
    wrong = [
        what
        for what, found in (
            ("it ends before it starts", batch.ended_at < batch.started_at),
            (f"it ends more than {MAX_AHEAD} in the future", batch.ended_at > now + MAX_AHEAD),
            (f"it ended more than {MAX_AGE.days} days ago", batch.ended_at < now - MAX_AGE),
            (f"a figure is above {MAX_FIGURE:g}", max(_figures(batch)) > MAX_FIGURE),
            ("more requests failed than there were", batch.failed_requests > batch.requests),
            ("more requests are synthetic than there were", batch.synthetic_requests > batch.requests),
        )
        if found
    ]
    if wrong:
        raise InvalidMessage(
            f"batch of {batch.gateway_id}: {', '.join(wrong)}", fix="Check the gateway's clock and agent."
        )


def _figures(batch: MeasurementBatch) -> list[float]:
    return [
        batch.requests,
        batch.golden_passed,
        batch.golden_failed,
        batch.prompt_tokens,
        batch.completion_tokens,
        batch.decode_seconds,
        batch.ttft_seconds,
    ]


def window_start(at: datetime, length: timedelta) -> datetime:
    """The start of the window that `at` lies in, in UTC."""
    epoch = datetime.fromtimestamp(0, UTC)
    return epoch + (at - epoch) // length * length


def closing_before(now: datetime, length: timedelta, grace: timedelta) -> datetime:
    """Batches that end before this are in windows that are over, and had `grace` to arrive."""
    return window_start(now - grace, length)


def cohorts(pending: Iterable[Pending], length: timedelta) -> dict[Cohort, list[Pending]]:
    """Batches by the window that they lie in, windows in order."""

    def cohort(item: Pending) -> Cohort:
        batch = item.batch
        return Cohort(batch.blueprint, batch.release, batch.version, window_start(batch.ended_at, length))

    return {key: list(items) for key, items in groupby(sorted(pending, key=cohort), cohort)}


def aggregate(cohort: Cohort, batches: Iterable[MeasurementBatch], length: timedelta) -> CohortWindow:
    """The sums of at least one batch."""
    of = list(batches)
    return CohortWindow(
        blueprint=cohort.blueprint,
        release=cohort.release,
        version=cohort.version,
        started_at=cohort.started_at,
        ended_at=cohort.started_at + length,
        gateways=len({batch.gateway_id for batch in of}),
        requests=sum(batch.requests for batch in of),
        failed_requests=sum(batch.failed_requests for batch in of),
        golden_passed=sum(batch.golden_passed for batch in of),
        golden_failed=sum(batch.golden_failed for batch in of),
        completion_tokens=sum(batch.completion_tokens for batch in of),
        decode_seconds=sum(batch.decode_seconds for batch in of),
        ttft_seconds=sum(batch.ttft_seconds for batch in of),
    )

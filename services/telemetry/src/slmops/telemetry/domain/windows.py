"""Sums batches into windows. Pure.

Invariants
1. A window is [n·length, (n+1)·length) of Unix time, so the windows of all releases and gateways coincide.
2. A batch belongs to the window that contains its end, and is summed once. If batches arrive after their window was
   closed, a further window with only these batches is published, so windows can be added.
3. Times are the services' (`placed`): a gateway's wrong clock neither loses its batches nor keeps a window open.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Final, NamedTuple

from slmops.contracts.clocks import is_wrong
from slmops.contracts.errors import InvalidMessage, PermanentError
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.contracts.subjects import measurements

MAX_AHEAD: Final = timedelta(minutes=5)
"""A batch that ends later than this after its arrival comes from a wrong clock; its window would long stay open."""
MAX_AGE: Final = timedelta(days=365)
"""A batch that ended longer than this before its arrival also comes from a wrong clock."""
MAX_FIGURE: Final = 1e12
"""Far above every figure of one interval, and low enough that sums stay finite."""


class Cohort(NamedTuple):
    """The key of a window."""

    blueprint: str
    release: str
    version: str
    started_at: datetime


@dataclass(frozen=True)
class Pending:
    """A batch whose window is not published yet, with its trace."""

    batch: MeasurementBatch
    traceparent: str | None = None


def placed(batch: MeasurementBatch, arrived_at: datetime, ahead: timedelta | None) -> MeasurementBatch:
    """Returns a batch in the services' time.

    `ahead`: how far the gateway's clock was ahead when it sent the batch, if known. If the batch's times are impossible
    even then, it ends at its arrival.
    """
    took = min(max(batch.ended_at - batch.started_at, timedelta()), MAX_AGE)
    try:
        ended = batch.ended_at - ahead if ahead is not None and is_wrong(ahead) else batch.ended_at
    except OverflowError:  # outside the years 1 to 9999
        ended = arrived_at
    if not arrived_at - MAX_AGE <= ended <= arrived_at + MAX_AHEAD:
        ended = arrived_at
    return batch.model_copy(update={"started_at": ended - took, "ended_at": ended})


def check(batch: MeasurementBatch, subject: str) -> None:
    """Raises `PermanentError` for another gateway's subject, `InvalidMessage` for impossible figures."""
    if subject != measurements(batch.gateway_id):
        raise PermanentError(f"the batch of {batch.gateway_id} is on another gateway's subject", where=subject)
    wrong = [
        what
        for what, found in (
            (f"a figure is above {MAX_FIGURE:g}", max(_figures(batch)) > MAX_FIGURE),
            ("it has more failed requests than requests", batch.failed_requests > batch.requests),
            ("it has more synthetic requests than requests", batch.synthetic_requests > batch.requests),
        )
        if found
    ]
    if wrong:
        raise InvalidMessage(
            f"the batch of {batch.gateway_id} is not valid: {', '.join(wrong)}",
            fix="Check the gateway's agent.",
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
    """Returns the start of the window that contains `at`, in UTC."""
    epoch = datetime.fromtimestamp(0, UTC)
    return epoch + (at - epoch) // length * length


def closing_before(now: datetime, length: timedelta, grace: timedelta) -> datetime:
    """Returns a time: batches that end before it are in windows that ended at least `grace` ago."""
    return window_start(now - grace, length)


def cohorts(pending: Iterable[Pending], length: timedelta) -> dict[Cohort, list[Pending]]:
    """Groups batches by window; the windows are in order."""

    def cohort(item: Pending) -> Cohort:
        batch = item.batch
        return Cohort(batch.blueprint, batch.release, batch.version, window_start(batch.ended_at, length))

    return {key: list(items) for key, items in groupby(sorted(pending, key=cohort), cohort)}


def aggregate(cohort: Cohort, batches: Iterable[MeasurementBatch], length: timedelta) -> CohortWindow:
    """Returns the sums of at least one batch."""
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

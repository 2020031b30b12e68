"""Checks batches, places them in time and makes windows of their sums. Pure.

Invariants
1. A window is [n·length, (n+1)·length) of Unix time, so the windows of all releases and gateways coincide.
2. A batch belongs to the window that contains its end, and is summed once. If batches arrive after their window was
   closed, a further window with only these batches is published, so windows can be added.
3. Times are the services' (`ended_at`): a gateway's wrong clock neither loses its batches nor keeps a window open.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from slmops.contracts.errors import InvalidMessage, PermanentError
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.contracts.subjects import measurements

MAX_AHEAD: Final = timedelta(minutes=5)
"""A batch that ends later than this after its arrival comes from a wrong clock; its window would long stay open."""
MAX_AGE: Final = timedelta(days=365)
"""A batch that ended longer than this before its arrival also comes from a wrong clock."""
MAX_FIGURE: Final = 1e12
"""Far above every figure of one interval, and low enough that sums stay finite."""
_EPOCH: Final = datetime.fromtimestamp(0, UTC)


class Sums(NamedTuple):
    """Sums over batches. The names are those of the batches' and the windows' fields."""

    requests: int
    failed_requests: int
    golden_passed: int
    golden_failed: int
    completion_tokens: int
    decode_seconds: float
    ttft_seconds: float


class Cohort(NamedTuple):
    """The key of a window. `started_at`: the start of the window."""

    started_at: datetime
    blueprint: str
    release: str
    version: str


@dataclass(frozen=True, slots=True)
class Pending:
    """A checked batch with its end in the services' time, and its trace."""

    batch: MeasurementBatch
    ended_at: datetime
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The sums of a window that is over. `rows`: how many were summed. `traceparent`: one of its batches', if any."""

    cohort: Cohort
    gateways: int
    rows: int
    sums: Sums
    traceparent: str | None = None


def ended_at(batch: MeasurementBatch, arrived_at: datetime, ahead: timedelta | None) -> datetime:
    """Returns the end of a batch in the services' time.

    `ahead`: how far the gateway's clock was ahead of the services' when it sent the batch. The batch ended as long
    before its arrival as it waited on the gateway, by the gateway's clock, which may be as wrong as it likes. If the
    clock was set back meanwhile, the batch ends at its arrival.

    None: the gateway does not say when it sent the batch. Its end counts as it says, unless that is impossible.
    """
    try:
        ended = batch.ended_at if ahead is None else min(batch.ended_at - ahead, arrived_at)
    except OverflowError:  # outside the years 1 to 9999
        return arrived_at
    return ended if arrived_at - MAX_AGE <= ended <= arrived_at + MAX_AHEAD else arrived_at


def check(batch: MeasurementBatch, subject: str) -> None:
    """Raises `PermanentError` for another gateway's subject, `InvalidMessage` for impossible figures."""
    if subject != measurements(batch.gateway_id):
        raise PermanentError(f"the batch of {batch.gateway_id} is on another gateway's subject", where=subject)
    wrong = []
    if max(_figures(batch)) > MAX_FIGURE:
        wrong.append(f"a figure is above {MAX_FIGURE:g}")
    if batch.failed_requests > batch.requests:
        wrong.append("it has more failed requests than requests")
    if batch.synthetic_requests > batch.requests:
        wrong.append("it has more synthetic requests than requests")
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
    return _EPOCH + (at - _EPOCH) // length * length


def closing_before(now: datetime, length: timedelta, grace: timedelta) -> datetime:
    """Returns a time: batches that end before it are in windows that ended at least `grace` ago."""
    return window_start(now - grace, length)


def window_of(ended: Ended, length: timedelta) -> CohortWindow:
    """Returns the window that is published. Raises `ValidationError` for sums that are not finite."""
    key = ended.cohort
    return CohortWindow(
        blueprint=key.blueprint,
        release=key.release,
        version=key.version,
        started_at=key.started_at,
        ended_at=key.started_at + length,
        gateways=ended.gateways,
        **ended.sums._asdict(),
    )

"""The clocks of gateways. Ages and order are those of the services; a gateway's clock may be wrong and is compared.

A gateway sends its time with each report and measurement, and every answer of a service has the service's time.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, NamedTuple

SENT_AT_HEADER: Final = "slmops-sent-at"
"""Time of the sender's clock when it published the message; absent in results that were carried by a person."""
TIME_HEADER: Final = "slmops-time"
"""Time of the service's clock when it answered."""
TOLERANCE: Final = timedelta(minutes=1)
"""A smaller difference may be the time that a message took, and harms nothing."""


class ReportMark(NamedTuple):
    """The place of a report among those of its gateway. `boot` is empty in reports of a release without it."""

    boot: str
    sequence: int
    made_at: float
    """Unix seconds by the services' clock, as far as it is known."""

    @classmethod
    def of(
        cls, boot: str, sequence: int, made: datetime, arrived: datetime, clock_ahead: timedelta | None
    ) -> ReportMark:
        """`made` is a time of the gateway's clock; the report was not made after it `arrived`."""
        ahead = clock_ahead.total_seconds() if clock_ahead is not None else 0.0
        return cls(boot, sequence, min(made.timestamp() - ahead, arrived.timestamp()))


NO_REPORT: Final = ReportMark("", 0, float("-inf"))
"""Every report is newer."""


def supersedes(new: ReportMark, known: ReportMark) -> bool:
    """Returns whether a report is newer than the newest known one of its gateway.

    The sequence decides, because clocks may be wrong. If a gateway loses its counter or its disk is restored from a
    copy, its sequence goes back. That happens only between two boots, and then the report that was made later is newer.
    Otherwise its reports would be ignored until the sequence has caught up. A report from before the loss that arrives
    late, with a higher sequence, counts until the gateway's next report.
    """
    if new.sequence > known.sequence:
        return True
    return new.boot not in ("", known.boot) and new.made_at > known.made_at


def is_wrong(ahead: timedelta | None) -> bool:
    """Returns whether a clock that is `ahead` of the services' clock is wrong; False if the difference is unknown."""
    return ahead is not None and abs(ahead) > TOLERANCE


def clock_text(ahead: timedelta) -> str:
    """Returns a text like `3 days and 2:00:05 ahead of the services' clock`."""
    difference = timedelta(seconds=round(abs(ahead).total_seconds()))
    days, rest = difference.days, difference - timedelta(days=difference.days)
    length = f"{days} day{'s' * (days > 1)} and {rest}" if days else str(rest)
    return f"{length} {'ahead of' if ahead > timedelta() else 'behind'} the services' clock"


def time_in(header: str | None) -> datetime | None:
    """Returns the aware time in a header; None if there is none. Anybody may send any text."""
    try:
        found = datetime.fromisoformat(header or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else None

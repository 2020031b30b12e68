"""Time as a dependency: code that depends on time takes a clock as a parameter, so tests can pass another clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the present as an aware datetime in UTC."""


def utc_now() -> datetime:
    return datetime.now(UTC)

"""Warns before metadata that keyholders must sign expires, because people need weeks to come together.

Expired root or targets metadata stops every installation in the fleet. Metadata of the packager's own roles is renewed
automatically and needs no warning; its dates are in the metric, so that an alarm finds a renewal that fails.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from prometheus_client import Gauge

from slmops.contracts import freshness
from slmops.kit.trust.folder import OFFLINE_ROLES

log = logging.getLogger("slmops.trust")
EXPIRES = Gauge("slmops_trust_expires_timestamp_seconds", "Unix time when trust metadata expires", ["role"])
_REMIND_EVERY: Final = timedelta(days=1)


class Validity(StrEnum):
    VALID = "valid"
    EXPIRES_SOON = "expires soon"
    EXPIRED = "expired"


def validity(expires: datetime, now: datetime) -> Validity:
    if expires <= now:
        return Validity.EXPIRED
    return Validity.EXPIRES_SOON if expires - now <= freshness.WARN_AHEAD else Validity.VALID


def warning(role: str, expires: datetime, now: datetime) -> str | None:
    """Returns the warning about a keyholders' role, with its remedy; None while it is valid for long enough."""
    renewed = "targets" if role not in ("root", "targets") else role  # revoked is signed again with targets
    fix = f"Renew it with its keyholders: slmops trust rotate {renewed} --keep-keys."
    match validity(expires, now):
        case Validity.EXPIRED:
            return f"{role} expired on {expires:%Y-%m-%d}: gateways install nothing. {fix}"
        case Validity.EXPIRES_SOON:
            days = (expires - now).days
            return f"{role} expires on {expires:%Y-%m-%d}, in {days} days. Then gateways install nothing. {fix}"
        case Validity.VALID:
            return None


class ExpiryWatch:
    """Sets the metric and logs each warning once a day."""

    def __init__(self) -> None:
        self._reminded: dict[str, datetime] = {}

    def note(self, expiries: Mapping[str, datetime], now: datetime) -> None:
        """Takes the expiry dates of the published metadata by role."""
        for role, expires in expiries.items():
            EXPIRES.labels(role).set(expires.timestamp())
            text = warning(role, expires, now) if role in OFFLINE_ROLES else None
            if text is None:
                self._reminded.pop(role, None)
            elif role not in self._reminded or now - self._reminded[role] >= _REMIND_EVERY:
                self._reminded[role] = now
                log.warning("trust metadata: %s", text)

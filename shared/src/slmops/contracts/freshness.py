"""The validity periods of signed documents: one table for signers and verifiers.

A signer renews after half of the time. A verifier rejects an expired document as `freeze` or `expired`
(`contracts.tuf_names.Attack`).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

TIMESTAMP: Final = timedelta(days=1)
"""The repository's newest state. A gateway that gets no newer one for this long installs nothing new."""
SNAPSHOT: Final = timedelta(days=7)
DELEGATED: Final = timedelta(days=90)
"""Targets of one model."""
KEYHOLDERS: Final = timedelta(days=365)
"""Root and targets, which people sign with keys that are kept offline."""
WARN_AHEAD: Final = timedelta(days=60)
"""How long before their expiry root and targets are reported as about to expire."""
PLAN: Final = timedelta(days=7)
MAX_GRACE: Final = timedelta(days=90)
"""The longest time after expiry for which a gateway without a network may be configured to accept a bundle."""
OFFLINE_AFTER: Final = timedelta(minutes=30)
"""A gateway from which nothing arrived for this long counts as offline."""
CREDENTIAL_DUE: Final = 0.875
"""Share of a credential's life. A gateway renews after two thirds, so an older credential was not renewed in time."""


def offline_before(now: datetime) -> datetime:
    """Returns the time before which nothing arrived from a gateway that is offline at `now`. Both by the services'
    clock."""
    return now - OFFLINE_AFTER


def is_offline(last_seen: datetime, now: datetime) -> bool:
    return last_seen < offline_before(now)

"""How old things may be: the validity periods of signed documents, and the last sign of life of a gateway. One table
for everybody who makes them and everybody who judges them.

A signer renews after half of the time. A verifier rejects an expired document as `freeze` or `expired`
(`contracts.tuf_names.Attack`).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

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

CREDENTIAL_DUE: Final = 0.875
"""Share of a credential's life. A gateway renews after two thirds, so an older credential was not renewed in time."""

# ---- gateways ---------------------------------------------------------------------------------------------

PRESENCE: Final = timedelta(minutes=10)
"""The longest time between two presence messages of a connected gateway; on average three quarters of it."""
OFFLINE_AFTER: Final = 3 * PRESENCE
"""A gateway of which nothing arrived for so long is offline: three presence messages are missing."""
FULL_REPORT: Final = timedelta(days=1)
"""The longest time between two full reports of a gateway, even if nothing changed. A service that lost its database, or
a stream whose messages expired, is complete again after it."""


class GatewayPresence(BaseModel):
    """A connected gateway exists, and nothing changed. Published on `presence.<gateway_id>` every 5 to 10 minutes.

    It is not an event: only the newest one of a gateway is kept, and only for an hour. Its time of arrival counts. It
    has no id, because handling it twice changes nothing, and the gateway does not wait for an acknowledgement.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    enrolment: int = Field(default=0, ge=0, le=2**31 - 1, description="Enrolment of its credential; 0: none yet")
    sequence: int = Field(
        default=0, ge=0, le=2**63 - 1, description="Sequence of its newest report, so that a missing one is noticed"
    )


def offline_before(now: datetime) -> datetime:
    """Returns the time before which nothing was heard of a gateway that is offline at `now`. Both by the services'
    clock."""
    return now - OFFLINE_AFTER


def is_offline(last_seen: datetime, now: datetime) -> bool:
    """Returns whether a gateway is offline. `last_seen`: when its newest report or presence message arrived."""
    return last_seen < offline_before(now)

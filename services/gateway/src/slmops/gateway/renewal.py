"""When a gateway renews its credential, and how long it waits when it is refused. Pure."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Final

from slmops.kit.bus.nats_auth import GatewayClaims

_EARLIEST, _LATEST = 0.6, 0.7333
"""Shares of a credential's life. On average two thirds; a fleet that enrolled at once renews over an eighth of it."""
_ENDLESS_WITHIN: Final = timedelta(minutes=10)
_FIRST, _LONGEST = timedelta(minutes=1), timedelta(hours=1)


def due(claims: GatewayClaims, connected_at: datetime) -> datetime:
    """Returns when to renew a credential. One of an earlier release, which never expires, is renewed soon, once."""
    share = _spread(claims.gateway_id)
    if claims.expires_at is None:
        return connected_at + share * _ENDLESS_WITHIN
    life = claims.expires_at - claims.issued_at
    return claims.issued_at + life * (_EARLIEST + share * (_LATEST - _EARLIEST))


def patience(refusals: int) -> timedelta:
    """Returns the pause after that many refusals of a revoked gateway: from a minute to an hour."""
    return min(_FIRST * (1 << min(refusals, 10)), _LONGEST)


def _spread(gateway_id: str) -> float:
    """Returns a number from 0 to 1 that is the same for a gateway at every start."""
    return int.from_bytes(hashlib.sha256(gateway_id.encode()).digest()[:8], "big") / 2**64

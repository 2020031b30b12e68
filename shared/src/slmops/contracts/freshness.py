"""How long what is signed stays valid: one table for those who sign and those who verify.

Whoever signs renews after half of the time. A verifier that meets something older refuses it as `freeze` or `expired`
(`contracts.trust.Attack`).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

TIMESTAMP: Final = timedelta(days=1)
"""The repository's newest state. A gateway that gets no newer one for so long installs nothing new."""
SNAPSHOT: Final = timedelta(days=7)
DELEGATED: Final = timedelta(days=90)
"""Targets of one model."""
KEYHOLDERS: Final = timedelta(days=365)
"""Root and targets, which people sign with keys that are kept offline."""
PLAN: Final = timedelta(days=7)
MAX_GRACE: Final = timedelta(days=90)
"""The most by which a gateway without a network may be allowed to exceed the dates of a bundle."""

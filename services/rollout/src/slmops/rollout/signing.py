"""Signs plans with this service's own key. Gateways require this signature and the packager's."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from slmops.contracts.plan import Plan
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import sign_plan, still_good


class PlanSigner:
    """Signs plans. The key is read for each use, so a rotated key takes effect without a restart."""

    def __init__(self, key: Path) -> None:
        self._key = key

    async def open(self) -> None:
        """Checks the key. Raises `InvalidMessage` for a key that cannot sign."""
        read_key(self._key)

    def sign(self, plan: Plan, now: datetime) -> bytes:
        return sign_plan(plan, read_key(self._key), now)

    def still_good(self, held: bytes, plan: Plan, now: datetime) -> bool:
        """Returns whether `held` is this plan with our signature and more than half of its time left."""
        return still_good(held, plan, read_key(self._key), now)

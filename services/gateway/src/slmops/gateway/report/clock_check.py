"""Compares this device's clock with the services', and names it as the cause of a trust problem that it explains."""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import timedelta

from prometheus_client import Gauge

from slmops.contracts.clocks import clock_text, is_wrong
from slmops.contracts.commands import FetchMetadata
from slmops.contracts.errors import Problem, SlmopsError, TrustRefused
from slmops.contracts.tuf_names import Attack
from slmops.kit.bus.client import BusClient

log = logging.getLogger(__name__)
_EVERY = timedelta(hours=1)
_AHEAD = Gauge(
    "slmops_clock_ahead_seconds", "How far this device's clock is ahead of the services'; negative if behind"
)
_BY_THE_CLOCK = frozenset({Attack.FREEZE.value, Attack.EXPIRED.value})


class ClockCheck:
    """Holds the connection whose answers have the services' time."""

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._client: BusClient | None = None

    @property
    def ahead(self) -> timedelta | None:
        """How far this device's clock is ahead of the services'; None before their first answer."""
        return self._client.clock_ahead if self._client else None

    async def watch(self, client: BusClient) -> None:
        """Compares the clocks now and every hour, and logs a difference. Runs until cancelled."""
        self._client = client
        while True:
            try:
                await client.request(FetchMetadata(gateway_id=self._gateway_id, file="timestamp.json"))
            except SlmopsError as error:  # also a refusal has the service's time
                log.debug("no metadata: %s", error)
            if self.ahead is not None:
                _AHEAD.set(self.ahead.total_seconds())
                if is_wrong(self.ahead):
                    log.warning("this device's clock is %s: correct it", clock_text(self.ahead))
            # Jitter, so that a fleet that connects at the same moment does not ask at the same moment.
            await asyncio.sleep(_EVERY.total_seconds() * random.uniform(0.75, 1.25))

    def explained(self, problem: Problem | None) -> Problem | None:
        """Returns a problem, with the clock as its cause if something expired only by this device's wrong clock."""
        if problem is None or self.ahead is None or not is_wrong(self.ahead):
            return problem
        if problem.code != TrustRefused.code or problem.what.partition(":")[0] not in _BY_THE_CLOCK:
            return problem
        what = f"{problem.what}. The clock of this gateway is {clock_text(self.ahead)}"
        return problem.model_copy(update={"what": what, "fix": "Correct the gateway's clock."})

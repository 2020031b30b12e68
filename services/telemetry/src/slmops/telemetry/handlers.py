"""Measurement batches in, cohort windows out."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta

from slmops.contracts.errors import TemporaryError
from slmops.contracts.events import CohortMeasured
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.subjects import measurements
from slmops.kit.bus import Bus, Delivered
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, Unit
from slmops.kit.tracing import span
from slmops.telemetry import store
from slmops.telemetry.domain import Cohort, Pending, aggregate, check, closing_before, cohorts

log = logging.getLogger("slmops.telemetry")
_TICK_S = 0.5


class Handlers:
    def __init__(self, journal: Journal, clock: Clock, window: timedelta, grace: timedelta) -> None:
        self._journal = journal
        self._clock = clock
        self._window = window
        self._grace = grace

    async def on_batch(self, batch: MeasurementBatch, delivered: Delivered) -> None:
        """Keep a batch once. Raises `PermanentError`, `InvalidMessage` for one that cannot be true."""
        check(batch, delivered.subject, self._clock())
        await self._journal.transact(lambda unit: store.add(unit, Pending(batch, delivered.traceparent)))

    async def run(self) -> None:
        """Closes windows until cancelled."""
        while True:
            try:
                await self.close_windows()
            except TemporaryError as error:
                log.warning("windows wait for the next tick: %s", error)
            await asyncio.sleep(_TICK_S)

    async def close_windows(self) -> None:
        """Tell every window that is over, and forget its batches, in one transaction: each batch is told once."""
        limit = closing_before(self._clock(), self._window, self._grace)
        if await self._journal.read(lambda connection: store.ended_before(connection, limit)):
            await self._journal.transact(lambda unit: self._close(unit, limit))

    def _close(self, unit: Unit, limit: datetime) -> None:
        over = store.take_ended_before(unit.connection, limit)
        for cohort, items in cohorts(over, self._window).items():
            self._tell(unit, cohort, items)

    def _tell(self, unit: Unit, cohort: Cohort, items: list[Pending]) -> None:
        window = aggregate(cohort, (item.batch for item in items), self._window)
        # A window sums batches of many traces and continues one of them: that of the newest batch that has one.
        parent = next((item.traceparent for item in reversed(items) if item.traceparent), None)
        with span("close window", parent=parent, blueprint=cohort.blueprint, version=cohort.version):
            event = CohortMeasured(blueprint=cohort.blueprint, window=window, at=self._clock())
            unit.emit(f"cohort:{cohort.blueprint}", [event])


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.consume(measurements("*"), MeasurementBatch, handlers.on_batch)

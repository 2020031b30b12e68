"""Handles measurement batches, enrolments and rollouts, and publishes cohort windows of the expected batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from slmops.contracts.errors import Denied, TemporaryError
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayRemoved,
    GatewayRevoked,
    RolloutCompleted,
    RolloutRolledBack,
    RolloutStageAdvanced,
    RolloutStarted,
)
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.subjects import measurements
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.tracing import span
from slmops.telemetry import store
from slmops.telemetry.domain.expectation import Offer, offers_of, refusal
from slmops.telemetry.domain.windows import Cohort, Pending, aggregate, check, closing_before, cohorts, placed
from slmops.telemetry.fleet import Fleet

log = logging.getLogger("slmops.telemetry")
CONSUMED_KEPT = timedelta(days=30)
"""How long a batch that arrives again is recognized. An older one counts in a window that no gate reads any more."""
WINDOWS_KEPT = timedelta(days=7)
"""How long published windows stay in the journal, from which nothing replays them. The bus keeps them for 30 days."""
_FORGET_EVERY = timedelta(hours=1)
_TICK_S = 0.5
_PAGE = 500


class Handlers:
    def __init__(self, journal: Journal, fleet: Fleet, clock: Clock, window: timedelta, grace: timedelta) -> None:
        self._journal = journal
        self._fleet = fleet
        self._clock = clock
        self._window = window
        self._grace = grace

    async def on_batch(self, batch: MeasurementBatch, delivered: MessageContext) -> None:
        """Stores a batch once, in one transaction, whatever the size of the fleet.

        Raises `PermanentError` and `InvalidMessage` for an invalid batch, `Denied` for an unexpected one.
        """
        check(batch, delivered.subject)
        pending = Pending(placed(batch, delivered.arrived_at, delivered.clock_ahead), delivered.traceparent)
        if await self._journal.transact(lambda unit: _keep(unit, pending)):
            await self._keep_by_current_state(pending)

    async def on_fact(self, event: Event, _delivered: MessageContext) -> None:
        """Records who belongs to the fleet, or an event of a rollout."""
        await self._journal.transact(lambda unit: store.record_fact(unit.connection, event))

    async def _keep_by_current_state(self, pending: Pending) -> None:
        """Checks a batch against the current state on the bus, because the tables may be behind. Raises `Denied`."""
        batch = pending.batch
        await self._catch_up()
        enrolled = await self._fleet.enrolled(batch.gateway_id)
        plan = await self._fleet.plan(batch.blueprint)

        def work(unit: UnitOfWork) -> str:
            if enrolled is not None:
                store.record_member(unit.connection, enrolled)
            return _keep(unit, pending, offers_of(plan, batch.release, batch.ended_at) if plan else [])

        if why := await self._journal.transact(work):
            raise Denied(why, fix="If the gateway works correctly, replay the batch when its rollout has reached it.")

    async def _catch_up(self) -> None:
        """Reads all stored events of rollouts, including those that were not delivered yet."""
        page: list[tuple[int, Event]] = []
        async for one in self._fleet.rollouts(await self._journal.read(store.caught_up)):
            page.append(one)
            if len(page) >= _PAGE:
                await self._record(page)
                page = []
        if page:
            await self._record(page)

    async def _record(self, page: Sequence[tuple[int, Event]]) -> None:
        await self._journal.transact(lambda unit: store.record_rollouts(unit.connection, page))

    async def run(self) -> None:
        """Closes windows until cancelled. Reads the history of rollouts first, so that no batch waits for it."""
        behind, forget_at = True, self._clock()
        while True:
            try:
                if behind:
                    await self._catch_up()
                    behind = False
                await self.close_windows()
                if self._clock() >= forget_at:
                    await self.forget_old()
                    forget_at = self._clock() + _FORGET_EVERY
            except TemporaryError as error:
                log.warning("could not close windows, retrying at the next tick: %s", error)
            await asyncio.sleep(_TICK_S)

    async def close_windows(self) -> None:
        """Publishes ended windows and deletes their batches in one transaction, so each batch counts once."""
        limit = closing_before(self._clock(), self._window, self._grace)
        if await self._journal.read(lambda connection: store.ended_before(connection, limit)):
            await self._journal.transact(lambda unit: self._close(unit, limit))

    async def forget_old(self) -> None:
        """Forgets batches that were consumed, windows that were published and gateways that were removed, long ago."""
        now = self._clock()
        while await self._journal.forget_consumed(now - CONSUMED_KEPT):
            pass
        while await self._journal.forget_published(now - WINDOWS_KEPT):
            pass
        await self._journal.transact(lambda unit: store.forget_revoked(unit.connection, now - CONSUMED_KEPT))

    def _close(self, unit: UnitOfWork, limit: datetime) -> None:
        over = store.of_counted(unit.connection, store.take_ended_before(unit.connection, limit))
        for cohort, items in cohorts(over, self._window).items():
            self._publish(unit, cohort, items)

    def _publish(self, unit: UnitOfWork, cohort: Cohort, items: list[Pending]) -> None:
        window = aggregate(cohort, (item.batch for item in items), self._window)
        # A window sums batches of many traces and continues one of them: the trace of the newest batch that has one.
        parent = next((item.traceparent for item in reversed(items) if item.traceparent), None)
        with span("close window", parent=parent, blueprint=cohort.blueprint, version=cohort.version):
            event = CohortMeasured(blueprint=cohort.blueprint, window=window, at=self._clock())
            unit.emit(f"cohort:{cohort.blueprint}", [event])


def _keep(unit: UnitOfWork, pending: Pending, more: Sequence[Offer] = ()) -> str:
    """Stores a batch that the tables or `more` expect; otherwise returns the reason why not.

    A batch that waited on its gateway since before the gateway was moved is dropped: it counts nowhere any more.
    """
    batch, connection = pending.batch, unit.connection
    enrolled = store.member(connection, batch.gateway_id)
    if enrolled is not None and enrolled.moved_from == batch.blueprint != enrolled.identity.blueprint:
        log.info("dropped a batch of %s from before it was moved from %s", batch.gateway_id, batch.blueprint)
        return ""
    if store.is_revoked(connection, batch.gateway_id):
        return f"{batch.gateway_id} was revoked"
    offers = [*store.offers(connection, batch.blueprint, batch.release), *more]
    why = refusal(batch, enrolled.identity if enrolled else None, offers)
    if not why:
        store.add(unit, pending)
    return why


def routes(bus: Bus, handlers: Handlers) -> None:
    for kind in (GatewayEnrolled, GatewayRevoked, GatewayRemoved):
        bus.on(kind, handlers.on_fact)
    for change in (RolloutStarted, RolloutStageAdvanced, RolloutCompleted, RolloutRolledBack):
        bus.on(change, handlers.on_fact)
    bus.consume(measurements("*"), MeasurementBatch, handlers.on_batch)

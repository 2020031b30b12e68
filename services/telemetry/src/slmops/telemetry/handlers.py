"""Handles measurement batches, enrolments and rollouts, and publishes cohort windows of the expected batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache, partial
from operator import attrgetter

from slmops.contracts.errors import Denied, PermanentError, TemporaryError
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
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.tracing import span
from slmops.telemetry import repetitions, store, sums
from slmops.telemetry.domain.expectation import Offer, offers_of, refusal
from slmops.telemetry.domain.windows import Ended, Pending, check, closing_before, ended_at, window_of
from slmops.telemetry.fleet import Fleet
from slmops.telemetry.skew import WrongClocks

log = logging.getLogger("slmops.telemetry")
CONSUMED_KEPT = timedelta(days=30)
"""How long a batch that arrives again is recognized. An older one counts in a window that no gate reads any more."""
WINDOWS_KEPT = timedelta(days=7)
"""How long published windows stay in the journal, from which nothing replays them. The bus keeps them for 30 days."""
_FORGET_EVERY = timedelta(hours=1)
_TICK_S = 0.5
_PAGE = 500
_gateway, _blueprint = attrgetter("gateway_id"), attrgetter("blueprint")


class Handlers:
    def __init__(self, journal: Journal, fleet: Fleet, clock: Clock, window: timedelta, grace: timedelta) -> None:
        self._journal = journal
        self._fleet = fleet
        self._clock = clock
        self._window = window
        self._grace = grace
        self._clocks = WrongClocks()

    async def on_batches(self, received: Batch[MeasurementBatch]) -> Refused:
        """Stores measurement batches once each, all in one transaction, whatever the size of the fleet.

        Returns `PermanentError` and `InvalidMessage` for an invalid one, `Denied` for an unexpected one.
        """
        refused: dict[int, Exception] = {}
        pending: dict[int, Pending] = {}
        for index, (batch, delivered) in enumerate(received):
            try:
                check(batch, delivered.subject)
            except PermanentError as error:
                refused[index] = error
                continue
            ahead = delivered.clock_ahead
            self._clocks.note(batch.gateway_id, ahead)
            ended = ended_at(batch, delivered.arrived_at, ahead)
            pending[index] = Pending(batch, ended, delivered.traceparent)
        if unexpected := await self._journal.transact(lambda unit: self._keep(unit, pending, lambda _each: [])):
            refused |= await self._keep_by_current_state({index: pending[index] for index in unexpected})
        return refused

    async def on_fact(self, event: Event, _delivered: MessageContext) -> None:
        """Records who belongs to the fleet, or an event of a rollout."""
        await self._journal.transact(lambda unit: store.record_fact(unit.connection, event))

    async def on_enrolments(self, received: Batch[GatewayEnrolled]) -> Refused:
        """Records enrolments in one transaction: a new database reads those of the whole fleet."""

        def work(unit: UnitOfWork) -> None:
            for event, _ in received:
                store.record_fact(unit.connection, event)

        await self._journal.transact(work)
        return {}

    async def _keep_by_current_state(self, pending: Mapping[int, Pending]) -> dict[int, Exception]:
        """Checks batches against the current state on the bus, because the tables may be behind; returns `Denied`."""
        await self._catch_up()
        gateways, blueprints = ({key(each.batch) for each in pending.values()} for key in (_gateway, _blueprint))
        enrolled = await asyncio.gather(*map(self._fleet.enrolled, gateways))
        plans = dict(zip(blueprints, await asyncio.gather(*map(self._fleet.plan, blueprints)), strict=True))

        def current(each: Pending) -> list[Offer]:
            plan = plans[each.batch.blueprint]
            return offers_of(plan, each.batch.release, each.ended_at) if plan else []

        def work(unit: UnitOfWork) -> dict[int, str]:
            for member in filter(None, enrolled):
                store.record_member(unit.connection, member)
            return self._keep(unit, pending, current)

        fix = "If the gateway works correctly, replay the batch when its rollout has reached it."
        return {index: Denied(why, fix=fix) for index, why in (await self._journal.transact(work)).items()}

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
        """Publishes ended windows and deletes their sums in one transaction, so each batch counts once."""
        limit = closing_before(self._clock(), self._window, self._grace)
        if await self._journal.read(lambda connection: sums.any_ended(connection, limit)):
            await self._journal.transact(lambda unit: self._close(unit, limit))

    async def forget_old(self) -> None:
        """Forgets batches that were consumed, windows that were published and gateways that were removed, long ago."""
        now = self._clock()
        while await self._journal.forget_consumed(now - CONSUMED_KEPT):
            pass
        while await self._journal.forget_published(now - WINDOWS_KEPT):
            pass
        await self._journal.transact(lambda unit: store.forget_revoked(unit.connection, now - CONSUMED_KEPT))
        await self._journal.transact(lambda unit: repetitions.forget_before(unit.connection, now - CONSUMED_KEPT))

    def _close(self, unit: UnitOfWork, limit: datetime) -> None:
        for ended in sums.take_ended(unit.connection, limit, self._window):
            self._publish(unit, ended)

    def _publish(self, unit: UnitOfWork, ended: Ended) -> None:
        window = window_of(ended, self._window)
        # A window sums batches of many traces and continues one of them.
        with span("close window", parent=ended.traceparent, blueprint=window.blueprint, version=window.version):
            event = CohortMeasured(blueprint=window.blueprint, window=window, at=self._clock())
            unit.emit(f"cohort:{window.blueprint}", [event])

    def _keep(
        self, unit: UnitOfWork, pending: Mapping[int, Pending], more: Callable[[Pending], list[Offer]]
    ) -> dict[int, str]:
        """Counts the batches that the tables or `more` expect; returns the reasons why not for the others.

        A batch that waited on its gateway since before the gateway was moved is dropped: it counts nowhere any more.
        Growth: four statements for all batches, and one for each release among them.
        """
        connection = unit.connection
        offers = cache(partial(store.offers, connection))
        members = store.members(connection, {each.batch.gateway_id for each in pending.values()})
        refused: dict[int, str] = {}
        kept: list[Pending] = []
        for index, each in pending.items():
            batch, member = each.batch, members.get(each.batch.gateway_id)
            identity = member.enrolled.identity if member else None
            if member and member.enrolled.moved_from == batch.blueprint != member.enrolled.identity.blueprint:
                log.info("dropped a batch of %s from before it was moved from %s", batch.gateway_id, batch.blueprint)
            elif member and member.revoked:
                refused[index] = f"{batch.gateway_id} was revoked"
            elif why := refusal(each, identity, [*offers(batch.blueprint, batch.release), *more(each)]):
                refused[index] = why
            else:
                kept.append(each)
        sums.add(connection, repetitions.first_times(unit, kept, self._clock()), self._window)
        return refused


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on_batches(GatewayEnrolled, handlers.on_enrolments)
    for kind in (GatewayRevoked, GatewayRemoved):
        bus.on(kind, handlers.on_fact)
    for change in (RolloutStarted, RolloutStageAdvanced, RolloutCompleted, RolloutRolledBack):
        bus.on(change, handlers.on_fact)
    bus.consume_batches(measurements("*"), MeasurementBatch, handlers.on_batches)

"""Handles events, commands and queries of the rollout service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime

from slmops.contracts.commands import (
    AbortRollout,
    ApplyBlueprint,
    BlueprintView,
    History,
    HistoryEntry,
    ListHistory,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    RolloutView,
    StartRollout,
)
from slmops.contracts.errors import CredentialRevoked, Denied, SlmopsError
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayReported,
    PackagePublished,
    PackageWithdrawn,
)
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import membership_rows, store
from slmops.rollout.domain.blueprint import BlueprintState
from slmops.rollout.domain.decide import OperatorCommand, apply_blueprint, operate, start_rollout
from slmops.rollout.domain.fleet import Sighting
from slmops.rollout.domain.views import blueprint_view
from slmops.rollout.reconcile import Reconciler
from slmops.rollout.report_rows import Recorded, Report, record_reports

Decide = Callable[[UnitOfWork, BlueprintState, datetime], list[Event]]


class Handlers:
    def __init__(
        self,
        journal: Journal,
        reconciler: Reconciler,
        enrolment_of: Callable[[str], Awaitable[GatewayEnrolled | None]],
        clock: Clock,
    ) -> None:
        self._journal = journal
        self._enrolment_of = enrolment_of
        self._reconciler = reconciler
        self._clock = clock

    # ---- events -------------------------------------------------------------------------------------------

    async def on_package_published(self, event: PackagePublished, delivered: MessageContext) -> None:
        await self._journal.transact(lambda unit: store.record_package(unit.connection, event))

    async def on_package_withdrawn(self, event: PackageWithdrawn, delivered: MessageContext) -> None:
        await self._journal.transact(lambda unit: store.record_withdrawal(unit.connection, event))

    async def on_gateway_reports(self, received: Batch[GatewayReported]) -> Refused:
        """Records a batch of reports in one transaction, whatever the size of the fleet.

        Returns `Denied` for a report that contradicts the gateway's enrolment or the open stages, `CredentialRevoked`.
        """
        reports = {
            number: Report(event, Sighting.of(event, delivered.arrived_at, delivered.clock_ahead))
            for number, (event, delivered) in enumerate(received)
        }
        recorded = await self._journal.transact(lambda unit: record_reports(unit.connection, reports))
        refused = recorded.refused
        if recorded.unknown:
            refused |= await self._record_with_enrolments({number: reports[number] for number in recorded.unknown})
        self._reconciler.mark(recorded.changed)
        return refused

    async def _record_with_enrolments(self, reports: Mapping[int, Report]) -> dict[int, Exception]:
        """Reads enrolments from the bus, which keeps our own enrolment events, if our database is younger.

        Growth: a request and some statements for each gateway that is not known here, once. Returns the refused ones.
        """
        known = await self._enrolments_of({report.event.gateway_id for report in reports.values()})
        refused: dict[int, Exception] = {}
        for number, report in reports.items():
            if isinstance(error := known[report.event.gateway_id], Exception):
                refused[number] = error

        def work(unit: UnitOfWork) -> Recorded:
            gone = membership_rows.removed(unit.connection, self._journal.events, known)
            for gateway_id, enrolled in known.items():
                if isinstance(enrolled, GatewayEnrolled) and gateway_id not in gone:
                    store.project(unit.connection, enrolled)
            rest = {number: report for number, report in reports.items() if number not in refused}
            return record_reports(unit.connection, rest)

        recorded = await self._journal.transact(work)
        for number in recorded.unknown:
            name = reports[number].event.gateway_id
            refused[number] = CredentialRevoked(f"{name} was removed, so its reports do not count")
        self._reconciler.mark(recorded.changed)
        return refused | recorded.refused

    async def _enrolments_of(self, gateway_ids: Collection[str]) -> dict[str, GatewayEnrolled | Exception]:
        """Returns the enrolments of gateways, or why their reports are not recorded."""

        async def one(gateway_id: str) -> GatewayEnrolled | Exception:
            try:
                enrolled = await self._enrolment_of(gateway_id)
            except SlmopsError as error:
                return error
            return enrolled or Denied(f"{gateway_id} sent a report but was never enrolled")

        return dict(zip(gateway_ids, await asyncio.gather(*map(one, gateway_ids)), strict=True))

    async def on_cohort_measured(self, event: CohortMeasured, delivered: MessageContext) -> None:
        await self._journal.transact(lambda unit: store.record_window(unit.connection, delivered.id, event))
        self._reconciler.mark([event.blueprint])

    # ---- commands -----------------------------------------------------------------------------------------

    async def apply_blueprint(self, command: ApplyBlueprint) -> BlueprintView:
        def work(unit: UnitOfWork) -> BlueprintView:
            now, state = self._clock(), store.load(unit, command.spec.name)
            return blueprint_view(store.commit(unit, state, apply_blueprint(state, command, now), now))

        view = await self._journal.transact(work)
        await self._reconciler.publish(command.spec.name)
        return view

    async def start_rollout(self, command: StartRollout) -> RolloutView:
        def decide(unit: UnitOfWork, state: BlueprintState, now: datetime) -> list[Event]:
            model = state.revisions[-1].spec.model if state.revisions else ""
            return start_rollout(state, command, store.packages(unit.connection, model), now)

        return await self._change(command.blueprint, decide)

    async def pause_rollout(self, command: PauseRollout) -> RolloutView:
        return await self._operate(command)

    async def resume_rollout(self, command: ResumeRollout) -> RolloutView:
        return await self._operate(command)

    async def abort_rollout(self, command: AbortRollout) -> RolloutView:
        return await self._operate(command)

    async def rollback_rollout(self, command: RollbackRollout) -> RolloutView:
        return await self._operate(command)

    async def _operate(self, command: OperatorCommand) -> RolloutView:
        return await self._change(command.blueprint, lambda unit, state, now: operate(state, command, now))

    async def _change(self, blueprint: str, decide: Decide) -> RolloutView:
        """Decides on a blueprint, commits, and writes its plan. Returns its latest rollout."""

        def work(unit: UnitOfWork) -> RolloutView:
            now, state = self._clock(), store.load(unit, blueprint)
            state = store.commit(unit, state, decide(unit, state, now), now)
            return store.latest_view(unit, state, now)

        view = await self._journal.transact(work)
        await self._reconciler.publish(blueprint)
        return view

    # ---- queries ------------------------------------------------------------------------------------------

    async def list_history(self, query: ListHistory) -> History:
        found = await self._journal.newest(store.stream_of(query.blueprint), query.cursor, query.limit + 1)
        shown = found[: query.limit]
        entries = tuple(
            HistoryEntry(
                at=one.envelope.time,
                event=one.event.type,
                actor=one.envelope.actor or "",
                rollout=getattr(one.event, "rollout", ""),
                reason=getattr(one.event, "reason", ""),
            )
            for one in shown
        )
        return History(entries=entries, cursor=shown[-1].position if len(found) > query.limit else None)


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(PackagePublished, handlers.on_package_published)
    bus.on(PackageWithdrawn, handlers.on_package_withdrawn)
    bus.on_batches(GatewayReported, handlers.on_gateway_reports)
    bus.on(CohortMeasured, handlers.on_cohort_measured)
    bus.serve(ApplyBlueprint, handlers.apply_blueprint)
    bus.serve(StartRollout, handlers.start_rollout)
    bus.serve(PauseRollout, handlers.pause_rollout)
    bus.serve(ResumeRollout, handlers.resume_rollout)
    bus.serve(AbortRollout, handlers.abort_rollout)
    bus.serve(RollbackRollout, handlers.rollback_rollout)
    bus.serve(ListHistory, handlers.list_history)

"""Handles events, commands and queries of the rollout service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

from slmops.contracts.commands import (
    AbortRollout,
    ApplyBlueprint,
    BlueprintList,
    BlueprintView,
    GatewayList,
    History,
    HistoryEntry,
    ListBlueprints,
    ListGateways,
    ListHistory,
    ListRollouts,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    RolloutList,
    RolloutView,
    StartRollout,
)
from slmops.contracts.errors import CredentialRevoked, Denied, PermanentError
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayReported,
    PackagePublished,
    PackageWithdrawn,
    UpdatePhase,
)
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import membership_rows, store
from slmops.rollout.domain.blueprint import BlueprintState
from slmops.rollout.domain.decide import OperatorCommand, apply_blueprint, operate, start_rollout
from slmops.rollout.domain.fleet import Sighting, check_given
from slmops.rollout.domain.membership import State
from slmops.rollout.domain.views import blueprint_view, gateway_view
from slmops.rollout.reconcile import Reconciler

# Reports of intermediate steps decide nothing, and a large fleet sends many.
_DECISIVE = frozenset({UpdatePhase.COMMITTED, UpdatePhase.FAILED})
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

    async def on_gateway_reported(self, event: GatewayReported, delivered: MessageContext) -> None:
        """Records a report. Raises `Denied` if it contradicts the gateway's enrolment or the open stages."""
        seen = Sighting.of(event, delivered.arrived_at, delivered.clock_ahead)
        if not await self._journal.transact(lambda unit: _record(unit, event, seen)):
            await self._record_with_enrolment(event, seen)
        if event.phase in _DECISIVE:
            await self._reconciler.judge(event.blueprint)

    async def on_missing_reports(self, reports: Batch[GatewayReported]) -> Refused:
        """Records reports that were read from their stream. Returns the errors of those that do not count."""
        refused: dict[int, Exception] = {}
        for index, (event, context) in enumerate(reports):
            try:
                await self.on_gateway_reported(event, context)
            except PermanentError as error:
                refused[index] = error
        return refused

    async def _record_with_enrolment(self, event: GatewayReported, seen: Sighting) -> None:
        """Reads the enrolment from the bus, which keeps our own enrolment events, if our database is younger."""
        enrolled = await self._enrolment_of(event.gateway_id)
        if enrolled is None:
            raise Denied(f"{event.gateway_id} sent a report but was never enrolled")

        def work(unit: UnitOfWork) -> None:
            if membership_rows.load(unit, event.gateway_id).state is State.REMOVED:
                raise CredentialRevoked(f"{event.gateway_id} was removed, so its reports do not count")
            store.project(unit.connection, enrolled)
            _record(unit, event, seen)

        await self._journal.transact(work)

    async def on_cohort_measured(self, event: CohortMeasured, delivered: MessageContext) -> None:
        await self._journal.transact(lambda unit: store.record_window(unit.connection, delivered.id, event))
        await self._reconciler.judge(event.blueprint)

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
            return store.rollout_views(unit, state, now)[-1]

        view = await self._journal.transact(work)
        await self._reconciler.publish(blueprint)
        return view

    # ---- queries ------------------------------------------------------------------------------------------

    async def list_rollouts(self, query: ListRollouts) -> RolloutList:
        def work(unit: UnitOfWork) -> list[RolloutView]:
            names = [row.name for row in store.plans(unit.connection) if query.blueprint in (None, row.name)]
            found = [v for name in names for v in store.rollout_views(unit, store.load(unit, name), self._clock())]
            return sorted(found, key=lambda view: view.started_at)

        return RolloutList(rollouts=tuple(await self._journal.transact(work)))

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

    async def list_blueprints(self, _query: ListBlueprints) -> BlueprintList:
        def work(unit: UnitOfWork) -> list[BlueprintView]:
            return [blueprint_view(store.load(unit, row.name)) for row in store.plans(unit.connection)]

        return BlueprintList(blueprints=tuple(await self._journal.transact(work)))

    async def list_gateways(self, query: ListGateways) -> GatewayList:
        rows = await self._journal.read(store.plans)
        fleet = await self._journal.read(lambda connection: store.inventory(connection, query))
        plans = {row.name: store.plan_in(row) for row in rows}
        return GatewayList(gateways=tuple(gateway_view(m, plans.get(m.identity.blueprint)) for m in fleet))


def _record(unit: UnitOfWork, event: GatewayReported, seen: Sighting) -> bool:
    """Records a report; returns False if the gateway is not enrolled here. Raises `Denied`."""
    blueprint = store.plan_row(unit.connection, event.blueprint)
    if event.phase in _DECISIVE and blueprint is not None and blueprint.judged:
        check_given(event, store.load(unit, event.blueprint))
    return store.record_report(unit.connection, event, seen)


def routes(bus: Bus, handlers: Handlers) -> None:
    bus.on(PackagePublished, handlers.on_package_published)
    bus.on(PackageWithdrawn, handlers.on_package_withdrawn)
    bus.on(GatewayReported, handlers.on_gateway_reported)
    bus.on(CohortMeasured, handlers.on_cohort_measured)
    bus.serve(ApplyBlueprint, handlers.apply_blueprint)
    bus.serve(StartRollout, handlers.start_rollout)
    bus.serve(PauseRollout, handlers.pause_rollout)
    bus.serve(ResumeRollout, handlers.resume_rollout)
    bus.serve(AbortRollout, handlers.abort_rollout)
    bus.serve(RollbackRollout, handlers.rollback_rollout)
    bus.serve(ListRollouts, handlers.list_rollouts)
    bus.serve(ListHistory, handlers.list_history)
    bus.serve(ListBlueprints, handlers.list_blueprints)
    bus.serve(ListGateways, handlers.list_gateways)

"""Answers queries about the fleet, its blueprints and rollouts: lists a page at a time, a summary from counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import Connection

from slmops.contracts.commands import (
    Attention,
    BlueprintList,
    FleetSummary,
    GatewayList,
    GatewayView,
    ListBlueprints,
    ListGateways,
    ListRollouts,
    RolloutList,
    RolloutView,
    SummarizeFleet,
)
from slmops.contracts.plan import Plan
from slmops.kit.bus.pages import cursor, fitting, position
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import inventory_rows, store
from slmops.rollout.domain.summary import Counted, summarize
from slmops.rollout.domain.views import blueprint_view, gateway_view

_GATEWAYS, _ROLLOUTS, _BLUEPRINTS = "gateways", "rollouts", "blueprints"


class Queries:
    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock

    async def list_gateways(self, query: ListGateways) -> GatewayList:
        """Raises `InvalidCursor`."""
        after = str(position(_GATEWAYS, query.cursor, str)[0]) if query.cursor else ""
        now = self._clock()

        def work(connection: Connection) -> GatewayList:
            found = inventory_rows.page(connection, query, after, query.limit + 1, now)
            ids = found[: query.limit]
            views = fitting(self._views(connection, ids))
            # The page ends with its last view, which is not the last id if it was cut or if a gateway just left.
            last = views[-1].gateway_id if views else ids[-1] if ids else after
            more = len(found) > len(ids) or last != (ids[-1] if ids else after)
            total = inventory_rows.count(connection, query, now) if query.cursor is None else None
            return GatewayList(gateways=tuple(views), cursor=cursor(_GATEWAYS, last) if more else None, total=total)

        return await self._journal.read(work)

    def _views(self, connection: Connection, ids: Sequence[str]) -> Iterator[GatewayView]:
        plans: dict[str, Plan | None] = {}
        for member in inventory_rows.load(connection, ids):
            name = member.identity.blueprint
            if name not in plans:
                plans[name] = store.plan_in(store.plan_row(connection, name))
            yield gateway_view(member, plans[name], self._clock())

    async def summarize_fleet(self, query: SummarizeFleet) -> FleetSummary:
        """Growth: reads an entry of an index for each gateway, and another for each one that is offline.

        Measured with 100,000 gateways on SQLite: 40 ms of CPU; 120 ms for one blueprint of 33,000, whose offline
        gateways are looked up one by one.
        """
        now, name = self._clock(), query.blueprint

        def work(connection: Connection) -> FleetSummary:
            cells = inventory_rows.cells(connection, name)
            asked = [ListGateways(blueprint=name, attention=(one,)) for one in (Attention.CLOCK, Attention.CREDENTIAL)]
            clock, credential = (inventory_rows.count(connection, one, now) for one in asked)
            counted = Counted(inventory_rows.count_offline(connection, name, now), clock, credential)
            return summarize(cells, store.profiles(connection), counted, now)

        return await self._journal.read(work)

    async def list_rollouts(self, query: ListRollouts) -> RolloutList:
        """Raises `InvalidCursor`. Growth: `limit` rows, and the rollouts under way."""
        before = position(_ROLLOUTS, query.cursor, float, str) if query.cursor else None

        def work(unit: UnitOfWork) -> list[RolloutView]:
            wanted, limit = query.blueprint, query.limit + 1
            open_ones = [] if query.under_way is False else store.views_under_way(unit, wanted, self._clock())
            ended = [] if query.under_way else store.ended_views(unit.connection, wanted, before, limit)
            found = [*ended, *(view for view in open_ones if before is None or _started(view) < before)]
            return sorted(found, key=_started, reverse=True)[:limit]

        found = await self._journal.transact(work)
        views = fitting(found[: query.limit])
        more = cursor(_ROLLOUTS, *_started(views[-1])) if len(found) > len(views) else None
        return RolloutList(rollouts=tuple(reversed(views)), cursor=more)

    async def list_blueprints(self, query: ListBlueprints) -> BlueprintList:
        """Raises `InvalidCursor`. Growth: the events of `limit` blueprints."""
        after = str(position(_BLUEPRINTS, query.cursor, str)[0]) if query.cursor else ""

        def work(unit: UnitOfWork) -> BlueprintList:
            names = store.blueprint_names(unit.connection, after, query.limit + 1)
            views = fitting(blueprint_view(store.load(unit, name)) for name in names[: query.limit])
            more = cursor(_BLUEPRINTS, views[-1].spec.name) if len(names) > len(views) else None
            return BlueprintList(blueprints=tuple(views), cursor=more)

        return await self._journal.transact(work)


def _started(view: RolloutView) -> tuple[float, str]:
    return view.started_at.timestamp(), view.rollout


def routes(bus: Bus, queries: Queries) -> None:
    bus.serve(ListGateways, queries.list_gateways)
    bus.serve(SummarizeFleet, queries.summarize_fleet)
    bus.serve(ListRollouts, queries.list_rollouts)
    bus.serve(ListBlueprints, queries.list_blueprints)

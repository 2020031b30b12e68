"""Answers queries about the fleet. A list is answered a page at a time, a summary from counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import Connection

from slmops.contracts.commands import (
    Attention,
    FleetSummary,
    GatewayList,
    GatewayView,
    ListGateways,
    SummarizeFleet,
)
from slmops.contracts.plan import Plan
from slmops.kit.bus.pages import cursor, fitting, position
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal
from slmops.rollout import inventory_rows, store
from slmops.rollout.domain.summary import Counted, summarize
from slmops.rollout.domain.views import gateway_view

_GATEWAYS: Final = "gateways"


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
        """Growth: reads an entry of an index for each gateway, and for each one that is offline another."""
        now, name = self._clock(), query.blueprint

        def work(connection: Connection) -> FleetSummary:
            cells = inventory_rows.cells(connection, name)
            asked = [ListGateways(blueprint=name, attention=(one,)) for one in (Attention.CLOCK, Attention.CREDENTIAL)]
            clock, credential = (inventory_rows.count(connection, one, now) for one in asked)
            counted = Counted(inventory_rows.count_offline(connection, name, now), clock, credential)
            return summarize(cells, store.profiles(connection), counted, now)

        return await self._journal.read(work)


def routes(bus: Bus, queries: Queries) -> None:
    bus.serve(ListGateways, queries.list_gateways)
    bus.serve(SummarizeFleet, queries.summarize_fleet)

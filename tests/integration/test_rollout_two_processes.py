"""Two processes of the rollout service write plans: the slower one never overwrites a newer plan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from integration.kit_world import World, world_on
from sqlalchemy import Connection

from slmops.contracts import subjects
from slmops.contracts.events import GatewayMoved
from slmops.contracts.plan import Overlay, Plan
from slmops.contracts.signed import plan_in
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal, put
from slmops.kit.trust.keys import new_key
from slmops.rollout import membership_rows, store
from slmops.rollout.overlays import Overlays
from slmops.rollout.reconcile import Reconciler
from slmops.rollout.signing import PlanSigner
from slmops.rollout.tables import BLUEPRINTS

if TYPE_CHECKING:
    from servers import NatsServer

T = TypeVar("T")
NAME = "edge-chat"
KEY = subjects.blueprint_key(NAME)


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


class PausingJournal(Journal):
    """A journal that awaits `meanwhile` once after a read, as if the process was suspended there."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def read(self, work: Callable[[Connection], T]) -> T:
        found = await super().read(work)
        if meanwhile := self.meanwhile:
            self.meanwhile = None
            await meanwhile()
        return found


async def test_a_slow_process_does_not_overwrite_a_newer_plan_with_the_one_that_it_read(
    world: World, tmp_path: Path
) -> None:
    bus: Bus = await world.service("rollout", lambda bus: None)
    url = f"sqlite:///{tmp_path}/rollout.db"
    fast, slow = (
        kind(url, service="rollout", metadata=store.schema(), migrations=store.MIGRATIONS, project=store.project)
        for kind in (Journal, PausingJournal)
    )
    await fast.open()
    key = tmp_path / "plan.pem"
    key.write_bytes(new_key().private_bytes)
    of_fast, of_slow = (Reconciler(j, bus, PlanSigner(key), utc_now, timedelta(hours=1)) for j in (fast, slow))

    async def decide(generation: int) -> None:
        plan = Plan(blueprint=NAME, generation=generation)
        values = {"plan": plan.model_dump_json(), "judged": False}
        await fast.transact(lambda unit: put(unit.connection, BLUEPRINTS, {"name": NAME}, values))

    async def decide_and_publish() -> None:
        await decide(2)
        await of_fast.publish(NAME)

    async def published() -> Plan | None:
        held = await bus.client.read_desired(KEY)
        return plan_in(held[0]) if held else None

    await decide(1)
    slow.meanwhile = decide_and_publish
    await of_slow.publish(NAME)
    plan = await published()
    assert plan
    assert plan.generation == 2
    await fast.close()
    await slow.close()


async def test_a_slow_process_does_not_restore_the_move_that_it_read_earlier(world: World, tmp_path: Path) -> None:
    bus: Bus = await world.service("rollout", lambda bus: None)
    url = f"sqlite:///{tmp_path}/rollout.db"
    fast, slow = (
        kind(url, service="rollout", metadata=store.schema(), migrations=store.MIGRATIONS, project=store.project)
        for kind in (Journal, PausingJournal)
    )
    await fast.open()
    of_fast, of_slow = (Overlays(j, lambda: bus.client, timedelta(hours=1)) for j in (fast, slow))

    async def move(previous: str, blueprint: str) -> None:
        event = GatewayMoved(gateway_id="gw-1", previous=previous, blueprint=blueprint, at=utc_now())
        await fast.transact(lambda unit: store.project(unit.connection, event))

    async def move_on() -> None:
        await move("kiosk", "lobby")
        await of_fast.tell()

    async def told() -> str | None:
        held = await bus.client.read_desired(subjects.overlay_key("gw-1"))
        return Overlay.model_validate_json(held[0]).blueprint if held else None

    await move(NAME, "kiosk")
    slow.meanwhile = lambda: _after_the_next_read(slow, move_on)
    await of_slow.tell()
    assert await told() == "lobby"
    assert await fast.read(lambda connection: membership_rows.overlay_writes(connection, 10)) == []
    await fast.close()
    await slow.close()


async def _after_the_next_read(journal: PausingJournal, work: Callable[[], Awaitable[None]]) -> None:
    journal.meanwhile = work

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
from slmops.contracts.plan import Plan
from slmops.contracts.signed import plan_in
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.trust.keys import new_key
from slmops.rollout import store
from slmops.rollout.reconcile import Reconciler
from slmops.rollout.signing import PlanSigner

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
        await fast.transact(lambda unit: store._put(unit.connection, store._blueprints, {"name": NAME}, values))

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

"""A rollout goes on by itself after faults: a killed process, a stopped database or bus, and operators who collide.

Two processes of the rollout service share the work on one database.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import httpx
import pytest
from rollout_world import NAME, World, _new_databases, _world, eventually

from slmops.contracts.blueprint import Blueprint, GatePolicy
from slmops.contracts.commands import (
    ApplyBlueprint,
    ListBlueprints,
    ListGateways,
    ListHistory,
    ListRollouts,
    RolloutView,
    StartRollout,
)
from slmops.contracts.errors import AlreadyExists, DatabaseUnreachable, IllegalTransition, NotFound, Unreachable
from slmops.kit.bus.client import BusClient
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import http_answers

if TYPE_CHECKING:
    from conftest import Postgres

SECOND = "rollout-2"
"""The second process of the rollout service."""
ONCE = {"started.v1": 1, "stage_advanced.v1": 1, "completed.v1": 1}


async def start_second(world: World) -> None:
    system = world.system
    system.http[SECOND] = choose_ports(system.layout.root / "second.json", ["http"])["http"]
    settings = system.settings("rollout") | {"http_port": str(system.http[SECOND])}
    env = os.environ | {f"SLMOPS_{key.upper()}": value for key, value in settings.items()}
    with system.layout.log(SECOND).open("ab") as log:
        system.processes[SECOND] = forked.start("slmops.rollout.app", env=env, stdout=log, stderr=log)

    async def ready() -> bool:
        return await http_answers(system.http[SECOND])

    await eventually(ready, bool, "the second process")


@pytest.fixture
async def on_postgres(postgres: str, tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = await _world(tmp_path, stack, _new_databases(postgres), killable=True)
        await start_second(world)
        yield world


@pytest.fixture
async def on_sqlite(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = await _world(tmp_path, stack, killable=True)
        await start_second(world)
        yield world


async def health(world: World, process: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"http://{HOST}:{world.system.http[process]}/health", timeout=30)
    return {**answer.json(), "status": answer.status_code}


async def second_operator(world: World) -> BusClient:
    client = await world.system.connect("console")
    world.stack.push_async_callback(client.close)
    return client


async def rollout_is(world: World, true: Callable[[RolloutView], bool], what: str) -> RolloutView:
    """Waits until the rollout is as described. A request that a killed process had taken is sent again."""

    async def look() -> RolloutView | None:
        with suppress(Unreachable):
            query = ListRollouts(blueprint=NAME)
            return (await world.operator.client.request(query, timedelta(seconds=3))).rollouts[-1]
        return None

    found = await eventually(look, lambda view: view is not None and true(view), what)
    assert found is not None
    return found


# ---- several processes ------------------------------------------------------------------------------------


async def ends_although_each_process_is_killed(world: World, version: str) -> None:
    """Brings a started rollout to its end. Each of the two processes is killed once."""
    operator, system = world.operator, world.system
    canary, other = [await world.gateway(f"gw-{n}", ring, run=False) for n, ring in ((1, "canary"), (2, "fleet"))]
    await eventually(operator.plan, lambda plan: bool(plan and plan.candidate), "the plan")
    await canary.follow()
    await rollout_is(world, lambda view: view.stages[0].committed == 1, "the canary commits")
    system.kill("rollout")
    assert canary.running is not None
    await canary.measure(canary.running)
    await rollout_is(world, lambda view: view.stage == 1, "the fleet's stage, opened by the other process")
    await system.start("rollout")
    system.kill(SECOND)
    await other.follow()
    assert other.running is not None
    await other.measure(other.running)
    done = await rollout_is(world, lambda view: view.state == "completed", "the rollout is completed")
    assert [(stage.targets, stage.committed) for stage in done.stages] == [(1, 1), (2, 2)]
    await eventually(operator.event_counts, lambda found: found == ONCE, "each decision once")
    plan = await eventually(operator.plan, lambda found: bool(found and found.stable), "the plan")
    assert plan is not None
    assert plan.stable is not None
    assert (plan.candidate, plan.stable.version) == (None, version)
    assert await operator.dead_letters() == {}


async def one_of_many_starts(world: World) -> RolloutView:
    """Two operators start rollouts at once; one rollout starts, and everybody else gets an error that names it."""
    clients = [world.operator.client, await second_operator(world)]
    asked = [StartRollout(blueprint=NAME, version=version) for version in ("1.0.0", "1.0.1") for _ in range(3)]
    requests = (clients[n % 2].request(one) for n, one in enumerate(asked))
    found = await asyncio.gather(*requests, return_exceptions=True)
    [won] = [one for one in found if not isinstance(one, BaseException)]
    for lost in (one for one in found if isinstance(one, BaseException)):
        assert isinstance(lost, AlreadyExists | IllegalTransition), lost
        assert won.rollout in str(lost)
        assert lost.fix
    counts = await eventually(world.operator.event_counts, lambda events: "started.v1" in events, "published")
    assert counts == {"started.v1": 1}
    return won


async def everybody_applies(world: World) -> None:
    """Two operators apply blueprints at once; each becomes a revision, and everybody gets their own."""
    clients = [world.operator.client, await second_operator(world)]
    changed = [Blueprint(name=NAME, model="smollm2", gate=GatePolicy(deadline_s=n)) for n in (700, 800, 700, 800)]
    views = await asyncio.gather(*(clients[n % 2].request(ApplyBlueprint(spec=spec)) for n, spec in enumerate(changed)))
    history = (await world.operator.client.request(ListHistory(blueprint=NAME))).entries
    [newest] = (await world.operator.client.request(ListBlueprints())).blueprints
    applied = [entry for entry in history if entry.event == "slmops.blueprint.applied.v1"]
    assert newest.revision == len(applied) == max(view.revision for view in views)
    assert [view.spec for view in views] == changed, "everybody gets the revision of their own blueprint"
    assert all(entry.actor.startswith("person:") for entry in applied)


async def test_of_operators_who_act_at_once_one_wins_and_two_processes_on_postgres_finish_although_each_is_killed(
    on_postgres: World,
) -> None:
    operator, world = on_postgres.operator, on_postgres
    await operator.apply()
    await operator.publish_package("1.0.0")
    await operator.publish_package("1.0.1")

    async def published() -> int:
        try:
            await operator.client.request(StartRollout(blueprint=NAME, version="9.9.9"))
        except NotFound as error:
            return (error.fix or "").count("for edge-small")
        return 0

    await eventually(published, lambda found: found == 2, "both packages arrive")
    won = await one_of_many_starts(world)
    await everybody_applies(world)
    await ends_although_each_process_is_killed(world, won.version)


async def test_two_processes_on_one_host_finish_although_each_is_killed_and_the_bus_is_gone(on_sqlite: World) -> None:
    operator = on_sqlite.operator
    await operator.apply()
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    await ends_although_each_process_is_killed(on_sqlite, "1.0.0")
    await start_second(on_sqlite)
    await goes_on_after_the_bus_was_gone(on_sqlite, "1.0.1")


# ---- servers that are gone --------------------------------------------------------------------------------


async def test_a_rollout_goes_on_after_its_database_was_gone(on_postgres: World, postgres_server: Postgres) -> None:
    """Gateways follow the plan and report meanwhile; what they reported is not lost, and nobody has to replay it."""
    world, operator = on_postgres, on_postgres.operator
    await operator.apply()
    canary = await world.gateway("gw-1", "canary", run=False)
    fleet = await world.gateway("gw-2", run=False)
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    postgres_server.stop()
    try:
        await canary.follow()
        assert canary.running is not None
        await canary.measure(canary.running)
        await operator.publish_package("1.0.1")

        async def degraded() -> list[str]:
            found = [await health(world, process) for process in ("rollout", SECOND, "telemetry")]
            assert {(one["status"], one["healthy"]) for one in found} == {(200, True)}, "a restart would not help"
            return [problem["path"] for one in found for problem in one["degraded"] if "since" in problem]

        await eventually(degraded, lambda found: len(found) == 3, "every process says that it is degraded")
        with pytest.raises(DatabaseUnreachable, match="does not answer"):
            await operator.client.request(ListGateways())
        logs = lambda: "".join(world.system.log(name) for name in ("rollout", SECOND))  # noqa: E731

        async def kept() -> bool:
            return "until the database answers" in logs()

        await eventually(kept, bool, "messages are kept")
    finally:
        postgres_server.start()
    await eventually(operator.rollout, lambda view: view.stage == 1, "the canary's stage passes")
    await fleet.follow()
    await canary.measure(canary.running)
    await operator.reached("completed")
    assert (await operator.start("1.0.1")).version == "1.0.1", "the package that was published meanwhile"
    assert await operator.dead_letters() == {}
    for process in ("rollout", SECOND, "telemetry"):
        assert (await health(world, process))["degraded"] == []


async def goes_on_after_the_bus_was_gone(world: World, version: str) -> None:
    """A decision that falls in the outage is stored, and published afterwards."""
    operator = world.operator
    await operator.apply(gate=GatePolicy(deadline_s=1))
    await operator.publish_package(version)
    await operator.start(version)
    await world.system.stop_nats()

    async def statuses() -> list[int]:
        return [(await health(world, process))["status"] for process in ("rollout", SECOND, "telemetry")]

    await eventually(statuses, lambda found: set(found) == {503}, "the services say that the bus is gone")
    with pytest.raises(Unreachable):
        await operator.client.request(ListGateways(), timedelta(seconds=1))

    async def held() -> bool:
        with sqlite3.connect(world.system.layout.root / "rollout.db") as database:
            return bool(database.execute("SELECT 1 FROM journal WHERE type = 'slmops.rollout.held.v1'").fetchall())

    await eventually(held, bool, "the stage is held, because its deadline passed")
    await world.system.start_nats()
    await eventually(statuses, lambda found: set(found) == {200}, "the services are connected again")
    for n, gateway in enumerate(world.gateways.values()):
        await rollout_is(world, lambda view, n=n: view.stage == n, f"stage {n}")  # type: ignore[misc]
        await gateway.follow()
        assert gateway.running is not None
        await gateway.measure(gateway.running)
    await rollout_is(world, lambda view: (view.state, view.version) == ("completed", version), "completed")
    twice = dict.fromkeys(ONCE, 2)
    counts = await eventually(operator.event_counts, lambda found: found["completed.v1"] == 2, "published")
    assert counts | twice == counts, "each decision was published once"
    assert counts["held.v1"] >= 1
    assert await operator.dead_letters() == {}

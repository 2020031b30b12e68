"""Presence of gateways on a real nats-server: what the rollout service knows by it, and what it finds again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rollout_world import World, _new_databases, _world, eventually
from unit.rollout.rollout_examples import package
from unit.rollout.rollout_examples import started as rollout_of

from slmops.contracts.blueprint import GatePolicy
from slmops.contracts.commands import GatewayView, ListGateways
from slmops.contracts.events import UpdatePhase
from slmops.contracts.plan import Release

_CANDIDATE = rollout_of().latest
assert _CANDIDATE is not None
RELEASE: Release = _CANDIDATE.candidate
assert RELEASE.manifest == package("1.0.0").manifest


@pytest.fixture
async def world(tmp_path: Path, postgres: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack, _new_databases(postgres))


@pytest.fixture
async def killable_world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack, killable=True)


async def fleet(world: World) -> dict[str, GatewayView]:
    views = (await world.operator.client.request(ListGateways())).gateways
    return {view.gateway_id: view for view in views}


async def test_a_connected_gateway_is_seen_and_its_wrong_clock_is_known_without_a_report(world: World) -> None:
    gateway = await world.gateway("gw-1", run=False)
    before = (await fleet(world))["gw-1"].last_seen
    for hours in (3, -3):
        await gateway.tell_presence(timedelta(hours=hours))

        def heard(found: dict[str, GatewayView], ahead_s: int = hours * 3600) -> bool:
            return abs((found["gw-1"].clock_ahead_s or 0) - ahead_s) < 60

        found = (await eventually(lambda: fleet(world), heard, "its clock"))["gw-1"]
        assert found.last_seen > before
    assert abs(datetime.now(UTC) - found.last_seen) < timedelta(minutes=1), "by our clock"

    operator = world.operator
    await operator.apply(gate=GatePolicy(deadline_s=1))
    await operator.publish_package("1.0.0")
    waiting = (await operator.start("1.0.0")).stages[0].waiting
    held = await operator.reached("held")
    for text in (waiting, held.reason):
        assert "the clock of gw-1 is 3:0" in text
        assert "behind the services' clock" in text
    assert await operator.dead_letters() == {}


async def test_after_an_outage_with_a_lost_database_the_fleet_is_known_again_by_its_presence(
    killable_world: World,
) -> None:
    world, system = killable_world, killable_world.system
    names = ["gw-1", "gw-2"]
    gateways = [await world.gateway(name, run=False) for name in names]
    for gateway in gateways:
        await gateway.report(UpdatePhase.DOWNLOADING, RELEASE)

    async def phases() -> list[UpdatePhase]:
        return [view.phase for view in (await fleet(world)).values()]

    expected = [UpdatePhase.DOWNLOADING] * 2
    await eventually(phases, lambda found: found == expected, "the reports")
    system.kill("rollout")
    for path in system.layout.root.glob("rollout.db*"):
        path.unlink()
    for _ in range(3):
        for gateway in gateways:
            await gateway.tell_presence()
            await gateway.client.connection.flush()
    state = (await world.operator.client.js.stream_info("PRESENCE")).state
    assert state.messages == 2, "only the newest message of each gateway waits for the service"
    await system.start("rollout")
    await eventually(phases, lambda found: found == expected, "the fleet with its reports")
    assert await world.operator.dead_letters() == {}

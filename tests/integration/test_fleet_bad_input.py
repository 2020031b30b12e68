"""Bad input from gateways and operators while a rollout is under way: what counts, what is refused, and who sees it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rollout_world import NAME, Gateway, World, _world, eventually

from slmops.contracts.blueprint import Blueprint, GatePolicy, Stage
from slmops.contracts.cloudevent import Envelope
from slmops.contracts.commands import (
    ApplyBlueprint,
    GatewayView,
    ListBlueprints,
    ListGateways,
    MoveGateway,
    RemoveGateway,
    StartRollout,
)
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import InvalidBlueprint, NotFound, Problem
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.plan import Plan
from slmops.kit.bus.client import PROBLEM_HEADER
from slmops.kit.bus.deadletters import dead_letters

NEVER = digest_of(b"a package that was never offered")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack)


async def offered(world: World) -> Plan:
    await world.operator.publish_package("1.0.0")
    await world.operator.start("1.0.0")
    plan = await eventually(world.operator.plan, lambda found: bool(found and found.candidate), "the plan")
    assert plan is not None
    return plan


async def gateway_is(world: World, gateway_id: str, true: Callable[[GatewayView], bool], what: str) -> GatewayView:
    async def look() -> GatewayView:
        [found] = (await world.operator.client.request(ListGateways(gateway_id=gateway_id))).gateways
        return found

    return await eventually(look, true, what)


async def reasons(world: World, count: int) -> str:
    """Waits for so many dead letters; returns their reasons, a line each."""

    async def look() -> list[str]:
        return [letter.reason async for letter in dead_letters(world.operator.client)]

    return "\n".join(await eventually(look, lambda found: len(found) == count, f"{count} dead letters"))


# ---- reports ----------------------------------------------------------------------------------------------


def honest(gateway: Gateway, plan: Plan, **changes: Any) -> dict[str, Any]:
    """Returns the fields of a truthful report, with changes."""
    assert plan.candidate is not None
    release = plan.candidate.release
    gateway.sequence += 1
    about = GatewayReported(
        gateway_id=gateway.identity.gateway_id,
        blueprint=NAME,
        sequence=gateway.sequence,
        labels=gateway.identity.labels,
        phase=UpdatePhase.COMMITTED,
        running=release.manifest.digest,
        running_version=release.version,
        target=release.manifest.digest,
        plan_generation=plan.generation,
        at=datetime.now(UTC),
    )
    return json.loads(about.model_dump_json()) | changes


async def send(gateway: Gateway, fields: dict[str, Any], identity: str = "") -> None:
    about = gateway.identity.gateway_id
    envelope = Envelope(
        id=identity or f"{about}-{gateway.sequence}",
        source="slmops/test",
        type=GatewayReported.type,
        time=datetime.now(UTC),
        subject=about,
    )
    await gateway.client.store(f"{GatewayReported.type}.{about}", json.dumps(fields).encode(), envelope.headers())


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"phase": "flying"}, "phase"),
    ({"sequence": 1 << 70}, "sequence"),
    ({"sequence": 0}, "sequence"),
    ({"plan_generation": 1 << 70}, "63 bits"),
    ({"running": "sha256:short"}, "running"),
    ({"labels": {f"label-{n}": "x" for n in range(65)}}, "65 labels"),
    ({"labels": {"ring": "x" * 100_000}}, "4 + 100000 characters"),
    ({"labels": {"ring": "canary\0"}}, "control character"),
    ({"measured": {f"figure-{n}": 1.0 for n in range(65)}}, "65 figures"),
    ({"at": "yesterday"}, "at"),
]


async def impossible_reports_change_nothing(world: World, gateway: Gateway, plan: Plan) -> None:
    for number, (changes, _) in enumerate(IMPOSSIBLE):
        await send(gateway, honest(gateway, plan, **changes), f"impossible-{number}")
    found = await reasons(world, len(IMPOSSIBLE))
    assert [reason for _, reason in IMPOSSIBLE if reason not in found] == []
    view = await gateway_is(world, "gw-1", lambda _: True, "")
    assert (view.running, view.labels, view.phase) == (None, {"ring": "canary"}, UpdatePhase.IDLE)
    assert (await world.operator.rollout()).stages[0].committed == 0


LIES: list[dict[str, Any]] = [
    {"running": NEVER, "running_version": "6.6.6"},
    {"running": NEVER, "target": NEVER, "phase": "failed"},
    {"target": NEVER},
    {"running": None, "running_version": None},
    {"plan_generation": 1},
    {"phase": "soaking"},
]
"""Reports that contradict the plan: of a release that was never offered, of an older plan, or not committed at all."""


async def lies_are_shown_and_count_nowhere(world: World, gateway: Gateway, plan: Plan) -> None:
    for lie in LIES:
        await send(gateway, honest(gateway, plan, **lie))
        seen = {key: value for key, value in lie.items() if key != "target"}
        await gateway_is(
            world,
            "gw-1",
            lambda g, seen=seen: all(getattr(g, key) == value for key, value in seen.items()),  # type: ignore[misc]
            f"the operator sees {lie}",
        )
        stage = (await world.operator.rollout()).stages[0]
        assert (stage.targets, stage.committed, stage.failed) == (1, 0, 0), lie


async def an_odd_report_counts_once_and_by_its_arrival(world: World, gateway: Gateway, plan: Plan) -> None:
    """It is from the future, comes twice, and has figures that are no numbers: a device may divide by zero."""
    figures = {"tokens_per_s": float("nan"), "ttft_s": float("inf"), "share": 0.5}
    at = (datetime.now(UTC) + timedelta(days=30000)).isoformat()
    odd = honest(gateway, plan, at=at, measured=figures)
    await send(gateway, odd)
    view = await gateway_is(world, "gw-1", lambda g: g.phase is UpdatePhase.COMMITTED, "the report from the future")
    assert (view.clock_ahead_s or 0) > 86_400 * 29_999, "the clock is named"
    assert view.last_seen < datetime.now(UTC) + timedelta(days=1)
    assert view.measured == {"share": 0.5}
    await send(gateway, odd, "twice")
    await send(gateway, honest(gateway, plan, sequence=1, running=NEVER), "late")
    await send(gateway, honest(gateway, plan, measured={"last": 1.0}))
    view = await gateway_is(world, "gw-1", lambda g: "last" in g.measured, "the newest report")
    assert view.running != NEVER
    await eventually(world.operator.rollout, lambda found: found.stages[0].committed == 1, "the canary counts")


async def test_impossible_reports_are_dead_lettered_and_those_that_lie_are_shown_and_count_for_no_stage(
    world: World,
) -> None:
    await world.operator.apply(gate=GatePolicy(deadline_s=300))
    gateway = await world.gateway("gw-1", "canary", run=False)
    plan = await offered(world)
    await impossible_reports_change_nothing(world, gateway, plan)
    await lies_are_shown_and_count_nowhere(world, gateway, plan)
    await an_odd_report_counts_once_and_by_its_arrival(world, gateway, plan)
    assert sum((await world.operator.dead_letters()).values()) == len(IMPOSSIBLE)


# ---- membership in mid-rollout ----------------------------------------------------------------------------


async def test_gateways_that_come_go_and_change_in_mid_rollout_change_its_targets(world: World) -> None:
    operator, client = world.operator, world.operator.client
    await operator.apply()
    await client.request(ApplyBlueprint(spec=Blueprint(name="kiosk", model="smollm2")))
    lost = await world.gateway("gw-1", "canary", run=False)
    lost.sequence, lost.boot = 500, "before"
    relabelled, scrapped, moved = [await world.gateway(f"gw-{n}", run=False) for n in (2, 3, 4)]
    plan = await offered(world)
    assert plan.candidate is not None
    candidate = plan.candidate.release
    await lost.report(UpdatePhase.DOWNLOADING, candidate)
    await gateway_is(world, "gw-1", lambda g: g.phase is UpdatePhase.DOWNLOADING, "its report")

    async def targets(number: int, committed: int) -> None:
        await eventually(
            operator.rollout,
            lambda view: (view.stages[0].targets, view.stages[0].committed) == (number, committed),
            f"{number} targets, {committed} committed",
        )

    await targets(1, 0)
    joined = await world.gateway("gw-5", "canary", run=False)
    await targets(2, 0)
    relabelled.identity = relabelled.identity.model_copy(update={"labels": {"ring": "canary"}})
    relabelled.generation = plan.generation
    await relabelled.report(UpdatePhase.IDLE, candidate)
    await targets(3, 0)
    lost.sequence, lost.boot = 0, "after"
    await lost.follow()
    await targets(3, 1)
    await client.request(RemoveGateway(gateway_id="gw-2", reason="scrapped"))
    await targets(2, 1)
    await joined.follow()
    await targets(2, 2)
    await client.request(RemoveGateway(gateway_id=scrapped.identity.gateway_id, reason="scrapped"))
    await client.request(MoveGateway(gateway_id=moved.identity.gateway_id, blueprint="kiosk"))
    for gateway in (lost, joined):
        await gateway.measure(candidate)
    done = await operator.reached("completed")
    assert [(stage.targets, stage.committed) for stage in done.stages] == [(2, 2), (2, 2)]
    assert await operator.dead_letters() == {}


# ---- blueprints -------------------------------------------------------------------------------------------


async def refused_and_nothing_recorded(world: World) -> None:
    operator, client = world.operator, world.operator.client
    canary, everybody = Stage(name="canary", selector={"ring": "canary"}), Stage(name="all")
    for changes in ({"stages": (canary, canary)}, {"gate": GatePolicy(deadline_s=1e300)}):
        with pytest.raises(InvalidBlueprint, match="cannot be carried out"):
            await operator.apply(**changes)
    with pytest.raises(NotFound, match="mainframe"):
        await operator.apply(profile="mainframe")
    endless = b'{"spec": {"name": "endless", "model": "m", "soak": {"seconds": Infinity}}}'
    assert client.admin.sender is not None
    subject = ApplyBlueprint(spec=Blueprint(name="endless", model="m")).sent_by(client.admin.sender)
    answer = await client.admin.connection.request(subject, endless, timeout=30)
    assert PROBLEM_HEADER in (answer.headers or {})
    assert Problem.model_validate_json(answer.data).code == InvalidBlueprint.code
    with pytest.raises(InvalidBlueprint, match="two stages"):
        await client.request(StartRollout(blueprint=NAME, stages=(everybody, everybody)))
    views = (await client.request(ListBlueprints())).blueprints
    assert [(view.spec.name, view.revision) for view in views] == [(NAME, 1)]


async def test_a_blueprint_that_contradicts_itself_is_refused_and_a_stage_without_gateways_is_held(
    world: World,
) -> None:
    operator = world.operator
    typo = (Stage(name="canary", selector={"ring": "canry"}), Stage(name="fleet"))
    await operator.apply(stages=typo, gate=GatePolicy(deadline_s=0.5))
    await refused_and_nothing_recorded(world)
    await world.gateway("gw-1", "canary", run=False)
    await operator.publish_package("1.0.0")
    started = await operator.start("1.0.0")
    assert [stage.targets for stage in started.stages] == [0, 1]
    held = await operator.reached("held")
    assert held.reason == "no gateway is in this stage"

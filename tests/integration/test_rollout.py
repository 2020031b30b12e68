"""Rollout and telemetry as processes on a real nats-server, with gateways that enrol, follow the plan and report.

The gateways are simulated and the rest is real: credentials, permissions, twin, journal, gate.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rollout_world import (
    NAME,
    Gateway,
    Operator,
    World,
    _new_databases,
    _world,
    eventually,
    publish_event,
)

from slmops.contracts import subjects
from slmops.contracts.blueprint import GatePolicy
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.commands import (
    AbortRollout,
    EnrolGateway,
    ListBlueprints,
    ListGateways,
    ListHistory,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    StartRollout,
)
from slmops.contracts.errors import AlreadyExists, Denied, NotFound, PermanentError
from slmops.contracts.events import GatewayEnrolled, GatewayReported, UpdatePhase
from slmops.contracts.plan import Plan
from slmops.contracts.signed import plan_in
from slmops.kit.bus.deadletters import REASON_HEADER
from slmops.kit.bus.nats_auth import new_user_seed, public_key
from slmops.kit.journal import Journal
from slmops.kit.tracing import span
from slmops.kit.trust.keys import new_key
from slmops.kit.trust.plans import sign_plan
from slmops.rollout import store
from slmops.rollout.domain.decide import operate


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack)


@pytest.fixture
async def killable_world(tmp_path: Path) -> AsyncIterator[World]:
    """Yields a world whose services run as separate processes, which a test can kill."""
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack, killable=True)


@pytest.fixture(params=["sqlite", "postgres"])
async def any_world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    databases = _new_databases(request.getfixturevalue("postgres")) if request.param == "postgres" else None
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack, databases)


async def test_a_release_is_rolled_out_to_the_canary_and_then_to_the_fleet(any_world: World) -> None:
    operator = any_world.operator
    await operator.apply()
    canary, *_ = [
        await any_world.gateway("gw-1", "canary"),
        await any_world.gateway("gw-2"),
        await any_world.gateway("gw-3"),
    ]
    canary.silent = True
    first = await operator.publish_package("1.0.0")
    started = await operator.start("1.0.0")
    assert [(stage.name, stage.targets) for stage in started.stages] == [("canary", 1), ("fleet", 3)]
    waiting = await eventually(operator.rollout, lambda v: v.stages[0].committed == 1, "canary commits")
    assert (waiting.state, waiting.stage, waiting.stages[0].waiting) == (
        "running",
        0,
        "0 of 1 requests measured in this stage",
    )
    assert any_world.gateways["gw-2"].seen == set(), "a stage without data does not advance"
    canary.silent = False
    done = await operator.reached("completed")
    assert [(s.targets, s.committed, s.failed) for s in done.stages] == [(1, 1, 0), (3, 3, 0)]
    assert done.candidate_window is not None
    assert done.candidate_window.requests > 0
    plan = await eventually(operator.plan, lambda p: bool(p and p.stable), "plan")
    assert plan is not None
    assert (plan.candidate, plan.stable and plan.stable.manifest.digest) == (None, first)
    once = {"started.v1": 1, "stage_advanced.v1": 1, "completed.v1": 1}
    await eventually(operator.event_counts, lambda found: found == once, "each event is published once")
    fleet = (await operator.client.request(ListGateways())).gateways
    assert {(g.gateway_id, g.running_version, g.desired) for g in fleet} == {
        (f"gw-{n}", "1.0.0", first) for n in (1, 2, 3)
    }
    [blueprint] = (await operator.client.request(ListBlueprints())).blueprints
    assert blueprint.stable == plan.stable


async def test_a_bad_candidate_is_rolled_back_before_it_reaches_the_fleet(any_world: World) -> None:
    operator = any_world.operator
    await operator.apply()
    await any_world.gateway("gw-1", "canary", bad="1.0.1")
    other = await any_world.gateway("gw-2")
    await any_world.release("1.0.0")
    await operator.publish_package("1.0.1")
    await operator.start("1.0.1")
    view = await operator.reached("rolled_back")
    assert view.reason == "gw-1 failed the candidate: 1.0.1 answers golden prompts wrongly"
    assert (view.stages[0].failed, view.stage, view.ended_at is not None) == (1, 0, True)
    plan = await eventually(operator.plan, lambda p: bool(p and p.candidate is None), "plan restored")
    assert plan is not None
    assert plan.stable is not None
    assert plan.stable.version == "1.0.0"
    assert other.seen == {"1.0.0"}
    [gateway] = (await operator.client.request(ListGateways(gateway_id="gw-1"))).gateways
    assert gateway.running_version == "1.0.0"


async def test_a_rollout_completes_when_both_services_are_killed_after_every_step(killable_world: World) -> None:
    operator, system = killable_world.operator, killable_world.system

    async def restart_with_sigkill() -> None:
        for service in ("rollout", "telemetry"):
            system.kill(service)
        await asyncio.gather(system.start("rollout"), system.start("telemetry"))

    await operator.apply()
    canary = await killable_world.gateway("gw-1", "canary")
    second = await killable_world.gateway("gw-2", run=False)
    canary.silent = True
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    await restart_with_sigkill()
    await eventually(operator.rollout, lambda v: v.stages[0].committed == 1, "canary commits")
    await restart_with_sigkill()
    canary.silent = False
    await eventually(operator.rollout, lambda v: v.stage == 1, "the fleet's stage")
    await restart_with_sigkill()
    assert (await operator.rollout()).state == "running"
    await second.follow()
    await operator.reached("completed")
    await restart_with_sigkill()
    assert (await operator.rollout()).state == "completed"
    once = {"started.v1": 1, "stage_advanced.v1": 1, "completed.v1": 1}
    await eventually(operator.event_counts, lambda found: found == once, "each event is published once")
    assert await operator.dead_letters() == {}


async def test_a_committed_plan_that_was_not_written_is_written_by_the_next_process(killable_world: World) -> None:
    """Reproduces the state after a SIGKILL between the commit and the write to the bucket."""
    operator, system = killable_world.operator, killable_world.system
    await operator.apply()
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    before = await operator.plan()
    system.kill("rollout")
    journal = Journal(
        system.databases["rollout"],
        service="rollout",
        metadata=store.schema(),
        migrations=store.MIGRATIONS,
        project=store.project,
    )
    now = datetime.now(UTC)

    def abort(unit: Any) -> int:
        state = store.load(unit, NAME)
        return store.commit(unit, state, operate(state, AbortRollout(blueprint=NAME), now), now).version

    generation = await journal.transact(abort)
    await journal.close()
    assert await operator.plan() == before
    assert before is not None
    assert before.candidate is not None
    await system.start("rollout")
    plan = await eventually(operator.plan, lambda p: bool(p and p.generation == generation), "the committed plan")
    assert plan is not None
    assert plan.candidate is None
    await eventually(operator.event_counts, lambda found: found.get("aborted.v1") == 1, "the outbox is published")


async def test_a_plan_that_was_changed_in_the_bucket_is_restored(world: World) -> None:
    operator = world.operator
    await operator.apply()
    good = await eventually(operator.plan, lambda p: p is not None, "plan")
    intruder = await world.system.connect("rollout")
    key = subjects.blueprint_key(NAME)
    unsigned = good.model_dump_json().encode() if good else b""
    foreign = sign_plan(Plan(blueprint=NAME, generation=99), new_key(), datetime.now(UTC))
    for bad in (b"not a plan", unsigned, foreign, b""):
        held = await intruder.read_desired(key)
        revision = await intruder.write_desired(key, bad, held[1] if held else 0)
        newer = await eventually(
            lambda: operator.client.read_desired(key),
            lambda found, r=revision: bool(found and found[1] > r),
            "restored",
        )
        assert newer is not None
        assert plan_in(newer[0]) == good
    assert await operator.plan() == good
    await intruder.close()


async def test_a_stage_without_data_is_held_and_continues_when_data_arrives(world: World) -> None:
    operator = world.operator
    await operator.apply(gate=GatePolicy(deadline_s=1))
    canary = await world.gateway("gw-1", "canary")
    canary.silent = True
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    held = await operator.reached("held")
    assert "requests measured" in held.reason or "have not committed" in held.reason
    canary.silent = False
    await operator.reached("completed")
    await eventually(operator.event_counts, lambda found: found.get("held.v1", 0) >= 1, "it is held")


async def test_an_operator_can_pause_resume_and_roll_back_a_rollout(world: World) -> None:
    operator, client = world.operator, world.operator.client
    await operator.apply()
    await world.gateway("gw-1", "canary")
    await world.release("1.0.0")
    with pytest.raises(PermanentError, match="stable release"):
        await client.request(StartRollout(blueprint=NAME, version="1.0.0"))
    await operator.publish_package("1.0.1")
    await operator.start("1.0.1")
    with pytest.raises(AlreadyExists):
        await client.request(StartRollout(blueprint=NAME, version="1.0.1"))
    for _ in range(2):
        assert (await client.request(PauseRollout(blueprint=NAME))).state == "paused"
    assert (await client.request(ResumeRollout(blueprint=NAME))).state == "running"
    await operator.reached("completed")
    for _ in range(2):
        assert (await client.request(RollbackRollout(blueprint=NAME))).state == "rolled_back"
    plan = await operator.plan()
    assert plan is not None
    assert plan.stable is not None
    assert plan.stable.version == "1.0.0"
    counts = await eventually(operator.event_counts, lambda c: "rolled_back.v1" in c, "published")
    assert (counts["paused.v1"], counts["resumed.v1"], counts["rolled_back.v1"]) == (1, 1, 1)
    with pytest.raises(NotFound, match="Published of smollm2"):
        await client.request(StartRollout(blueprint=NAME, version="7.0.0"))
    # Who caused it: a person what they asked for, nobody what the gate decided.
    older = await client.request(ListHistory(blueprint=NAME, limit=2))
    rest = await client.request(ListHistory(blueprint=NAME, cursor=older.cursor))
    by = {one.event.split(".", 2)[2]: one.actor for one in (*rest.entries, *older.entries)}
    person = str(client.admin.sender)
    assert person.startswith("person:")
    asked = ("applied.v1", "started.v1", "paused.v1", "resumed.v1", "rolled_back.v1")
    assert by | dict.fromkeys(asked, person) | {"completed.v1": ""} == by
    assert (rest.cursor, older.entries[0].event) == (None, "slmops.rollout.rolled_back.v1")


async def test_a_plan_continues_the_trace_of_the_command_through_every_stage(world: World) -> None:
    operator = world.operator
    await operator.apply()
    await operator.publish_package("1.0.0")
    await eventually(lambda: _can_start(operator), bool, "package arrives")
    trace = "0af7651916cd43dd8448eb211c80319c"
    with span("operator", parent=f"00-{trace}-b7ad6b7169203331-01"):
        await operator.client.request(StartRollout(blueprint=NAME, version="1.0.0"))
    plan = await operator.plan()
    assert plan is not None
    assert trace in (plan.traceparent or "")
    await world.gateway("gw-1", "canary")
    await operator.reached("completed")
    plan = await eventually(operator.plan, lambda p: bool(p and p.stable), "plan")
    assert plan is not None
    assert trace in (plan.traceparent or "")


async def _can_start(operator: Operator) -> bool:
    """Returns whether the package has arrived: the error for an unknown version lists the published ones."""
    with pytest.raises(NotFound) as refusal:
        await operator.client.request(StartRollout(blueprint=NAME, version="9.9.9"))
    return "1.0.0 for edge-small" in (refusal.value.fix or "")


async def test_malformed_and_foreign_reports_are_dead_lettered_and_the_service_keeps_running(world: World) -> None:
    operator, client = world.operator, world.operator.client
    gateway = await world.gateway("gw-1", "canary", run=False)
    report = GatewayReported(
        gateway_id="gw-1", blueprint=NAME, sequence=1, phase=UpdatePhase.IDLE, at=datetime.now(UTC)
    )
    await publish_event(client, report, "foreign", subject="slmops.gateway.reported.v1.gw-2")
    await client.store("slmops.gateway.reported.v1.gw-3", b"not json", {MESSAGE_ID_HEADER: "garbage"})
    letters = await eventually(operator.dead_letters, lambda found: len(found) == 2, "dead letters")
    assert set(letters) == {"dlq.slmops.gateway.reported.v1.gw-2", "dlq.slmops.gateway.reported.v1.gw-3"}
    await publish_event(gateway.client, report, "own")
    fleet = await eventually(
        lambda: client.request(ListGateways(gateway_id="gw-1")),
        lambda f: f.gateways[0].last_seen > report.at,
        "report",
    )
    assert len(fleet.gateways) == 1


async def test_reports_that_arrive_together_are_recorded_and_only_the_bad_ones_are_dead_lettered(world: World) -> None:
    operator, client = world.operator, world.operator.client
    await operator.apply()
    gateways = [await world.gateway(name, "canary", run=False) for name in ("gw-1", "gw-2")]
    fields = {"phase": UpdatePhase.IDLE, "at": datetime.now(UTC)}

    async def send(gateway_id: str, sequence: int, blueprint: str = NAME) -> None:
        event = GatewayReported(
            gateway_id=gateway_id, blueprint=blueprint, sequence=sequence, measured={"n": sequence}, **fields
        )
        await publish_event(client, event, f"{gateway_id}-{sequence}-{blueprint}")

    good = [send(gateway.identity.gateway_id, number) for number in range(1, 101) for gateway in gateways]
    bad = [send("gw-1", 101, "kiosk"), send("gw-9", 1), send("gw-9", 2)]
    await asyncio.gather(*good, *bad)  # the stream keeps only the newest ones of a gateway

    async def newest() -> dict[str, float]:
        found = (await client.request(ListGateways())).gateways
        return {one.gateway_id: one.measured.get("n", 0) for one in found}

    await eventually(newest, lambda found: found == {"gw-1": 100, "gw-2": 100}, "the newest reports")
    letters = {"dlq.slmops.gateway.reported.v1.gw-1": 1, "dlq.slmops.gateway.reported.v1.gw-9": 2}
    assert await eventually(operator.dead_letters, lambda found: sum(found.values()) == 3, "dead letters") == letters


async def test_measurements_of_gateways_outside_the_stage_do_not_affect_the_gate(world: World) -> None:
    """Without this rule, requests of other gateways would let a stage pass or roll it back without canary data."""
    operator = world.operator
    await operator.apply(gate=GatePolicy(deadline_s=3))
    canary = await world.gateway("gw-1", "canary")
    fleet = await world.gateway("gw-2", run=False)
    kiosk = await Gateway.enrol(world.system, "kiosk-1", "canary", blueprint="kiosk")
    world.stack.push_async_callback(kiosk.client.close)
    canary.silent = True
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    plan = await eventually(operator.plan, lambda p: bool(p and p.candidate), "plan")
    assert plan is not None
    assert plan.candidate is not None
    candidate = plan.candidate.release
    for _ in range(3):
        await fleet.measure(candidate, requests=500)
        await kiosk.measure(candidate, requests=500, failed_requests=500, golden_passed=0, golden_failed=9)
    letters = await eventually(operator.dead_letters, lambda found: sum(found.values()) == 6, "dead letters")
    assert letters == {"dlq.measure.gw-2": 3, "dlq.measure.kiosk-1": 3}
    held = await operator.reached("held")
    assert "0 of 1 requests measured" in held.reason
    assert held.stage == 0
    canary.silent = False
    await eventually(operator.rollout, lambda view: view.stage == 1 or view.state == "completed", "the fleet's stage")


async def test_a_report_of_a_candidate_that_is_not_assigned_to_its_gateway_is_dead_lettered(world: World) -> None:
    operator = world.operator
    await operator.apply(gate=GatePolicy(deadline_s=60))
    fleet = await world.gateway("gw-2", run=False)
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    plan = await eventually(operator.plan, lambda p: bool(p and p.candidate), "plan")
    assert plan is not None
    assert plan.candidate is not None
    fleet.generation = plan.generation
    await fleet.report(UpdatePhase.FAILED, plan.candidate.release)
    await eventually(
        operator.dead_letters, lambda found: found == {"dlq.slmops.gateway.reported.v1.gw-2": 1}, "a dead letter"
    )
    letter = await operator.client.js.get_msg("DLQ", subject="dlq.slmops.gateway.reported.v1.gw-2", direct=True)
    assert "does not give it" in (letter.headers or {})[REASON_HEADER]
    [view] = (await operator.client.request(ListGateways(gateway_id="gw-2"))).gateways
    assert (view.phase, view.problem) == (UpdatePhase.IDLE, None)


async def test_a_new_database_learns_the_gateways_from_their_stored_enrolments(killable_world: World) -> None:
    operator, client = killable_world.operator, killable_world.operator.client
    await operator.apply()
    gateway = await killable_world.gateway("gw-1", "canary", run=False)
    enrolled = await eventually(lambda: client.latest(GatewayEnrolled, "gw-1"), bool, "the enrolment")
    assert enrolled is not None
    killable_world.system.kill("rollout")
    for path in killable_world.system.layout.root.glob("rollout.db*"):
        path.unlink()
    await killable_world.system.start("rollout")
    assert (await client.request(ListGateways())).gateways == ()
    report = GatewayReported(
        gateway_id="gw-1", blueprint=NAME, sequence=1, phase=UpdatePhase.IDLE, at=datetime.now(UTC)
    )
    await publish_event(gateway.client, report, "own")
    await publish_event(client, report.model_copy(update={"gateway_id": "gw-9"}), "unknown-gateway")
    [view] = (
        await eventually(lambda: client.request(ListGateways()), lambda found: bool(found.gateways), "the fleet")
    ).gateways
    assert (view.gateway_id, view.labels) == ("gw-1", {"ring": "canary"})
    await eventually(
        operator.dead_letters, lambda found: found == {"dlq.slmops.gateway.reported.v1.gw-9": 1}, "a dead letter"
    )


async def test_an_enrolment_with_a_wrong_token_is_denied(killable_world: World) -> None:
    bootstrap = await killable_world.system.connect("enrol", inbox_prefix=b"_INBOX_enrol", patient=False)
    wrong = "not-the-token-of-this-site"
    command = EnrolGateway(gateway_id="gw-9", blueprint=NAME, public_key=public_key(new_user_seed()), token=wrong)
    with pytest.raises(Denied, match="gw-9"):
        await bootstrap.request(command)
    await bootstrap.close()
    assert (await killable_world.operator.client.request(ListGateways())).gateways == ()
    assert wrong not in killable_world.system.layout.log("rollout").read_text()

"""Telemetry on a real nats-server: each batch counts exactly once in the published windows."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rollout_world import System, _new_databases, eventually, open_system, publish_event

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayReported,
    GatewayRevoked,
    RolloutCompleted,
    RolloutRolledBack,
    RolloutStageAdvanced,
    RolloutStarted,
    UpdatePhase,
)
from slmops.contracts.measurement import CohortWindow, MeasurementBatch
from slmops.contracts.plan import Candidate, Plan, Release, Stage
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.deadletters import REASON_HEADER
from slmops.kit.bus.nats_auth import new_user_seed, public_key
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import sign_plan

RELEASE = digest_of(b"1.0.0")
EARLIER = datetime.now(UTC) - timedelta(minutes=1)
STAGES = (Stage(name="canary", selector={"ring": "canary"}), Stage(name="fleet"))


def release(version: str) -> Release:
    manifest = Descriptor.of(version.encode(), "application/vnd.oci.image.manifest.v1+json")
    signature = Descriptor.of(b"signature", "application/json")
    return Release(revision=1, model="smollm2", version=version, manifest=manifest, signature=signature, size_bytes=1)


@dataclass
class Measured:
    """A telemetry service, and a console connection that sends batches and reads the published windows."""

    system: System
    client: BusClient

    async def send(self, batch: MeasurementBatch, subject: str | None = None) -> None:
        # A new message id each time, so that a repeated batch is not dropped by the server's own deduplication.
        headers = {MESSAGE_ID_HEADER: str(uuid.uuid4())}
        await self.client.store(subject or f"measure.{batch.gateway_id}", batch.model_dump_json().encode(), headers)

    async def publish(self, event: Event) -> None:
        """Publishes an event as its owning service does."""
        await publish_event(self.client, event, str(uuid.uuid4()))

    async def enrol(self, gateway_id: str, blueprint: str = "edge-chat", ring: str = "fleet") -> str:
        key = public_key(new_user_seed())
        fields = {"gateway_id": gateway_id, "blueprint": blueprint, "public_key": key, "labels": {"ring": ring}}
        await self.publish(GatewayEnrolled(**fields, at=EARLIER))
        return key

    async def unsettled(self, subject: str) -> int:
        """Returns how many messages of a subject telemetry has not handled yet."""
        stream = subjects.stream_of(subject)
        assert stream is not None
        info = await self.client.js.consumer_info(stream, subjects.durable_name("telemetry", subject))
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0)

    async def start(self, rollout: str, candidate: Release, stable: Release | None = None) -> None:
        fields = {"rollout": rollout, "candidate": candidate, "stable": stable, "stages": STAGES}
        await self.publish(RolloutStarted(blueprint="edge-chat", **fields, at=EARLIER + timedelta(seconds=30)))

    async def write_plan(self, plan: Plan) -> None:
        signer = read_key(self.system.layout.plan_signing_key)
        rollout = await self.system.connect("rollout")
        key = subjects.blueprint_key(plan.blueprint)
        held = await rollout.read_desired(key)
        await rollout.write_desired(key, sign_plan(plan, signer, datetime.now(UTC)), held[1] if held else 0)
        await rollout.close()

    async def reason(self, subject: str) -> str:
        """Waits for the only dead letter of a subject and returns its reason."""
        found = await eventually(self.dead_letters, lambda letters: f"dlq.{subject}" in letters, f"dlq.{subject}")
        assert found[f"dlq.{subject}"] == 1
        letter = await self.client.js.get_msg("DLQ", subject=f"dlq.{subject}", direct=True)
        return str((letter.headers or {})[REASON_HEADER])

    async def windows(self) -> list[CohortWindow]:
        """Returns every window in the stream, in order."""
        state = (await self.client.js.stream_info("WINDOWS")).state
        messages = [await self.client.js.get_msg("WINDOWS", n) for n in range(state.first_seq or 1, state.last_seq + 1)]
        return [
            CohortMeasured.model_validate_json(m.data or b"").window
            for m in messages
            if m.subject == CohortMeasured.type
        ]

    async def requests(self) -> int:
        return sum(window.requests for window in await self.windows())

    async def dead_letters(self) -> dict[str, int]:
        return (await self.client.js.stream_info("DLQ", subjects_filter=">")).state.subjects or {}


ON_BOTH = pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])


@ON_BOTH
async def measured(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Measured]:
    async with AsyncExitStack() as stack:
        yield await measured_on(request, tmp_path, stack)


@ON_BOTH
async def killable(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Measured]:
    """Yields a telemetry service that runs as a separate process, which a test can kill."""
    async with AsyncExitStack() as stack:
        yield await measured_on(request, tmp_path, stack, killable=True)


async def measured_on(
    request: pytest.FixtureRequest, folder: Path, stack: AsyncExitStack, *, killable: bool = False
) -> Measured:
    databases = _new_databases(request.getfixturevalue("postgres")) if request.param == "postgres" else None
    system = await open_system(folder, stack, databases, killable=killable)
    await system.start("telemetry")
    client = await system.connect("console")
    stack.push_async_callback(client.close)
    measured = Measured(system, client)
    for gateway_id in ("gw-1", "gw-2", "gw-3", "gw-4"):
        await measured.enrol(gateway_id)
    await measured.start("edge-chat-1", release("1.0.0"))
    await measured.publish(RolloutCompleted(blueprint="edge-chat", rollout="edge-chat-1", reason="", at=EARLIER))
    return measured


def batch(identity: str, gateway_id: str = "gw-1", requests: int = 1, **changes: Any) -> MeasurementBatch:
    ended = changes.pop("ended_at", datetime.now(UTC))
    values = {
        "batch_id": identity,
        "gateway_id": gateway_id,
        "blueprint": "edge-chat",
        "release": RELEASE,
        "version": "1.0.0",
        "started_at": ended - timedelta(seconds=1),
        "ended_at": ended,
        "requests": requests,
        "failed_requests": 0,
        "prompt_tokens": 1,
        "completion_tokens": 10,
        "decode_seconds": 0.5,
        "ttft_seconds": 0.1,
    }
    return MeasurementBatch(**(values | changes))


async def test_batches_of_two_gateways_become_windows(measured: Measured) -> None:
    now = datetime.now(UTC)
    for gateway_id in ("gw-1", "gw-2"):
        await measured.send(batch("a", gateway_id, requests=3, ended_at=now))
    [window] = await eventually(measured.windows, bool, "a window")
    assert (window.gateways, window.requests, window.tokens_per_s) == (2, 6, 20)
    assert window.started_at <= now < window.ended_at


async def test_duplicates_count_once_and_late_batches_get_a_window_of_their_own(measured: Measured) -> None:
    now = datetime.now(UTC)
    first = batch("a", requests=1, ended_at=now)
    for _ in range(3):
        await measured.send(first)
    await eventually(measured.requests, lambda n: n == 1, "the first window")
    await measured.send(first)
    await measured.send(batch("late", "gw-2", requests=10, ended_at=now))
    await eventually(measured.requests, lambda n: n == 11, "the late one")
    await asyncio.sleep(1.5)
    windows = await measured.windows()
    assert sorted((w.requests, w.gateways) for w in windows) == [(1, 1), (10, 1)]
    assert len({w.started_at for w in windows}) == 1


async def test_no_batch_is_lost_or_counted_twice_when_the_service_is_killed(killable: Measured) -> None:
    """The service is killed six times at different moments while batches arrive: the windows have the exact sum."""
    total = 0
    for round_ in range(6):
        for number in range(20):
            await killable.send(batch(f"{round_}-{number}", requests=number))
            total += number
        await asyncio.sleep(0.17 * round_)
        killable.system.kill("telemetry")
        await killable.system.start("telemetry")
    await eventually(killable.requests, lambda n: n >= total, "every request")
    await asyncio.sleep(1.5)
    assert await killable.requests() == total
    assert await killable.dead_letters() == {}


async def test_foreign_and_invalid_batches_are_dead_lettered_and_the_service_keeps_running(measured: Measured) -> None:
    await measured.send(batch("a", "gw-1", requests=100), subject="measure.gw-2")
    await measured.send(batch("b", "gw-3", decode_seconds=1e300))
    await measured.client.store("measure.gw-4", b"{}", {MESSAGE_ID_HEADER: "garbage"})
    letters = await eventually(measured.dead_letters, lambda found: len(found) == 3, "dead letters")
    assert set(letters) == {"dlq.measure.gw-2", "dlq.measure.gw-3", "dlq.measure.gw-4"}
    await measured.send(batch("good", requests=5))
    await eventually(measured.requests, lambda n: n == 5, "a good batch")


async def test_wrong_batches_are_refused_one_by_one_and_the_others_of_their_transaction_count(
    killable: Measured,
) -> None:
    key = await killable.enrol("gw-4")
    await killable.publish(GatewayRevoked(gateway_id="gw-4", public_key=key, revoked_at=datetime.now(UTC)))
    for kind in (f"{GatewayEnrolled.type}.*", f"{GatewayRevoked.type}.*.*"):
        await eventually(partial(killable.unsettled, kind), lambda n: n == 0, kind)
    killable.system.kill("telemetry")
    good = batch("good", "gw-1", requests=5)
    for one, subject in (
        (good, "measure.gw-1"),
        (batch("foreign", "gw-1", requests=100), "measure.gw-2"),
        (good, "measure.gw-1"),
        (batch("revoked", "gw-4", requests=100), "measure.gw-4"),
        (batch("stranger", "gw-9", requests=100), "measure.gw-9"),
        (batch("last", "gw-1", requests=2), "measure.gw-1"),
    ):
        await killable.send(one, subject)
    await killable.client.store("measure.gw-3", b'{"batch_id": 7}', {MESSAGE_ID_HEADER: "garbage"})
    await killable.system.start("telemetry")
    letters = await eventually(killable.dead_letters, lambda found: len(found) == 4, "dead letters")
    assert letters == {f"dlq.measure.gw-{number}": 1 for number in (2, 3, 4, 9)}
    await eventually(killable.requests, lambda n: n == 7, "the good batches")


CANDIDATE = digest_of(b"2.0.0")


async def test_a_batch_that_does_not_match_an_enrolment_is_dead_lettered(measured: Measured) -> None:
    """Otherwise a gateway of another blueprint could have a rollout rolled back."""
    await measured.enrol("kiosk-1", blueprint="kiosk")
    await measured.send(batch("a", "kiosk-1", requests=500, failed_requests=500))
    await measured.send(batch("b", "stranger", requests=500))
    await measured.send(batch("c", "gw-1", requests=500, blueprint="kiosk"))
    assert "kiosk-1 is enrolled under kiosk but sent a batch for edge-chat" in await measured.reason("measure.kiosk-1")
    assert "stranger is not enrolled" in await measured.reason("measure.stranger")
    assert "gw-1 is enrolled under edge-chat but sent a batch for kiosk" in await measured.reason("measure.gw-1")
    await measured.send(batch("d", "gw-2", requests=3))
    await eventually(measured.requests, lambda n: n == 3, "what is expected")


async def test_a_batch_of_a_release_that_is_not_assigned_to_its_gateway_is_dead_lettered(measured: Measured) -> None:
    """Otherwise a stage could pass because of requests of gateways outside the stage."""
    await measured.enrol("gw-9", ring="canary")
    await measured.start("edge-chat-2", release("2.0.0"), release("1.0.0"))
    await measured.send(batch("a", "gw-9", requests=7, release=CANDIDATE, version="2.0.0"))
    await eventually(measured.requests, lambda n: n == 7, "the canary")
    await measured.send(batch("b", "gw-1", requests=500, release=CANDIDATE, version="2.0.0"))
    assert "rollout edge-chat-2 does not give 2.0.0 to gw-1" in await measured.reason("measure.gw-1")
    await measured.send(batch("c", "gw-2", requests=500, release=CANDIDATE, version="1.0.0"))
    assert "has a release 1.0.0 with digest" in await measured.reason("measure.gw-2")
    await measured.send(batch("d", "gw-3", requests=500, release=digest_of(b"unknown"), version="3.0.0"))
    assert "has a release 3.0.0 with digest" in await measured.reason("measure.gw-3")
    at = datetime.now(UTC)
    advanced = RolloutStageAdvanced(blueprint="edge-chat", rollout="edge-chat-2", stage=1, reason="", at=at)
    await measured.publish(advanced)
    await asyncio.sleep(0.5)
    await measured.send(batch("e", "gw-1", requests=5, release=CANDIDATE, version="2.0.0"))
    await eventually(measured.requests, lambda n: n == 12, "the current stage")


async def test_a_batch_of_a_candidate_counts_by_the_plan_before_the_rollout_event_arrives(measured: Measured) -> None:
    """A gateway reads the plan as soon as it is written; the event of the rollout may arrive later."""
    candidate = Candidate(rollout="edge-chat-2", release=release("2.0.0"), stages=STAGES)
    await measured.write_plan(Plan(blueprint="edge-chat", generation=7, stable=release("1.0.0"), candidate=candidate))
    await measured.enrol("gw-9", ring="canary")
    await measured.send(batch("a", "gw-9", requests=7, release=CANDIDATE, version="2.0.0"))
    await measured.send(batch("b", "gw-1", requests=500, release=CANDIDATE, version="2.0.0"))
    await eventually(measured.requests, lambda n: n == 7, "the canary")
    assert "does not give 2.0.0 to gw-1" in await measured.reason("measure.gw-1")


async def test_the_labels_of_the_latest_report_decide_which_batches_count(measured: Measured) -> None:
    await measured.start("edge-chat-2", release("2.0.0"), release("1.0.0"))
    about = {"blueprint": "edge-chat", "sequence": 1, "labels": {"ring": "canary"}, "phase": UpdatePhase.IDLE}
    await measured.publish(GatewayReported(gateway_id="gw-1", **about, at=datetime.now(UTC)))
    await measured.send(batch("a", "gw-1", requests=7, release=CANDIDATE, version="2.0.0"))
    await eventually(measured.requests, lambda n: n == 7, "the new canary")
    assert await measured.dead_letters() == {}


async def test_batches_of_a_release_that_was_rolled_back_still_count(measured: Measured) -> None:
    """Such batches waited on a gateway without a network."""
    await measured.enrol("gw-9", ring="canary")
    await measured.start("edge-chat-2", release("2.0.0"), release("1.0.0"))
    restored = release("1.0.0")
    at = datetime.now(UTC)
    back = RolloutRolledBack(blueprint="edge-chat", rollout="edge-chat-2", reason="", restored=restored, at=at)
    await measured.publish(back)
    await asyncio.sleep(0.5)
    await measured.send(batch("a", "gw-9", requests=7, release=CANDIDATE, version="2.0.0"))
    await eventually(measured.requests, lambda n: n == 7, "the late batch")
    assert await measured.dead_letters() == {}


async def test_a_batch_that_needs_an_undelivered_event_is_not_dead_lettered(killable: Measured) -> None:
    """An event of a killed process is redelivered after 10 s; until then a batch is checked by the stored events."""
    await killable.enrol("gw-9", ring="canary")
    killable.system.kill("telemetry")
    await killable.start("edge-chat-2", release("2.0.0"), release("1.0.0"))
    durable = "telemetry-slmops_rollout_started_v1"
    reader = await killable.client.js.pull_subscribe_bind(durable, "EVENTS")
    await reader.fetch(1, timeout=5)  # and not acknowledged, as by a killed process
    await killable.system.start("telemetry")
    await killable.send(batch("a", "gw-9", requests=7, release=CANDIDATE, version="2.0.0"))
    await eventually(killable.requests, lambda n: n == 7, "the canary")
    assert await killable.dead_letters() == {}

"""Events and commands between services, on a real nats-server with the real permissions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from integration.kit_world import AT, World, envelope, moved, until, world_on
from prometheus_client import REGISTRY

from slmops.contracts import subjects
from slmops.contracts.clocks import SENT_AT_HEADER
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.commands import (
    FetchPackage,
    ListVersions,
    PackageFiles,
    SetAlias,
    VersionList,
)
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import (
    Conflict,
    Denied,
    InternalError,
    InvalidMessage,
    NotFound,
    PermanentError,
    Unreachable,
)
from slmops.contracts.events import GatewayReported, ModelAliasMoved, UpdatePhase
from slmops.contracts.manifest import PackageFile
from slmops.contracts.measurement import MeasurementBatch
from slmops.kit.bus.client import PROBLEM_HEADER, BusClient
from slmops.kit.bus.nats_auth import creds_text, gateway_jwt, new_user_seed, public_key
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.clock import utc_now
from slmops.kit.settings import BusSettings
from slmops.kit.tracing import span, traceparent

if TYPE_CHECKING:
    from servers import NatsServer

NONE = VersionList(versions=())
ALIAS_CONSUMER = "optimizer-slmops_model_alias_moved_v1"


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


def reported(gateway_id: str) -> GatewayReported:
    return GatewayReported(gateway_id=gateway_id, blueprint="edge-chat", sequence=1, phase=UpdatePhase.IDLE, at=AT)


def measured(gateway_id: str = "gw-1", batch: str = "1") -> MeasurementBatch:
    return MeasurementBatch(
        batch_id=batch,
        gateway_id=gateway_id,
        blueprint="edge-chat",
        release="sha256:" + "a" * 64,
        version="1.0.0",
        started_at=AT,
        ended_at=AT,
        requests=1,
        failed_requests=0,
        prompt_tokens=1,
        completion_tokens=1,
        decode_seconds=1,
        ttft_seconds=1,
    )


# ---- events -----------------------------------------------------------------------------------------------


async def test_an_event_is_delivered_to_every_subscribed_service_and_acknowledged_after_the_handler(
    world: World,
) -> None:
    seen: list[tuple[str, ModelAliasMoved, str]] = []

    def listen(bus: Bus) -> None:
        async def note(event: ModelAliasMoved, delivered: MessageContext) -> None:
            seen.append((bus.service, event, delivered.id))

        bus.on(ModelAliasMoved, note)

    await world.service("optimizer", listen)
    await world.service("rollout", listen)
    event = moved("stable")
    await world.publish(event)
    await until(lambda: len(seen) == 2)
    assert sorted(name for name, _, _ in seen) == ["optimizer", "rollout"]
    assert {(e.alias, found) for _, e, found in seen} == {("stable", envelope(event).id)}
    await asyncio.sleep(0.05)
    assert await world.unsettled("EVENTS", ALIAS_CONSUMER) == 0


async def test_an_event_is_delivered_after_a_stopped_service_starts(world: World) -> None:
    seen: list[str] = []

    def listen(bus: Bus) -> None:
        async def note(event: ModelAliasMoved, _: MessageContext) -> None:
            seen.append(event.alias)

        bus.on(ModelAliasMoved, note)

    await world.publish(moved("before-its-first-start"))
    first = await world.service("optimizer", listen)
    await until(lambda: len(seen) == 1)
    await first.stop()
    await world.publish(moved("while-it-is-down"))
    await world.service("optimizer", listen)
    await until(lambda: len(seen) == 2)
    assert seen == ["before-its-first-start", "while-it-is-down"]


async def test_publishing_the_same_event_again_stores_it_once(world: World) -> None:
    for _ in range(3):
        await world.publish(moved("stable"))
    assert len(await world.stored("EVENTS")) == 1


async def test_two_processes_of_a_service_share_its_events(world: World) -> None:
    handled: list[tuple[int, str]] = []

    def listen(number: int) -> Any:
        def declare(bus: Bus) -> None:
            async def note(event: ModelAliasMoved, _: MessageContext) -> None:
                await asyncio.sleep(0.01)
                handled.append((number, event.alias))

            bus.on(ModelAliasMoved, note)

        return declare

    for number in (1, 2):
        await world.service("optimizer", listen(number))
    await world.publish(*(moved(f"a-{n}") for n in range(30)))
    await until(lambda: len(handled) >= 30)
    await asyncio.sleep(0.1)
    assert Counter(alias for _, alias in handled) == Counter({f"a-{n}": 1 for n in range(30)})
    assert {number for number, _ in handled} == {1, 2}


async def test_events_of_all_gateways_are_consumed_and_metrics_do_not_contain_gateway_ids(world: World) -> None:
    seen: list[str] = []

    def listen(bus: Bus) -> None:
        async def note(_: GatewayReported, delivered: MessageContext) -> None:
            seen.append(delivered.subject)

        bus.on(GatewayReported, note)

    await world.service("telemetry", listen)
    await world.publish(*(reported(f"gw-{n}") for n in range(3)))
    await until(lambda: len(seen) == 3)
    assert sorted(seen) == [f"slmops.gateway.reported.v1.gw-{n}" for n in range(3)]
    await asyncio.sleep(0.05)
    labels = {"service": "telemetry", "subject": "slmops.gateway.reported.v1.{gateway_id}", "outcome": "done"}
    assert REGISTRY.get_sample_value("slmops_messages_total", labels) == 3
    assert not any("gw-" in str(s.labels) for metric in REGISTRY.collect() for s in metric.samples)


async def test_a_measurement_with_a_repeated_message_id_is_consumed_once(world: World) -> None:
    seen: list[tuple[str, str]] = []

    def listen(bus: Bus) -> None:
        async def note(batch: MeasurementBatch, delivered: MessageContext) -> None:
            seen.append((batch.gateway_id, delivered.id))

        bus.consume("measure.*", MeasurementBatch, note)

    await world.service("telemetry", listen)
    payload = measured().model_dump_json().encode()
    for _ in range(2):
        await world.client.store(subjects.measurements("gw-1"), payload, {"Nats-Msg-Id": "gw-1/1"})
    await until(lambda: bool(seen))
    await asyncio.sleep(0.1)
    assert seen == [("gw-1", "gw-1/1")]


async def test_a_handler_continues_the_trace_of_its_event(world: World) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    seen: list[tuple[str | None, str | None]] = []

    def listen(bus: Bus) -> None:
        async def note(_: ModelAliasMoved, delivered: MessageContext) -> None:
            seen.append((delivered.traceparent, traceparent()))

        bus.on(ModelAliasMoved, note)

    await world.service("optimizer", listen)
    event = moved("stable")
    await world.client.publish(event, envelope(event).model_copy(update={"traceparent": parent}))
    await until(lambda: bool(seen))
    assert seen[0][0] == parent
    assert str(seen[0][1]).split("-")[1] == parent.split("-")[1]


# ---- commands ---------------------------------------------------------------------------------------------


def answer_versions(bus: Bus) -> None:
    async def list_versions(command: ListVersions) -> VersionList:
        match command.model:
            case "missing":
                raise NotFound("no such model", where="missing", fix="Push it.")
            case "broken":
                raise ValueError("hunter2")
        return NONE

    bus.serve(ListVersions, list_versions)


async def test_a_command_is_answered_with_its_result(world: World) -> None:
    await world.service("registry", answer_versions)
    assert await world.client.request(ListVersions()) == NONE


async def test_the_requester_gets_the_error_that_the_service_raised(world: World) -> None:
    await world.service("registry", answer_versions)
    with pytest.raises(NotFound) as caught:
        await world.client.request(ListVersions(model="missing"))
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no such model", "missing", "Push it.")


async def test_an_unexpected_exception_is_answered_without_its_text_and_logged_with_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.service("registry", answer_versions)
    with pytest.raises(InternalError) as caught:
        await world.client.request(ListVersions(model="broken"))
    assert "hunter2" not in str(caught.value)
    assert "hunter2" in str(caplog.records[-1].exc_info)
    assert await world.client.request(ListVersions()) == NONE


@pytest.mark.parametrize("payload", [b"{garbage", b"[]", b'{"model":"NO NAME"}', b"\xff\xfe"])
async def test_a_malformed_command_is_refused_and_dead_lettered_and_the_service_keeps_running(
    world: World, payload: bytes
) -> None:
    await world.service("registry", answer_versions)
    reply = await world.client.send(ListVersions, payload)
    assert (reply.headers or {})[PROBLEM_HEADER] == InvalidMessage.code
    (letter,) = await world.dead_letters(1)
    asked = ListVersions().sent_by(world.client.admin.sender)
    assert (letter.subject, letter.data) == (f"dlq.{asked}", payload)
    assert await world.client.request(ListVersions()) == NONE


async def test_a_command_for_a_stopped_service_fails_at_once(world: World) -> None:
    async with asyncio.timeout(2):
        with pytest.raises(Unreachable, match="registry service is not running") as caught:
            await world.client.request(ListVersions())
    assert caught.value.fix


async def test_a_command_without_an_answer_within_its_timeout_fails(world: World) -> None:
    async def never(_: ListVersions) -> VersionList:
        await asyncio.sleep(1)
        return NONE

    await world.service("registry", lambda bus: bus.serve(ListVersions, never))
    with pytest.raises(Unreachable, match=r"did not answer within 0\.2 s"):
        await world.client.request(ListVersions(), timeout=timedelta(seconds=0.2))


async def test_two_processes_of_a_service_share_its_commands(world: World) -> None:
    answered: Counter[int] = Counter()

    def listen(number: int) -> Any:
        def declare(bus: Bus) -> None:
            async def list_versions(_: ListVersions) -> VersionList:
                answered[number] += 1
                return NONE

            bus.serve(ListVersions, list_versions)

        return declare

    for number in (1, 2):
        await world.service("registry", listen(number))
    assert await asyncio.gather(*(world.client.request(ListVersions()) for _ in range(40))) == [NONE] * 40
    assert answered.total() == 40
    assert set(answered) == {1, 2}


async def test_a_slow_command_does_not_delay_other_commands(world: World) -> None:
    async def set_alias(command: SetAlias) -> Any:
        await asyncio.sleep(1)
        raise Denied("no")

    def declare(bus: Bus) -> None:
        bus.serve(SetAlias, set_alias)
        answer_versions(bus)

    await world.service("registry", declare)
    slow = asyncio.create_task(world.client.request(SetAlias(model="m", alias="a", version="1.0.0")))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(0.9):
        await world.client.request(ListVersions())
    with pytest.raises(Denied):
        await slow


async def test_a_gateway_command_whose_subject_names_another_gateway_is_refused(world: World) -> None:
    file = PackageFile(path="a", descriptor=Descriptor.of(b"", "text/plain"), url="http://s3.example/a")
    asked: list[str] = []

    async def fetch(command: FetchPackage) -> PackageFiles:
        asked.append(command.gateway_id)
        return PackageFiles(manifest=file, signature=file, files=(file,))

    await world.service("packager", lambda bus: bus.serve(FetchPackage, fetch))
    command = FetchPackage(gateway_id="gw-1", manifest="sha256:" + "a" * 64)
    assert (await world.client.request(command)).files == (file,)
    forged = await world.client.send(FetchPackage, command.model_dump_json().encode(), "gw-2")
    assert (forged.headers or {})[PROBLEM_HEADER] == PermanentError.code
    assert asked == ["gw-1"]


async def test_the_requester_learns_its_clock_offset_from_every_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def declare(bus: Bus) -> None:
        answer_versions(bus)
        bus.serve(SetAlias, not_found)

    async def not_found(_: SetAlias) -> Any:
        raise NotFound("no such model")

    await world.service("registry", declare)
    await world.client.request(ListVersions())
    assert world.client.clock_ahead is not None
    assert abs(world.client.clock_ahead) < timedelta(minutes=1)
    monkeypatch.setattr("slmops.kit.bus.client.utc_now", lambda: utc_now() + timedelta(days=3))
    with pytest.raises(NotFound):
        await world.client.request(SetAlias(model="m", alias="a", version="1.0.0"))
    assert timedelta(days=3) - timedelta(minutes=1) < world.client.clock_ahead < timedelta(days=3, minutes=1)


async def test_a_message_context_has_the_times_of_arrival_and_of_sending(world: World) -> None:
    found: list[MessageContext] = []

    async def record(_: ModelAliasMoved, delivered: MessageContext) -> None:
        found.append(delivered)

    await world.service("optimizer", lambda bus: bus.on(ModelAliasMoved, record))
    event = moved("stable")
    headers = envelope(event).headers()
    before = utc_now()
    for number, sent in enumerate(("2031-01-01T00:00:00+00:00", "yesterday", None)):
        more = {SENT_AT_HEADER: sent} if sent else {}
        await world.client.store(
            event.subject, event.model_dump_json().encode(), headers | more | {MESSAGE_ID_HEADER: str(number)}
        )
    await until(lambda: len(found) == 3)
    assert all(before <= one.arrived_at <= utc_now() for one in found)
    assert [one.sent_at for one in found] == [datetime(2031, 1, 1, tzinfo=UTC), None, None]


async def test_a_command_handler_continues_the_trace_of_the_request(world: World) -> None:
    seen: list[str | None] = []

    async def list_versions(_: ListVersions) -> VersionList:
        seen.append(traceparent())
        return NONE

    await world.service("registry", lambda bus: bus.serve(ListVersions, list_versions))
    with span("operator", parent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"):
        await world.client.request(ListVersions())
    assert str(seen[0]).split("-")[1] == "4bf92f3577b34da6a3ce929d0e0e4736"


# ---- the twin ---------------------------------------------------------------------------------------------


async def test_a_plan_is_written_read_and_announced(world: World, nats_server: NatsServer, tmp_path: Path) -> None:
    rollout = await world.connect("rollout")
    key = subjects.blueprint_key("edge-chat")
    assert await rollout.read_desired(key) is None
    received: list[tuple[bytes, str]] = []

    async def record(message: Any) -> None:
        received.append((message.data, message.headers["Nats-Sequence"]))

    seed = new_user_seed()
    jwt = gateway_jwt(nats_server.gateway_signing_key.read_text(), public_key(seed), "gw-1", "edge-chat")
    world.creds["gw-1"] = tmp_path / "gw-1.creds"
    world.creds["gw-1"].write_text(creds_text(jwt, seed))
    gateway = await world.connect("gw-1", inbox_prefix=b"_INBOX_gw-1")
    await gateway.connection.subscribe(subjects.twin(key), cb=record)
    await gateway.connection.flush()
    first = await rollout.write_desired(key, b"one", 0)
    second = await rollout.write_desired(key, b"two", first)
    assert second > first
    assert await rollout.read_desired(key) == (b"two", second)
    await until(lambda: len(received) == 2)
    assert received == [(b"one", str(first)), (b"two", str(second))]
    assert await gateway.read_desired(key) == (b"two", second)


async def test_a_plan_is_written_only_over_the_revision_that_was_read(world: World) -> None:
    """Otherwise a slow process of the rollout service would restore a plan that another one has replaced."""
    fast, slow = await world.connect("rollout"), await world.connect("rollout")
    key = subjects.blueprint_key("edge-chat")
    first = await fast.write_desired(key, b"generation 1", 0)
    second = await fast.write_desired(key, b"generation 2", first)
    for outdated in (0, first):
        with pytest.raises(Conflict):
            await slow.write_desired(key, b"generation 1 again", outdated)
    assert await slow.read_desired(key) == (b"generation 2", second)


# ---- connections that fail --------------------------------------------------------------------------------


async def test_connecting_to_a_stopped_server_fails_at_once_with_a_fix() -> None:
    nowhere = BusSettings(nats_url="nats://127.0.0.1:1")
    for attempt in (BusClient.connect(nowhere, name="test"), Bus("registry", nowhere).start()):
        async with asyncio.timeout(5):
            with pytest.raises(Unreachable) as caught:
                await attempt
        assert caught.value.where == "nats://127.0.0.1:1"
        assert "SLMOPS_NATS_URL" in str(caught.value.fix)


async def test_forged_credentials_are_refused(world: World, tmp_path: Path) -> None:
    forged = tmp_path / "forged.creds"
    text = world.creds["registry"].read_text()
    forged.write_text(text.replace(text.split("\n")[1][-20:], "A" * 20))
    with pytest.raises(Unreachable, match=r"(?i)authorization"):
        await BusClient.connect(BusSettings(nats_url=world.url, nats_creds=forged), name="test")

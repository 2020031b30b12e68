"""A message that cannot be handled is stored as a dead letter with its reason, and the service keeps running."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import AT, World, envelope, moved, until, world_on

from slmops.contracts.errors import Conflict, InternalError, NotFound
from slmops.contracts.events import GatewayReported, ModelAliasMoved, UpdatePhase
from slmops.contracts.measurement import MeasurementBatch
from slmops.kit.bus.delivery import CODE_HEADER, CONSUMER_HEADER, REASON_HEADER, SUBJECT_HEADER, dead_letter
from slmops.kit.bus.service_bus import Bus, MessageContext

if TYPE_CHECKING:
    from servers import NatsServer

SUBJECT = ModelAliasMoved.type
CONSUMER = "optimizer-slmops_model_alias_moved_v1"
NO_DELAY = timedelta(0)


@pytest.fixture
def quick_redelivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes redeliveries immediate, and three instead of six."""
    monkeypatch.setattr("slmops.kit.bus.delivery.MAX_DELIVER", 3)
    monkeypatch.setattr("slmops.kit.bus.delivery.BACKOFF_S", (0.02, 0.02))


@pytest.fixture
async def world(nats_server: NatsServer, quick_redelivery: None) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


class Optimizer:
    """A fake optimizer that fails `failures` times, in the way that the alias names, and then succeeds."""

    def __init__(self, failures: int = 99) -> None:
        self.failures = failures
        self.tried: list[str] = []
        self.done: list[str] = []

    async def on_alias(self, event: ModelAliasMoved, _: MessageContext) -> None:
        self.tried.append(event.alias)
        if len(self.tried) <= self.failures:
            match event.alias:
                case "permanent":
                    raise NotFound("no such\nmodel", where="smollm2")
                case "temporary":
                    raise Conflict("busy", delay=NO_DELAY)
                case "defect":
                    raise ValueError("hunter2")
        self.done.append(event.alias)

    def declare(self, bus: Bus) -> None:
        bus.on(ModelAliasMoved, self.on_alias)


async def test_a_permanent_error_is_dead_lettered_at_once_with_its_reason_and_the_original_message(
    world: World,
) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.publish(moved("permanent"))
    (letter,) = await world.dead_letters(1)
    assert optimizer.tried == ["permanent"]
    assert letter.subject == f"dlq.{SUBJECT}"
    assert letter.data == moved("permanent").model_dump_json().encode()
    headers = letter.headers or {}
    assert {key: headers[key] for key in (CODE_HEADER, REASON_HEADER, CONSUMER_HEADER, SUBJECT_HEADER)} == {
        CODE_HEADER: NotFound.code,
        REASON_HEADER: "no such model",
        CONSUMER_HEADER: f"optimizer/{SUBJECT}",
        SUBJECT_HEADER: SUBJECT,
    }
    original = envelope(moved("permanent")).headers()
    assert {k: headers[k] for k in original if k.startswith("ce-")} == {
        k: v for k, v in original.items() if k.startswith("ce-")
    }
    assert await world.unsettled("EVENTS", CONSUMER) == 0


async def test_a_temporary_error_is_retried_and_leaves_no_dead_letter(world: World) -> None:
    optimizer = Optimizer(failures=2)
    await world.service("optimizer", optimizer.declare)
    await world.publish(moved("temporary"))
    await until(lambda: optimizer.done == ["temporary"])
    assert len(optimizer.tried) == 3
    await world.dead_letters(0)


async def test_a_temporary_error_is_dead_lettered_after_the_last_delivery(world: World) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.publish(moved("temporary"))
    (letter,) = await world.dead_letters(1)
    assert (letter.headers or {})[CODE_HEADER] == Conflict.code
    await asyncio.sleep(0.2)
    assert len(optimizer.tried) == 3
    assert await world.unsettled("EVENTS", CONSUMER) == 0


async def test_a_temporary_error_is_retried_after_its_delay(world: World) -> None:
    times: list[float] = []

    async def on_alias(_: ModelAliasMoved, __: MessageContext) -> None:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 1:
            raise Conflict("busy", delay=timedelta(seconds=0.5))

    await world.service("optimizer", lambda bus: bus.on(ModelAliasMoved, on_alias))
    await world.publish(moved("stable"))
    await until(lambda: len(times) == 2)
    assert 0.45 <= times[1] - times[0] < 3


async def test_an_unexpected_exception_is_retried_and_then_dead_lettered_without_its_text(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.publish(moved("defect"))
    (letter,) = await world.dead_letters(1)
    assert len(optimizer.tried) == 3
    assert (letter.headers or {})[CODE_HEADER] == InternalError.code
    assert "hunter2" not in str(letter.headers)
    assert any("hunter2" in str(record.exc_info) for record in caplog.records)


async def test_a_failing_message_does_not_delay_the_next_one(world: World) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.publish(moved("permanent"), moved("temporary"), moved("stable"))
    await until(lambda: optimizer.done == ["stable"])
    letters = await world.dead_letters(2)
    assert [json.loads(letter.data)["alias"] for letter in letters] == ["permanent", "temporary"]


GOOD = moved("stable").model_dump_json().encode()
HEADERS = envelope(moved("stable")).headers()


@pytest.mark.parametrize(
    ("payload", "headers", "reason"),
    [
        (b"{garbage", HEADERS, "payload"),
        (b"\xff\xfe\x00", HEADERS, "payload"),
        (b"", HEADERS, "payload"),
        (b"null", HEADERS, "payload"),
        (b'{"model":"smollm2"}', HEADERS, "alias"),
        (GOOD.replace(b'"stable"', b'"NO NAME"'), HEADERS, "alias"),
        (GOOD, {}, "not a CloudEvent"),
        (GOOD, {k: v for k, v in HEADERS.items() if k != "ce-id"}, "id missing"),
        (GOOD, HEADERS | {"ce-type": "slmops.model.version_retired.v1"}, "version_retired"),
        (GOOD, HEADERS | {"ce-type": "com.example.moved"}, "type missing or malformed"),
        (GOOD, HEADERS | {"ce-time": "yesterday"}, "time"),
        (GOOD, HEADERS | {"ce-specversion": "3.0"}, "specversion"),
    ],
)
async def test_a_malformed_event_is_dead_lettered_and_the_service_keeps_running(
    world: World, payload: bytes, headers: dict[str, str], reason: str
) -> None:
    optimizer = Optimizer()
    await world.service("optimizer", optimizer.declare)
    await world.client.js.publish(SUBJECT, payload, headers=headers | {"Nats-Msg-Id": "malformed"})
    (letter,) = await world.dead_letters(1)
    assert (letter.data, (letter.headers or {})[CODE_HEADER]) == (payload, "invalid_message")
    assert reason in (letter.headers or {})[REASON_HEADER]
    await world.publish(moved("next"))
    await until(lambda: optimizer.done == ["next"])
    assert optimizer.tried == ["next"]


@pytest.mark.parametrize("headers", [{}, {"Nats-Msg-Id": "m-1"}], ids=["without an id", "with an id"])
async def test_a_malformed_measurement_is_dead_lettered(world: World, headers: dict[str, str]) -> None:
    async def note(_: MeasurementBatch, __: MessageContext) -> None:
        pytest.fail("it is malformed")

    await world.service("telemetry", lambda bus: bus.consume("measure.*", MeasurementBatch, note))
    await world.client.js.publish("measure.gw-1", b'{"batch_id":""}', headers=headers)
    (letter,) = await world.dead_letters(1)
    assert letter.subject == "dlq.measure.gw-1"


async def test_the_dead_letter_of_a_gateway_event_names_the_gateway(world: World) -> None:
    async def refuse(_: GatewayReported, __: MessageContext) -> None:
        raise NotFound("no such gateway")

    await world.service("rollout", lambda bus: bus.on(GatewayReported, refuse))
    report = GatewayReported(gateway_id="gw-1", blueprint="edge-chat", sequence=1, phase=UpdatePhase.IDLE, at=AT)
    await world.publish(report)
    (letter,) = await world.dead_letters(1)
    assert letter.subject == "dlq.slmops.gateway.reported.v1.gw-1"
    assert (letter.headers or {})[CONSUMER_HEADER] == "rollout/slmops.gateway.reported.v1.{gateway_id}"


async def test_each_service_that_fails_makes_its_own_dead_letter(world: World) -> None:
    for name in ("optimizer", "packager"):
        await world.service(name, Optimizer().declare)
    await world.publish(moved("permanent"))
    letters = await world.dead_letters(2)
    assert {(letter.headers or {})[CONSUMER_HEADER] for letter in letters} == {
        f"optimizer/{SUBJECT}",
        f"packager/{SUBJECT}",
    }


async def test_dead_lettering_a_message_twice_stores_it_once(world: World) -> None:
    await world.publish(moved("permanent"))
    (message,) = await world.stored("EVENTS")
    for _ in range(2):  # as when a service is killed between the dead letter and the rejection
        await dead_letter(world.client, message, "optimizer/x", NotFound("gone"))
    (letter,) = await world.dead_letters(1)
    assert letter.data == message.data
    assert (letter.headers or {})[CONSUMER_HEADER] == "optimizer/x"


async def test_a_message_is_redelivered_while_its_dead_letter_cannot_be_stored(world: World) -> None:
    optimizer = Optimizer(failures=1)
    await world.service("optimizer", optimizer.declare)
    await world.client.js.delete_stream("DLQ")
    await world.publish(moved("permanent"))
    await until(lambda: optimizer.done == ["permanent"])
    assert len(optimizer.tried) == 2

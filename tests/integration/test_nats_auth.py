"""A real nats-server enforces the permission table: every user may publish and subscribe only on its own subjects."""

from __future__ import annotations

import asyncio
from collections import UserString
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client, RawCredentials
from nats.js.kv import KeyValue
from servers import NatsServer

from slmops.contracts.commands import COMMANDS
from slmops.contracts.errors import InvalidMessage, InvalidName
from slmops.contracts.permissions import ANSWERING_PERMISSIONS, SERVICE_PERMISSIONS, Permissions
from slmops.contracts.subjects import DESIRED_BUCKET, durable_name, inbox_of, stream_of
from slmops.kit.bus.nats_auth import Authority, creds_text, gateway_jwt, new_user_seed, public_key, read_creds
from slmops.kit.bus.provision import consumer, provision

BUCKET = "KV_desired"
PLAN_KEY = "$KV.desired.blueprint.edge-chat"


@dataclass
class User:
    """A connection and the errors with which the server refused its requests."""

    nc: Client
    refused: list[str] = field(default_factory=list)

    async def refusals(self) -> list[str]:
        """Returns the errors since the last call. The server sends them before its answer to a flush."""
        await flush_twice(self.nc)
        found, self.refused[:] = list(self.refused), []
        return found


async def flush_twice(nc: Client) -> None:
    """Waits until the server has received everything. Flushes twice: nats-py's first PING overtakes buffered data."""
    await nc.flush()
    await nc.flush()


@asynccontextmanager
async def connected(url: str, creds: Path | UserString, inbox: bytes = b"_INBOX") -> AsyncIterator[User]:
    refused: list[str] = []

    async def on_error(error: Exception) -> None:
        refused.append(str(error))

    nc = await nats.connect(
        url, user_credentials=creds, inbox_prefix=inbox, error_cb=on_error, allow_reconnect=False, connect_timeout=5
    )
    try:
        yield User(nc, refused)
    finally:
        await nc.close()


def gateway_creds(server: NatsServer, gateway_id: str, blueprint: str = "edge-chat") -> RawCredentials:
    """Returns credentials as enrolment makes them: the gateway's seed, signed by the rollout service."""
    seed = new_user_seed()
    jwt = gateway_jwt(server.gateway_signing_key.read_text(), public_key(seed), gateway_id, blueprint)
    return RawCredentials(creds_text(jwt, seed))


async def stored(observer: User) -> int:
    """Returns the number of messages in all streams."""
    return sum(stream.state.messages for stream in await observer.nc.jetstream().streams_info())


@pytest.fixture
async def observer(nats_server: NatsServer) -> AsyncIterator[User]:
    """Yields a user with all rights in the services' account."""
    creds = nats_server.authority.user_creds("observer", Permissions((">",), (">",)))
    async with connected(nats_server.url, RawCredentials(creds), b"_INBOX_observer") as user:
        yield user


@pytest.fixture
async def desired(observer: User) -> KeyValue:
    js = observer.nc.jetstream()
    await provision(js)
    bucket = await js.key_value(DESIRED_BUCKET)
    for key in ("blueprint.edge-chat", "blueprint.kiosk", "gateway.gw-1", "gateway.gw-2"):
        await bucket.put(key, key.encode())
    return bucket


@pytest.fixture
async def gateway(nats_server: NatsServer, desired: KeyValue) -> AsyncIterator[User]:
    async with connected(nats_server.url, gateway_creds(nats_server, "gw-1"), b"_INBOX_gw-1") as user:
        yield user


@pytest.mark.parametrize("key", ["blueprint.edge-chat", "gateway.gw-1"])
async def test_a_gateway_reads_its_own_plan(gateway: User, key: str) -> None:
    message = await gateway.nc.jetstream().get_last_msg(BUCKET, f"$KV.desired.{key}", direct=True)
    assert message.data == key.encode()
    assert await gateway.refusals() == []


async def test_a_gateway_receives_a_new_plan_with_its_sequence(gateway: User, desired: KeyValue) -> None:
    blueprint = await gateway.nc.subscribe("twin.desired.blueprint.edge-chat")
    own = await gateway.nc.subscribe("twin.desired.gateway.gw-1")
    assert await gateway.refusals() == []
    revision = await desired.put("blueprint.edge-chat", b"plan")
    await desired.put("gateway.gw-1", b"overlay")
    message = await blueprint.next_msg(timeout=5)
    assert (message.data, message.headers and message.headers["Nats-Sequence"]) == (b"plan", str(revision))
    assert (await own.next_msg(timeout=5)).data == b"overlay"


@pytest.mark.parametrize("subject", ["slmops.gateway.reported.v1.gw-1", "measure.gw-1", "presence.gw-1"])
async def test_a_gateway_may_publish_on_its_own_subjects_and_gets_an_acknowledgement(
    gateway: User, subject: str
) -> None:
    ack = await gateway.nc.jetstream().publish(subject, b"{}", timeout=5)
    assert ack.stream == stream_of(subject)
    assert await gateway.refusals() == []


async def test_a_gateway_may_send_requests_to_the_packager_and_gets_the_answer(
    gateway: User, nats_server: NatsServer
) -> None:
    async with connected(nats_server.url, nats_server.creds["packager-answers"]) as packager:
        requests = await packager.nc.subscribe("cmd.packager.fetch.*")
        await flush_twice(packager.nc)
        answer = asyncio.create_task(gateway.nc.request("cmd.packager.fetch.gw-1", b"", timeout=5))
        await (await requests.next_msg(timeout=5)).respond(b"url")
        assert (await answer).data == b"url"
        assert await packager.refusals() == []


@pytest.mark.parametrize(
    "subject",
    [
        "slmops.gateway.reported.v1.gw-2",
        "slmops.gateway.reported.v1.gw-1.more",
        "measure.gw-2",
        "presence.gw-2",
        "cmd.packager.fetch.gw-2",
        "cmd.rollout.start",
        "slmops.rollout.completed.v1.x",
        "$KV.desired.gateway.gw-1",
        "$JS.API.DIRECT.GET.KV_desired.$KV.desired.blueprint.kiosk",
        "$JS.API.DIRECT.GET.KV_desired.$KV.desired.gateway.gw-2",
        "$JS.API.DIRECT.GET.KV_desired",
        "$JS.API.STREAM.INFO.KV_desired",
        "$JS.API.STREAM.MSG.GET.KV_desired",
        "$JS.API.CONSUMER.CREATE.KV_desired",
        "_INBOX_gw-2.x",
    ],
)
async def test_a_gateway_may_not_publish_on_other_subjects(gateway: User, observer: User, subject: str) -> None:
    before = await stored(observer)
    await gateway.nc.publish(subject, b"")
    [refusal] = await gateway.refusals()
    assert "publish" in refusal
    assert subject.lower() in refusal
    assert await stored(observer) == before


@pytest.mark.parametrize(
    "subject",
    [
        ">",
        "twin.desired.>",
        "twin.desired.gateway.*",
        "twin.desired.gateway.gw-2",
        "twin.desired.blueprint.kiosk",
        "$KV.desired.>",
        "measure.*",
        "presence.*",
        "_INBOX.>",
        "_INBOX_gw-2.>",
        "cmd.packager.fetch.gw-1",
    ],
)
async def test_a_gateway_may_not_subscribe_to_other_subjects(gateway: User, subject: str) -> None:
    await gateway.nc.subscribe(subject)
    [refusal] = await gateway.refusals()
    assert "subscription" in refusal
    assert subject.lower() in refusal


async def test_an_unenrolled_gateway_may_only_request_enrolment(nats_server: NatsServer) -> None:
    async with (
        connected(nats_server.url, nats_server.creds["rollout-answers"]) as rollout,
        connected(nats_server.url, nats_server.creds["enrol"], b"_INBOX_enrol") as enrol,
    ):
        requests = await rollout.nc.subscribe("cmd.rollout.enrol")
        await flush_twice(rollout.nc)
        answer = asyncio.create_task(enrol.nc.request("cmd.rollout.enrol", b"", timeout=5))
        await (await requests.next_msg(timeout=5)).respond(b"jwt")
        assert (await answer).data == b"jwt"
        for subject in ("cmd.rollout.start", "measure.gw-1", "slmops.gateway.reported.v1.gw-1", "$JS.API.INFO"):
            await enrol.nc.publish(subject, b"")
            assert len(await enrol.refusals()) == 1, subject
        for subject in (">", "_INBOX.>", "twin.desired.>", "cmd.rollout.enrol"):
            await enrol.nc.subscribe(subject)
            assert len(await enrol.refusals()) == 1, subject


@pytest.mark.parametrize("service", ["registry", "optimizer", "packager", "telemetry"])
async def test_a_service_may_publish_only_on_its_own_subjects(nats_server: NatsServer, service: str) -> None:
    own, *_ = SERVICE_PERMISSIONS[service].publish
    foreign = [p.publish[0] for name, p in SERVICE_PERMISSIONS.items() if name != service]
    async with connected(nats_server.url, nats_server.creds[service], f"_INBOX_{service}".encode()) as user:
        await user.nc.publish(own.replace(">", "happened.v1.x"), b"")
        assert await user.refusals() == []
        for subject in [*(s.replace(">", "happened.v1.x") for s in foreign), "$KV.desired.x", "_INBOX_gw-1.x"]:
            await user.nc.publish(subject, b"")
            assert len(await user.refusals()) == 1, subject


@pytest.mark.parametrize("service", ANSWERING_PERMISSIONS)
async def test_the_user_for_answers_may_publish_only_on_inboxes(nats_server: NatsServer, service: str) -> None:
    patterns = {p for row in SERVICE_PERMISSIONS.values() for p in row.publish if not p.startswith("$JS.ACK")}
    owned = [pattern.replace("*", "x").replace(">", "x") for pattern in sorted(patterns)]
    admin = read_creds(nats_server.creds["console"].read_text()).who
    own = (kind for kind in COMMANDS.values() if kind.service == service)
    kind = next(kind for kind in own if not (kind.per_gateway or kind.anonymous))
    asked = kind.model_construct().sent_by(admin)
    async with (
        connected(nats_server.url, nats_server.creds["console"], inbox_of(admin).encode()) as console,
        connected(nats_server.url, nats_server.creds[f"{service}-answers"]) as answering,
    ):
        requests = await answering.nc.subscribe(asked)
        await flush_twice(answering.nc)
        answer = asyncio.create_task(console.nc.request(asked, b"", timeout=5))
        await (await requests.next_msg(timeout=5)).respond(b"one")
        assert (await answer).data == b"one"
        assert await answering.refusals() == []
        for subject in owned:
            await answering.nc.publish(subject, b"forged")
            assert len(await answering.refusals()) == 1, subject
        for subject in (">", "_INBOX.>", "slmops.>", "measure.*", "$JS.API.>"):
            await answering.nc.subscribe(subject)
            assert len(await answering.refusals()) == 1, subject


async def test_a_service_may_not_subscribe_to_the_inboxes_of_others(nats_server: NatsServer) -> None:
    async with connected(nats_server.url, nats_server.creds["registry"], b"_INBOX_registry") as registry:
        for subject in ("_INBOX.>", "_INBOX_optimizer.>", "_R_.>", ">"):
            await registry.nc.subscribe(subject)
            assert len(await registry.refusals()) == 1, subject


async def test_a_service_may_consume_its_stream_and_read_the_plan_bucket(
    nats_server: NatsServer, desired: KeyValue
) -> None:
    async with connected(nats_server.url, nats_server.creds["telemetry"], b"_INBOX_telemetry") as telemetry:
        js = telemetry.nc.jetstream()
        durable = durable_name("telemetry", "measure.*")
        await consumer(js, "MEASUREMENTS", durable, "measure.*")
        subscription = await js.pull_subscribe("measure.*", durable=durable, stream="MEASUREMENTS")
        async with connected(nats_server.url, gateway_creds(nats_server, "gw-7"), b"_INBOX_gw-7") as gateway:
            await gateway.nc.jetstream().publish("measure.gw-7", b"batch", timeout=5)
        messages = await subscription.fetch(1, timeout=5)
        await messages[0].ack_sync()
        plan = await js.get_last_msg(BUCKET, PLAN_KEY, direct=True)
        assert plan.data == b"blueprint.edge-chat"
        assert await telemetry.refusals() == []


async def test_credentials_of_another_authority_are_refused(nats_server: NatsServer) -> None:
    other = Authority.generate()
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
        async with connected(nats_server.url, RawCredentials(other.service_creds("registry"))):
            pass


async def test_the_gateway_key_cannot_sign_more_than_its_template(nats_server: NatsServer) -> None:
    """A stolen key of the rollout service can make credentials of gateways, but not of services."""
    authority = Authority(**{**vars(nats_server.authority), "services": nats_server.authority.gateways})
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
        async with connected(nats_server.url, RawCredentials(authority.service_creds("registry"))):
            pass


def test_a_gateway_name_that_would_match_other_subjects_is_refused(nats_server: NatsServer) -> None:
    key = nats_server.gateway_signing_key.read_text()
    public = public_key(new_user_seed())
    for bad in ("*", ">", "gw-1.x", "", "GW"):
        with pytest.raises(InvalidName):
            gateway_jwt(key, public, bad, "edge-chat")
        with pytest.raises(InvalidName):
            gateway_jwt(key, public, "gw-1", bad)


def test_anything_but_a_public_user_key_is_not_signed(nats_server: NatsServer) -> None:
    key = nats_server.gateway_signing_key.read_text()
    user = public_key(new_user_seed())
    forged = user[:-1] + ("A" if user[-1] != "A" else "B")
    for bad in ("", "x", "ü", user[:-1], forged, public_key(nats_server.authority.account)):
        with pytest.raises(InvalidMessage):
            gateway_jwt(key, bad, "gw-1", "edge-chat")

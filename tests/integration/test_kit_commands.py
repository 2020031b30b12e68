"""Commands on a real NATS server: concurrency, deadlines, large answers and closed connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from integration.kit_world import World, until, world_on
from nats.aio.client import RawCredentials

from slmops.contracts import subjects
from slmops.contracts.commands import FetchMetadata, ListVersions, MetadataFile, SetAlias, VersionList
from slmops.contracts.commands.registry import VersionView
from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import CredentialsRefused, MessageTooLarge, PermanentError, Unreachable
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.delivery import MESSAGES
from slmops.kit.bus.exchange import remaining
from slmops.kit.bus.nats_auth import creds_text, gateway_jwt, new_user_seed, public_key
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.settings import BusSettings

if TYPE_CHECKING:
    from servers import NatsServer

SHORT = timedelta(milliseconds=200)
NONE = VersionList(versions=())


@pytest.fixture
async def world(nats_server: NatsServer) -> AsyncIterator[World]:
    async with world_on(nats_server.url, nats_server.creds) as world:
        yield world


def version(number: int, size_bytes: int = 0) -> VersionView:
    return VersionView(
        model="m",
        version=f"1.0.{number}",
        digest=digest_of(b"x"),
        format="gguf",
        architecture="x" * size_bytes,
        size_bytes=1,
        state="registered",
        at=utc_now(),
    )


# ---- concurrency ------------------------------------------------------------------------------------------


async def test_slow_requests_on_one_subject_are_handled_concurrently(world: World) -> None:
    """If several gateways fetch at the same time and are served one after the other, the last ones time out."""
    together = asyncio.Barrier(4)

    async def list_versions(_: ListVersions) -> VersionList:
        await together.wait()
        return NONE

    await world.service("registry", lambda bus: bus.serve(ListVersions, list_versions))
    asking = [world.client.request(ListVersions(), timedelta(seconds=10)) for _ in range(4)]
    assert await asyncio.gather(*asking) == [NONE] * 4


# ---- deadlines --------------------------------------------------------------------------------------------


async def test_a_request_whose_deadline_has_passed_is_not_executed(world: World) -> None:
    release, done = asyncio.Event(), list[str]()

    async def list_versions(command: ListVersions) -> VersionList:
        done.append(command.model or "")
        if command.model == "slow":
            await release.wait()
        return NONE

    await world.service("registry", lambda bus: bus.serve(ListVersions, list_versions, at_once=1))
    slow = asyncio.create_task(world.client.request(ListVersions(model="slow")))
    await until(lambda: done == ["slow"])
    given_up = MESSAGES.labels("registry", ListVersions.subject_template(), "given_up")
    before = given_up._value.get()
    with pytest.raises(Unreachable, match=r"did not answer within 0\.2 s"):
        await world.client.request(ListVersions(model="expired"), SHORT)
    await until(lambda: given_up._value.get() > before)  # the service counts the time from the arrival
    waiting = asyncio.create_task(world.client.request(ListVersions(model="waiting")))
    await world.client.connection.flush()
    release.set()
    assert await slow == await waiting == NONE
    assert done == ["slow", "waiting"]


async def test_a_running_request_is_cancelled_at_its_deadline(world: World) -> None:
    stopped = asyncio.Event()

    async def list_versions(_: ListVersions) -> VersionList:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.set()
            raise
        return NONE

    await world.service("registry", lambda bus: bus.serve(ListVersions, list_versions))
    with pytest.raises(Unreachable):
        await world.client.request(ListVersions(), SHORT)
    async with asyncio.timeout(10):
        await stopped.wait()


async def test_a_nested_request_inherits_the_remaining_time_of_the_outer_request(world: World) -> None:
    asked: list[float] = []

    async def list_versions(_: ListVersions) -> VersionList:
        return NONE

    async def set_alias(command: SetAlias) -> Any:
        asked.append(remaining(timedelta(seconds=30)).total_seconds())
        raise PermanentError("no")

    def declare(bus: Bus) -> None:
        bus.serve(ListVersions, list_versions)
        bus.serve(SetAlias, set_alias)

    await world.service("registry", declare)
    with pytest.raises(PermanentError):
        await world.client.request(SetAlias(model="m", alias="a", version="1.0.0"), timedelta(seconds=7))
    assert 0 < asked[0] <= 7


# ---- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [1 << 10, (1 << 20) - 600, 1 << 20, 5 << 20])
async def test_an_answer_larger_than_a_message_is_received(world: World, size_bytes: int) -> None:
    """Includes a size that fits into a message only without its headers: the server must not close the connection."""

    async def list_versions(_: ListVersions) -> VersionList:
        return VersionList(versions=tuple(version(n, size_bytes // 4) for n in range(4)))

    await world.service("registry", lambda bus: bus.serve(ListVersions, list_versions))
    found = await world.client.request(ListVersions())
    assert [len(one.architecture) for one in found.versions] == [size_bytes // 4] * 4


async def test_a_request_or_answer_above_the_limit_is_an_error(world: World, nats_server: NatsServer) -> None:
    async def list_versions(_: ListVersions) -> VersionList:
        return VersionList(versions=tuple(version(n, 1 << 20) for n in range(70)))

    async def fetch(command: FetchMetadata) -> MetadataFile:
        return MetadataFile.model_construct(file=command.file, content="x" * (2 << 20))

    await world.service("registry", lambda bus: bus.serve(ListVersions, list_versions))
    await world.service("packager", lambda bus: bus.serve(FetchMetadata, fetch))
    with pytest.raises(MessageTooLarge, match="the answer has"):
        await world.client.request(ListVersions())
    gateway = await connected(world, nats_server)
    with pytest.raises(MessageTooLarge, match="the answer has"):
        await gateway.request(FetchMetadata(gateway_id="gw-1", file="timestamp.json"))
    with pytest.raises(MessageTooLarge, match="the request has"):
        await world.client.request(ListVersions.model_construct(model="x" * (1 << 20)))
    assert world.client.connection.is_connected


# ---- a connection that is closed permanently --------------------------------------------------------------


async def connected(world: World, server: NatsServer, expires_in_s: int | None = None) -> BusClient:
    seed = new_user_seed()
    jwt = gateway_jwt(server.gateway_signing_key.read_text(), public_key(seed), "gw-1", "edge-chat")
    if expires_in_s is not None:
        jwt = expiring(server, public_key(seed), expires_in_s)
    client = await BusClient.connect(
        BusSettings(nats_url=server.url),
        name="gw-1",
        user_credentials=RawCredentials(creds_text(jwt, seed)),
        inbox_prefix=subjects.inbox("gw-1").encode(),
    )
    world.stack.push_async_callback(client.close)
    return client


def expiring(server: NatsServer, key: str, in_s: int) -> str:
    """Returns a gateway's credential that expires while the gateway is connected."""
    original = json.dumps

    def dumps(document: Any, *rest: Any, **options: Any) -> str:
        if isinstance(document, dict) and "sub" in document:
            document = document | {"exp": int(utc_now().timestamp()) + in_s}
        return original(document, *rest, **options)

    with patch.object(json, "dumps", dumps):
        return gateway_jwt(server.gateway_signing_key.read_text(), key, "gw-1", "edge-chat")


async def test_a_client_reports_that_its_connection_was_closed_permanently(
    world: World, nats_server: NatsServer
) -> None:
    gateway = await connected(world, nats_server, expires_in_s=2)
    assert not gateway.closed.is_set()
    async with asyncio.timeout(30):
        await gateway.closed.wait()
    with pytest.raises(CredentialsRefused):
        await gateway.request(FetchMetadata(gateway_id="gw-1", file="timestamp.json"))

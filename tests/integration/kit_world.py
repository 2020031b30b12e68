"""An empty bus for each test on the session's real nats-server, and the helpers that its tests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import ConsumerConfig, DeliverPolicy

from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.commands import Command
from slmops.contracts.events import Event, ModelAliasMoved
from slmops.contracts.permissions import Permissions
from slmops.kit.bus.client import BusClient, R
from slmops.kit.bus.exchange import REQUEST_TIMEOUT
from slmops.kit.bus.nats_auth import Authority
from slmops.kit.bus.provision import provision
from slmops.kit.bus.service_bus import Bus
from slmops.kit.settings import BusSettings

AT = datetime(2026, 1, 2, tzinfo=UTC)


def moved(alias: str) -> ModelAliasMoved:
    return ModelAliasMoved(model="smollm2", alias=alias, version="1.0.0", at=AT)


def envelope(event: Event, **changes: str) -> Envelope:
    attributes = {"id": event_id(event.model_dump_json()), "source": "test", "type": event.type}
    return Envelope(time=AT, **(attributes | changes))


async def until(condition: Callable[[], bool], within_s: float = 15) -> None:
    """Polls `condition` until it is true; fails after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


class Everything(BusClient):
    """A connection that may do everything in the services' account. It sends commands as an admin, as people do."""

    admin: BusClient

    @classmethod
    async def open(cls, url: str, keys: Path, **options: Any) -> Everything:
        settings = BusSettings(nats_url=url, nats_creds=unrestricted(keys, "test"))
        client = await cls.connect(settings, name="test", **options)
        assert isinstance(client, cls)
        as_admin = settings.model_copy(update={"nats_creds": keys / "console.creds"})
        client.admin = await BusClient.connect(as_admin, name="test admin", **options)
        return client

    async def request(self, command: Command[R], timeout: timedelta = REQUEST_TIMEOUT) -> R:
        try:
            return await self.admin.request(command, timeout)
        finally:
            self.clock_ahead = self.admin.clock_ahead

    async def send(self, kind: type[Command[Any]], payload: bytes, gateway_id: str = "") -> Msg:
        """Sends any payload as a command."""
        subject = kind.model_construct(gateway_id=gateway_id).sent_by(self.admin.sender)
        return await self.admin.connection.request(subject, payload, timeout=10)

    async def close(self) -> None:
        await self.admin.close()
        await super().close()


@dataclass
class World:
    """`client` may do everything in the services' account, also delete streams. It sends commands as an admin."""

    url: str
    creds: dict[str, Path]
    client: Everything
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def settings(self, user: str) -> BusSettings:
        return BusSettings(nats_url=self.url, nats_creds=self.creds[user])

    async def connect(self, user: str, **options: Any) -> BusClient:
        client = await BusClient.connect(self.settings(user), name=user, **options)
        self.stack.push_async_callback(client.close)
        return client

    async def service(self, name: str, declare: Callable[[Bus], None]) -> Bus:
        """Starts a fake service that runs until the test ends. It may also consume what the real one may not."""
        bus = Bus(name, BusSettings(nats_url=self.url, nats_creds=unrestricted(self.creds["console"].parent, name)))
        declare(bus)
        await bus.start()
        self.stack.push_async_callback(bus.stop)
        return bus

    async def publish(self, *events: Event) -> None:
        for event in events:
            await self.client.publish(event, envelope(event))

    async def stored(self, stream: str) -> list[Msg]:
        """Returns every message of a stream, oldest first."""
        count = (await self.client.js.stream_info(stream)).state.messages
        config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
        reader = await self.client.js.pull_subscribe("", stream=stream, config=config)
        found: list[Msg] = []
        while len(found) < count:
            try:
                found += await reader.fetch(count - len(found), timeout=5)
            except NatsTimeout:
                break
        await reader.unsubscribe()
        return found

    async def dead_letters(self, count: int, within_s: float = 15) -> list[Msg]:
        """Waits for `count` dead letters and asserts that there are no more. Returns them."""
        deadline = time.monotonic() + within_s
        while (present := (await self.client.js.stream_info("DLQ")).state.messages) < count:
            assert time.monotonic() < deadline, f"{present} dead letters instead of {count}"
            await asyncio.sleep(0.02)
        found = await self.stored("DLQ")
        assert len(found) == count
        return found

    async def unsettled(self, stream: str, durable: str) -> int:
        """Returns how many messages a consumer has not handled or not acknowledged yet."""
        info = await self.client.js.consumer_info(stream, durable)
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0)


def unrestricted(keys: Path, user: str) -> Path:
    """Returns credentials with all rights in the services' account. Those for answers are the user's real ones.

    `keys` is the folder with the keys of the bus.
    """
    path = keys.parent / "unrestricted" / f"{user}.creds"
    if not path.exists():
        authority = Authority.from_json((keys / "nats-authority.json").read_text())
        path.parent.mkdir(exist_ok=True)
        path.write_text(authority.user_creds(user, Permissions((">",), (">",))))
    answering = keys / f"{user}-answers.creds"
    if answering.exists():
        (path.parent / answering.name).write_text(answering.read_text())
    return path


async def wipe(client: BusClient) -> None:
    for stream in await client.js.streams_info():
        await client.js.delete_stream(str(stream.config.name))


async def start_empty(client: BusClient, attempts: int = 5) -> None:
    """Makes the streams anew, so that they are empty whatever other tests left on the session's server.

    A stream made right after its deletion was once seen with its old message, and so with the id in its dedupe window:
    the next message with that id was then dropped as a duplicate.
    """
    for _ in range(attempts):
        await wipe(client)
        await provision(client.js)
        if not any(stream.state.last_seq for stream in await client.js.streams_info()):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("deleted streams came back with their old messages")


@asynccontextmanager
async def world_on(url: str, creds: dict[str, Path]) -> AsyncIterator[World]:
    client = await Everything.open(url, creds["console"].parent)
    await start_empty(client)
    world = World(url, dict(creds), client)
    try:
        yield world
    finally:
        await world.stack.aclose()
        await wipe(client)
        await client.close()

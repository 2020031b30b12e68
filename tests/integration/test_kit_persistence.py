"""nats-server is killed while it acknowledges: no acknowledged fact is lost.

A stream that is written asynchronously loses at most its newest messages, and its consumers receive the next ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from integration.kit_world import Everything, until
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig, PersistMode

from slmops.contracts.events import ModelAliasMoved
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus import provisioner
from slmops.kit.bus.provision import provision
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.settings import BusSettings
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.process import spawn
from slmops.local.servers import nats_answers, nats_spec

FACT, MEASURED, IN_FLIGHT = ModelAliasMoved.type, "measure.gw-1", 64


class Server:
    """A nats-server with our streams, which a test kills and starts again."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder)
        self.layout.prepare()
        self._port = choose_ports(self.layout.ports_file, ["nats"])["nats"]
        self.url = f"nats://{HOST}:{self._port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await spawn(nats_spec(self.layout, self._port))
        while not await nats_answers(self._port):
            assert self._process.returncode is None
            await asyncio.sleep(0.02)

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    def settings(self, user: str) -> BusSettings:
        return BusSettings(nats_url=self.url, nats_creds=self.layout.creds(user))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    await server.start()
    await provisioner.run(server.settings(PROVISIONER))
    yield server
    await server.kill()


async def connected(server: Server) -> Everything:
    return await Everything.open(server.url, server.layout.keys, allow_reconnect=False)


async def publish(server: Server, subject: str, acknowledged: list[int], enough: int) -> None:
    """Publishes with 64 in flight, and kills the server after `enough` acknowledgements."""
    client = await connected(server)

    async def one_after_another() -> None:
        with suppress(NatsError, TimeoutError, OSError):
            while True:
                acknowledged.append((await client.js.publish(subject, b"x" * 450, timeout=10)).seq)

    running = [asyncio.create_task(one_after_another()) for _ in range(IN_FLIGHT)]
    await until(lambda: len(acknowledged) >= enough, within_s=60)
    await server.kill()
    await until(lambda: client.connection.is_closed)
    await cancel_and_wait(running)


async def stored(server: Server, stream: str) -> int:
    """Returns the last sequence; asserts that the stream has no hole before it."""
    client = await connected(server)
    state = (await client.js.stream_info(stream)).state
    await client.close()
    assert state.messages == state.last_seq - max(state.first_seq, 1) + 1
    return int(state.last_seq)


async def test_a_killed_server_has_every_acknowledged_fact(server: Server) -> None:
    acknowledged: list[int] = []
    await publish(server, FACT, acknowledged, 300)
    await server.start()
    assert await stored(server, "EVENTS") >= max(acknowledged)


async def consume(client: Everything, seen: list[int]) -> None:
    """Acknowledges everything that arrives, until the connection is lost."""
    config = ConsumerConfig(ack_wait=1, max_ack_pending=100)
    pull = await client.js.pull_subscribe(MEASURED, "telemetry", "MEASUREMENTS", config=config)
    while client.connection.is_connected:
        with suppress(NatsError, TimeoutError):
            for message in await pull.fetch(100, timeout=0.5):
                await message.ack()
                seen.append(message.metadata.sequence.stream)


async def test_a_killed_server_loses_only_the_newest_measurements_and_delivers_the_next_ones(server: Server) -> None:
    """The consumer may have acknowledged messages that are lost. Their numbers are given to the next ones."""
    acknowledged: list[int] = []
    before: list[int] = []
    reader = await connected(server)
    reading = asyncio.ensure_future(consume(reader, before))
    await publish(server, MEASURED, acknowledged, 3000)
    await reading
    await server.start()
    last = await stored(server, "MEASUREMENTS")
    lost = [number for number in acknowledged if number > last]
    print(f"{len(lost)} of {len(acknowledged)} acknowledged measurements are lost, {len(before)} were consumed")
    assert len(lost) < len(acknowledged) / 2

    client = await connected(server)
    after: list[int] = []
    reading = asyncio.ensure_future(consume(client, after))
    new = {(await client.js.publish(MEASURED, b"{}")).seq for _ in range(100)}
    assert min(new) == last + 1
    await until(lambda: new <= {*after} and {*range(1, last + 1)} <= {*before, *after}, within_s=60)
    await client.close()
    await reading


async def test_only_measurements_reports_and_presence_are_written_asynchronously(server: Server) -> None:
    client = await connected(server)
    found = {str(i.config.name): i.config.persist_mode for i in await client.js.streams_info()}
    await client.close()
    asynchronous = {name for name, mode in found.items() if mode == PersistMode.ASYNC}
    assert asynchronous == {"MEASUREMENTS", "GATEWAYS", "PRESENCE"}


async def test_a_stream_of_an_earlier_release_keeps_its_synchronous_writes(server: Server) -> None:
    """The server refuses to change them."""
    client = await connected(server)
    await client.js.delete_stream("MEASUREMENTS")
    await client.js.add_stream(name="MEASUREMENTS", subjects=["measure.*"], max_bytes=1 << 20)
    await provision(client.js)
    config = (await client.js.stream_info("MEASUREMENTS")).config
    await client.close()
    assert (config.persist_mode, config.max_bytes) == (None, 1 << 30)

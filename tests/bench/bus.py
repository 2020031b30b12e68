"""Compares the bus and the journal with raw nats-py and sqlite3 on the same real nats-server and disk."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

from bench.comparison import Comparison, Measured, Place
from integration.kit_world import unrestricted
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError
from sqlalchemy import MetaData

from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.commands import ListVersions, VersionList
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.bus.batches import Refused
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.relay import drain
from slmops.kit.bus.service_bus import Batch, Bus, MessageContext
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.settings import BusSettings
from slmops.local.system import System

EVENTS, APPENDS, REQUESTS, IN_FLIGHT, KEYS = 1024, 100, 500, 64, 100
BATCHED, BATCH = 4096, 256
DISK_ROUNDS = 7  # the time of an fsync varies tenfold from second to second
STREAM, SUBJECT = "EVENTS", ModelAliasMoved.type
DURABLE = "registry-" + SUBJECT.replace(".", "_")
_INSERT = """INSERT INTO journal (stream, version, id, type, data, time, traceparent, published)
             VALUES (?, 1, ?, ?, ?, ?, NULL, 0)"""


async def measure(place: Place) -> Measured:
    async with System(place.scratch / "system", services=(), gateways=()) as system:
        settings = {
            user: system.bus_settings(user, nats_creds=unrestricted(system.layout.keys, user))
            for user in ("console", "registry")
        }
        client = await BusClient.connect(settings["console"], name="bench")
        try:
            return Measured(await _Bus(client, settings["registry"], place).compare())
        finally:
            await client.close()


class _Bus:
    def __init__(self, client: BusClient, service: BusSettings, place: Place) -> None:
        self.client, self.js, self.service, self.place = client, client.js, service, place
        self.numbers = itertools.count()

    async def compare(self) -> list[Comparison]:
        compare = self.place.side_by_side
        return [
            await compare("publish, one at a time", "per s", "nats-py js.publish", self.bare_publish, self.publish),
            await compare(
                "outbox to JetStream (relay)", "per s", "nats-py js.publish, 64 in flight", self.bare_flood, self.relay
            ),
            await compare("consume", "per s", "nats-py fetch(64), ack each", self.bare_consume, self.consume),
            await compare("consume", "per s", "nats-py fetch(1), ack", self.bare_consume_singly, self.consume),
            await compare(
                "consume once (idempotent, durable)",
                "per s",
                "fetch(64), sqlite3 transaction, ack each",
                self.bare_consume_once,
                self.consume_once,
                DISK_ROUNDS,
            ),
            await compare(
                "consume once, in batches",
                "per s",
                "fetch(256), one sqlite3 transaction, ack each",
                self.bare_consume_batches,
                self.consume_batches,
                DISK_ROUNDS,
            ),
            await compare(
                "journal append",
                "per s",
                "sqlite3 transaction, synchronous=FULL",
                self.bare_append,
                self.append,
                DISK_ROUNDS,
            ),
            await compare("command and answer", "per s", "nats-py request", self.bare_request, self.request),
        ]

    def message(self) -> tuple[ModelAliasMoved, Envelope]:
        number = next(self.numbers)
        event = ModelAliasMoved(model=f"m{number % KEYS}", alias="stable", version=f"{number}.0.0", at=utc_now())
        return event, Envelope(id=event_id(event.version), source="bench", type=SUBJECT, time=event.at)

    async def bare_publish(self) -> float:
        async def publish() -> None:
            for _ in range(EVENTS):
                event, envelope = self.message()
                await self.raw(event, envelope)

        return EVENTS / await _seconds(publish())

    async def raw(self, event: ModelAliasMoved, envelope: Envelope) -> None:
        await self.js.publish(SUBJECT, event.model_dump_json().encode(), stream=STREAM, headers=envelope.headers())

    async def publish(self) -> float:
        async def publish() -> None:
            for _ in range(EVENTS):
                await self.client.publish(*self.message())

        return EVENTS / await _seconds(publish())

    async def bare_flood(self) -> float:
        return EVENTS / await _seconds(self.flood())

    async def flood(self, count: int = EVENTS) -> None:
        for _ in range(0, count, IN_FLIGHT):
            await asyncio.gather(*(self.raw(*self.message()) for _ in range(IN_FLIGHT)))

    async def relay(self) -> float:
        async with self.journal() as (journal, _):
            events = [self.message()[0] for _ in range(EVENTS)]
            await journal.transact(lambda unit: unit.append(f"{next(self.numbers)}", 0, events))

            async def publish() -> None:
                while await drain(journal, self.client):
                    pass

            return EVENTS / await _seconds(publish())

    async def bare_consume(self) -> float:
        return await self.bare_pull(lambda message: None)

    async def bare_consume_singly(self) -> float:
        return await self.bare_pull(lambda message: None, batch=1)

    async def bare_consume_once(self) -> float:
        async with self.journal() as (_, path):
            with closing(_sqlite(path)) as db:

                def first_time(message: Msg) -> None:
                    db.execute("BEGIN IMMEDIATE")
                    db.execute("INSERT OR IGNORE INTO consumed VALUES (?, 0)", ((message.headers or {})["ce-id"],))
                    db.execute("COMMIT")

                return await self.bare_pull(first_time)

    async def bare_pull(self, work: Callable[[Msg], None], batch: int = IN_FLIGHT) -> float:
        await self.preload()
        pull = await self.js.pull_subscribe(SUBJECT, DURABLE, STREAM)
        times: list[float] = []
        while len(times) < EVENTS:
            for message in await pull.fetch(batch):
                work(message)
                await message.ack()
                times.append(time.perf_counter())
        await pull.unsubscribe()
        return _rate(times)

    async def bare_consume_batches(self) -> float:
        await self.preload(BATCHED)
        pull = await self.js.pull_subscribe(SUBJECT, DURABLE, STREAM)
        times: list[float] = []
        async with self.journal() as (_, path):
            with closing(_sqlite(path)) as db:
                while len(times) < BATCHED:
                    messages = await pull.fetch(BATCH)
                    db.execute("BEGIN IMMEDIATE")
                    ids = [((message.headers or {})["ce-id"],) for message in messages]
                    db.executemany("INSERT OR IGNORE INTO consumed VALUES (?, 0)", ids)
                    db.execute("COMMIT")
                    for message in messages:
                        await message.ack()
                    times += [time.perf_counter()] * len(messages)
        await pull.unsubscribe()
        return _rate(times)

    async def consume_batches(self) -> float:
        await self.preload(BATCHED)
        times: list[float] = []
        done = asyncio.Event()
        async with self.journal() as (journal, _):

            async def handle(batch: Batch[ModelAliasMoved]) -> Refused:
                ids = [received.context.id for received in batch]
                await journal.transact(lambda unit: unit.first_times("bench", ids))
                times.extend([time.perf_counter()] * len(batch))
                if len(times) >= BATCHED:
                    done.set()
                return {}

            bus = Bus("registry", self.service)
            bus.on_batches(ModelAliasMoved, handle)
            await bus.start()
            try:
                await asyncio.wait_for(done.wait(), 120)
            finally:
                await bus.stop()
        return _rate(times)

    async def consume(self) -> float:
        async def nothing(_event: ModelAliasMoved, _delivered: MessageContext) -> None:
            pass

        return await self.handled(nothing)

    async def consume_once(self) -> float:
        async with self.journal() as (journal, _):

            async def first_time(_event: ModelAliasMoved, delivered: MessageContext) -> None:
                await journal.transact(lambda unit: unit.first_time("bench", delivered.id))

            return await self.handled(first_time)

    async def handled(self, work: Callable[[ModelAliasMoved, MessageContext], Awaitable[None]]) -> float:
        """Measures from the first message to the last, as in `bare_pull`, without the start of the service."""
        await self.preload()
        times: list[float] = []
        done = asyncio.Event()

        async def handle(event: ModelAliasMoved, delivered: MessageContext) -> None:
            await work(event, delivered)
            times.append(time.perf_counter())
            if len(times) == EVENTS:
                done.set()

        bus = Bus("registry", self.service)
        bus.on(ModelAliasMoved, handle)
        await bus.start()
        try:
            await asyncio.wait_for(done.wait(), 120)
        finally:
            await bus.stop()
        return _rate(times)

    async def preload(self, count: int = EVENTS) -> None:
        """Prepares a stream with at least `count` messages, none of them consumed."""
        with suppress(NotFoundError):  # in the first round
            await self.js.delete_consumer(STREAM, DURABLE)
        await self.js.purge_stream(STREAM)
        await self.flood(count)

    async def bare_append(self) -> float:
        async with self.journal() as (_, path):
            with closing(_sqlite(path)) as db:
                start = time.perf_counter()
                for _ in range(APPENDS):
                    event, envelope = self.message()
                    row = (event.version, envelope.id, SUBJECT, event.model_dump_json(), event.at.isoformat())
                    db.execute("BEGIN IMMEDIATE")
                    db.execute(_INSERT, row)
                    db.execute("COMMIT")
                return APPENDS / (time.perf_counter() - start)

    async def append(self) -> float:
        async with self.journal() as (journal, _):
            start = time.perf_counter()
            for _ in range(APPENDS):
                event, _envelope = self.message()
                await journal.transact(lambda unit, event=event: unit.append(event.version, 0, [event]))  # type: ignore[misc]
            return APPENDS / (time.perf_counter() - start)

    @asynccontextmanager
    async def journal(self) -> AsyncIterator[tuple[Journal, Path]]:
        """Returns an empty journal and its file. The bare side writes the same tables."""
        path = self.place.scratch / f"journal-{next(self.numbers)}.db"
        journal = Journal(
            f"sqlite:///{path}", service="bench", metadata=MetaData(), migrations=None, project=lambda _c, _e: None
        )
        await journal.open()
        try:
            yield journal, path
        finally:
            await journal.close()

    async def bare_request(self) -> float:
        connection = self.client.connection
        payload = VersionList(versions=()).model_dump_json().encode()

        async def answer(message: Msg) -> None:
            await message.respond(payload)

        answering = self.service.model_copy(update={"nats_creds": self.service.answering_creds})
        server = await BusClient.connect(answering, name="bench")
        await server.connection.subscribe("cmd.registry.list_versions", cb=answer)
        await server.connection.flush()
        start = time.perf_counter()
        for _ in range(REQUESTS):
            await connection.request("cmd.registry.list_versions", b"{}")
        seconds = time.perf_counter() - start
        await server.close()
        return REQUESTS / seconds

    async def request(self) -> float:
        async def answer(_query: ListVersions) -> VersionList:
            return VersionList(versions=())

        bus = Bus("registry", self.service)
        bus.serve(ListVersions, answer)
        await bus.start()
        start = time.perf_counter()
        for _ in range(REQUESTS):
            await self.client.request(ListVersions())
        seconds = time.perf_counter() - start
        await bus.stop()
        return REQUESTS / seconds


def _sqlite(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    return db


def _rate(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


async def _seconds(work: Awaitable[None]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start

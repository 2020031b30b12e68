"""The journal: event-sourced state in SQL, with an outbox, in one transaction.

Invariants
1. An event is stored if and only if it will be published: `append` fills the outbox in the same transaction.
2. Two writers of a stream cannot both succeed: the unique (stream, version) rejects the second, which decides again.
3. A consumed event changes state once: its id is stored in the same transaction as its effects.
4. Read tables never lag: `project` runs inside the transaction.
5. An opened journal has the tables of this release: `open` migrates them, or refuses the database.

The database is SQLite (WAL, synchronous=FULL, embedded) or, by changing the URL, PostgreSQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.errors import (
    Conflict,
    DatabaseFull,
    DatabaseUnreachable,
    InternalError,
    MessageTooLarge,
    SlmopsError,
    TemporaryError,
)
from slmops.contracts.events import EVENTS, Event
from slmops.kit.acting import current_actor
from slmops.kit.clock import Clock, utc_now
from slmops.kit.migrations import migrate
from slmops.kit.threads import Threads
from slmops.kit.tracing import traceparent

T = TypeVar("T")
_ATTEMPTS = 8  # for a transaction that lost a race; each attempt reads again
_SOON = {"connect_timeout": 10, "tcp_user_timeout": 15_000}
"""Seconds and milliseconds after which libpq gives up."""
EVENT_LIMIT_BYTES = (1 << 20) - 8192
"""NATS' default limit of a message, with room for headers."""
_FORGOTTEN_AT_ONCE = 5000  # other writers wait meanwhile
_THREADS = 8
"""One writes, the others read; as many as the database pool gives connections without waiting for one."""
_POSITION = BigInteger().with_variant(Integer, "sqlite")  # SQLite auto-increments only INTEGER primary keys


def journal_tables(metadata: MetaData) -> tuple[Table, Table]:
    """Adds the two tables of every journal to `metadata`, which also holds the service's read tables."""
    events = Table(
        "journal",
        metadata,
        Column("position", _POSITION, primary_key=True, autoincrement=True),
        Column("stream", String(200), nullable=False),
        Column("version", Integer, nullable=False),
        Column("id", String(64), nullable=False, unique=True),
        Column("type", String(120), nullable=False),
        Column("data", Text, nullable=False),
        Column("time", String(40), nullable=False),
        Column("traceparent", String(64)),
        Column("actor", String(140)),  # who sent the command that caused it
        Column("published", Boolean, nullable=False, default=False, index=True),
        UniqueConstraint("stream", "version"),
    )
    consumed = Table(
        "consumed",
        metadata,
        Column("id", String(200), primary_key=True),
        Column("at", Double, nullable=False, server_default="0", index=True),  # Unix seconds
    )
    return events, consumed


def put(connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Updates the row with this key or inserts it, with statements that every database supports.

    Call it within `Journal.transact`: its writers wait for one another, so nobody inserts the row in between.
    """
    matches = [table.c[column] == value for column, value in key.items()]
    if connection.execute(update(table).where(*matches).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(**key, **values))


@dataclass(frozen=True)
class Recorded:
    """A stored event with its envelope and its position in the journal."""

    position: int
    envelope: Envelope
    event: Event


Project = Callable[[Connection, Event], None]


class UnitOfWork:
    """One transaction: read, decide, append. Only `Journal.transact` creates it."""

    def __init__(self, journal: Journal, connection: Connection) -> None:
        self.connection = connection
        self._journal = journal

    def load(self, stream: str) -> tuple[list[Event], int]:
        """Returns the events of a stream, oldest first, and its version (0: it does not exist)."""
        table = self._journal.events
        rows = self.connection.execute(
            select(table.c.type, table.c.data, table.c.version)
            .where(table.c.stream == stream)
            .order_by(table.c.version)
        ).all()
        return [_decode(row.type, row.data) for row in rows], rows[-1].version if rows else 0

    def append(self, stream: str, expected_version: int, events: Iterable[Event]) -> None:
        """Stores and projects events and queues them for publication.

        Raises `Conflict` if the stream has changed, and `MessageTooLarge` for an event that the bus would not take,
        because it would hold up all later ones in the outbox.
        """
        journal, now, parent = self._journal, self._journal.clock(), traceparent()
        actor = current_actor()
        for version, item in enumerate(events, start=expected_version + 1):
            data = item.model_dump_json()
            if len(data.encode()) > EVENT_LIMIT_BYTES:
                raise MessageTooLarge(
                    f"a {item.type} would have {len(data)} bytes", where=stream, fix="Use fewer files."
                )
            row = {
                "stream": stream,
                "version": version,
                "id": event_id(journal.service, stream, str(version)),
                "type": item.type,
                "data": data,
                "time": now.isoformat(),
                "traceparent": parent,
                "actor": str(actor) if actor else None,
                "published": False,
            }
            try:
                self.connection.execute(insert(journal.events), row)
            except IntegrityError as error:
                raise Conflict(f"stream {stream} moved past version {expected_version}") from error
            journal.project(self.connection, item)

    def emit(self, stream: str, events: Iterable[Event]) -> None:
        """Appends events at the stream's current version, for events that depend on no decision."""
        table = self._journal.events
        last = self.connection.execute(select(func.max(table.c.version)).where(table.c.stream == stream)).scalar()
        self.append(stream, last or 0, events)

    def first_time(self, consumer: str, message_id: str) -> bool:
        """Returns whether `consumer` sees this message for the first time. Stored when the transaction commits."""
        return bool(self.first_times(consumer, [message_id]))

    def first_times(self, consumer: str, message_ids: Iterable[str]) -> set[str]:
        """Returns those of up to some hundred messages that `consumer` sees for the first time, with two statements."""
        keys = {f"{consumer}/{message_id}": message_id for message_id in message_ids}
        table, at = self._journal.consumed, self._journal.clock().timestamp()
        for key in self.connection.execute(select(table.c.id).where(table.c.id.in_(keys))).scalars():
            del keys[key]
        if keys:
            self.connection.execute(insert(table), [{"id": key, "at": at} for key in keys])
        return set(keys.values())


class DatabaseProblem(BaseModel):
    """A database that does not answer. `path` is its URL without the password."""

    model_config = ConfigDict(frozen=True)

    path: str
    reason: str
    since: AwareDatetime


class Journal:
    """The database of one service. `project` updates the service's read tables in the same transaction.

    `migrations` is the folder whose revisions lead to the tables in `metadata`. None creates the tables without a
    revision, for a database that no later release opens.
    """

    def __init__(
        self,
        url: str,
        *,
        service: str,
        metadata: MetaData,
        migrations: Path | None,
        project: Project,
        clock: Clock = utc_now,
    ) -> None:
        self.service = service
        self.clock = clock
        self.project = project
        self.metadata = metadata
        self.migrations = migrations
        self.events, self.consumed = journal_tables(metadata)
        self.appended = asyncio.Event()
        self._engine = _engine(url)
        self._where = make_url(url).render_as_string(hide_password=True)
        self._threads = Threads("journal", _THREADS)
        # One writer at a time in this process: more threads would only wait for each other in the database.
        self._lock = asyncio.Lock()
        self._outage: DatabaseProblem | None = None

    def problem(self) -> DatabaseProblem | None:
        """Returns why the database does not answer, as of its last use; None if it does."""
        return self._outage

    async def open(self) -> None:
        """Migrates the database to the tables of this release.

        Raises `IncompatibleDatabase`, `DatabaseUnreachable`, `DatabaseFull`, and `Conflict` if another process held it
        too long.
        """

        def prepare() -> None:
            file = self._engine.url.database
            if self._engine.dialect.name == "sqlite" and file:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            with self._engine.begin() as connection:
                if self.migrations is None:
                    self.metadata.create_all(connection)
                else:
                    migrate(connection, self.migrations, self._where)

        for attempt in range(_ATTEMPTS):
            try:
                await self._guarded(prepare)
                break
            except Conflict:  # SQLite does not wait for a process that is making the file
                if attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.05 * 2**attempt)

    async def close(self) -> None:
        await self._threads.run(self._engine.dispose)
        self._threads.close()

    async def transact(self, work: Callable[[UnitOfWork], T]) -> T:
        """Runs `work` in one transaction, and again from the start if it lost a race. Raises the errors of `work`.

        A caller that is cancelled does not stop the transaction, because its thread goes on and its events must be
        published.
        """
        running = asyncio.ensure_future(self._transact(work))
        running.add_done_callback(lambda task: task.cancelled() or task.exception())  # also if nobody waits any more
        return await asyncio.shield(running)

    async def _transact(self, work: Callable[[UnitOfWork], T]) -> T:
        def once() -> T:
            with self._engine.begin() as connection:
                return work(UnitOfWork(self, connection))

        async with self._lock:
            for attempt in range(_ATTEMPTS):
                try:
                    result = await self._guarded(once)
                    break
                except Conflict:
                    if attempt == _ATTEMPTS - 1:
                        raise
        self.appended.set()
        return result

    async def forget_consumed(self, before: datetime) -> int:
        """Forgets some of the ids that `first_time` stored before that time; returns how many, 0 if none is left.

        A message that is delivered again after that counts as new.
        """
        table = self.consumed
        oldest = select(table.c.id).where(table.c.at < before.timestamp()).limit(_FORGOTTEN_AT_ONCE)

        def forget(unit: UnitOfWork) -> int:
            return unit.connection.execute(delete(table).where(table.c.id.in_(oldest))).rowcount

        return await self.transact(forget)

    async def forget_published(self, before: datetime) -> int:
        """Deletes some of the published events that were recorded before that time, except the newest of each stream.

        Returns how many, 0 if none is left. Only for a service that never replays its events.
        """
        table = self.events
        newest = select(func.max(table.c.position)).group_by(table.c.stream)
        oldest = (
            select(table.c.position)
            .where(table.c.published.is_(True), table.c.time < before.isoformat(), table.c.position.not_in(newest))
            .limit(_FORGOTTEN_AT_ONCE)
        )

        def forget(unit: UnitOfWork) -> int:
            return unit.connection.execute(delete(table).where(table.c.position.in_(oldest))).rowcount

        return await self.transact(forget)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs a query on the read tables."""

        def once() -> T:
            with self._engine.connect().execution_options(only_reads=True) as connection:
                return work(connection)

        return await self._guarded(once)

    async def outbox(self, limit: int = 200, without: Collection[str] = ()) -> list[Recorded]:
        """Returns a page of the events that are not published yet, oldest first.

        `without` are types of events that are left out, and with them the later events of their streams. Growth: the
        page; with `without` the events that are left out and the versions of the streams of the page.
        """
        table, earlier = self.events, self.events.alias()
        wanted = select(table).where(table.c.published.is_(False)).order_by(table.c.position).limit(limit)
        if without:
            waiting = exists().where(
                earlier.c.stream == table.c.stream,
                earlier.c.version < table.c.version,
                earlier.c.published.is_(False),
                earlier.c.type.in_(without),
            )
            wanted = wanted.where(table.c.type.not_in(without), ~waiting)

        def query(connection: Connection) -> list[Recorded]:
            return [self._recorded(row) for row in connection.execute(wanted).all()]

        return await self.read(query)

    async def history(self, after: int = 0, limit: int = 1000, kind: type[Event] | None = None) -> list[Recorded]:
        """Returns a page of all events, or of one kind, in order of recording, for replaying any state."""
        table = self.events
        wanted = select(table).where(table.c.position > after).order_by(table.c.position).limit(limit)
        if kind is not None:
            wanted = wanted.where(table.c.type == kind.type)

        def query(connection: Connection) -> list[Recorded]:
            return [self._recorded(row) for row in connection.execute(wanted).all()]

        return await self.read(query)

    async def newest(self, stream: str, before: int | None, limit: int) -> list[Recorded]:
        """Returns the newest events of a stream, newest first; with `before`, those before that position."""
        table = self.events
        wanted = select(table).where(table.c.stream == stream).order_by(table.c.version.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(table.c.position < before)

        def query(connection: Connection) -> list[Recorded]:
            return [self._recorded(row) for row in connection.execute(wanted).all()]

        return await self.read(query)

    async def published(self, positions: Iterable[int]) -> None:
        table = self.events

        def mark() -> None:
            with self._engine.begin() as connection:
                connection.execute(update(table).where(table.c.position.in_(list(positions))).values(published=True))

        async with self._lock:
            await self._guarded(mark)

    def _recorded(self, row: Any) -> Recorded:
        item = _decode(row.type, row.data)
        envelope = Envelope(
            id=row.id,
            source=f"slmops/{self.service}",
            type=row.type,
            time=datetime.fromisoformat(row.time),
            subject=item.key,
            traceparent=row.traceparent,
            actor=row.actor,
        )
        return Recorded(row.position, envelope, item)

    async def _guarded(self, work: Callable[[], T]) -> T:
        try:
            result = await self._answered(work)
        except DatabaseUnreachable as error:
            since = self._outage.since if self._outage else self.clock()
            self._outage = DatabaseProblem(path=self._where, reason=error.what, since=since)
            raise
        self._outage = None
        return result

    async def _answered(self, work: Callable[[], T]) -> T:
        try:
            return await self._threads.run(work)
        except SlmopsError:
            raise
        except IntegrityError as error:
            raise Conflict("another writer committed first", where=self._where) from error
        except (ProgrammingError, DataError):
            raise  # a defect of slmops, not a state of the database
        except DBAPIError as error:
            raise _passing(str(error.orig).partition("\n")[0], self._where) from error
        except OSError as error:
            raise _passing(str(error), self._where) from error


def _passing(reason: str, where: str) -> TemporaryError:
    """Returns the error for a database's message. Drivers have no common codes for these conditions."""
    said = reason.lower()
    if any(word in said for word in ("is full", "no space", "readonly")):
        fix = "Free disk space, and check that the folder is writable."
        return DatabaseFull(f"the journal cannot grow: {reason}", where=where, fix=fix)
    if any(word in said for word in ("locked", "serializ", "deadlock")):
        return Conflict(f"the journal is busy: {reason}", where=where)
    fix = "Check SLMOPS_DATABASE_URL, and that the database runs or that the folder of its file is writable."
    return DatabaseUnreachable(f"the journal's database does not answer: {reason}", where=where, fix=fix)


def _decode(kind: str, data: str) -> Event:
    found = EVENTS.get(kind)
    if found is None:
        raise InternalError(f"the journal holds {kind}, which is unknown to this release", fix="Upgrade the service.")
    return found.model_validate_json(data)


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        # A host that vanished must not keep a connection waiting until TCP gives up, which takes a quarter of an hour.
        engine = create_engine(url, pool_pre_ping=True, connect_args=_SOON if "postgresql" in url else {})
        event.listen(engine, "begin", _queue_in_postgres)
        return engine
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _queue_in_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, below
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


# Writers of all processes queue up; readers do not wait. So positions are committed in order, and a stream seldom
# changes between a writer's read and write.


def _queue_in_sqlite(connection: Connection) -> None:
    # A deferred transaction would fail with SQLITE_BUSY at its first write after a read, without waiting.
    connection.exec_driver_sql("BEGIN" if _only_reads(connection) else "BEGIN IMMEDIATE")


def _queue_in_postgres(connection: Connection) -> None:
    if not _only_reads(connection):
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1)")


def _only_reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("only_reads"))

"""A connection to the bus for requests, publishing and reading the twin. Services add handlers on top (`kit.bus`)."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nats.aio.client import Client as Connection
from nats.errors import ConnectionClosedError, NoRespondersError, NoServersError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import Header, RawStreamMsg
from nats.js.errors import APIError, NotFoundError
from opentelemetry.trace import SpanKind
from pydantic import BaseModel, ValidationError

from slmops.contracts import subjects
from slmops.contracts.clocks import TIME_HEADER, time_in
from slmops.contracts.cloudevent import Envelope
from slmops.contracts.commands import Command
from slmops.contracts.errors import Conflict, CredentialsRefused, InvalidMessage, MessageTooLarge, Problem, Unreachable
from slmops.contracts.events import Event
from slmops.contracts.identity import Actor, ActorKind, service
from slmops.kit.bus.accounts import API, PEOPLE_API
from slmops.kit.bus.dialing import DialedConnection, Handshakes, encryption
from slmops.kit.bus.exchange import HEADER_ROOM_BYTES, MAX_PARTS, PARTS_HEADER, REQUEST_TIMEOUT, exchange, remaining
from slmops.kit.bus.nats_auth import Credentials, read_creds
from slmops.kit.bus.refusals import no_room
from slmops.kit.clock import utc_now
from slmops.kit.settings import BusSettings
from slmops.kit.tls import https_trust
from slmops.kit.tracing import span, traceparent

log = logging.getLogger("slmops.client")
R = TypeVar("R", bound=BaseModel)
E = TypeVar("E", bound=Event)
PROBLEM_HEADER = "slmops-problem"
NOBODY = "nobody"
"""The sender of a connection without credentials, which only a test's server accepts."""
_WRONG_SEQUENCE = {10071, 10164}
"""The server's error codes for a subject that is not at the expected sequence."""
_NO_SUCH_MESSAGE = 10043
PUBLISH_TIMEOUT_S = 10.0  # the client's default is 0.5 s, which a busy disk exceeds


class BusClient:
    """A wrapper of a nats-py connection. Methods raise `Unreachable` and the answering service's typed errors."""

    def __init__(
        self,
        connection: Connection,
        reconnected: list[Callable[[], None]] | None = None,
        closed: asyncio.Event | None = None,
        handshakes: Handshakes | None = None,
        verify: ssl.SSLContext | bool = True,
        sender: Actor | None = None,
    ) -> None:
        self.connection = connection
        self.verify = verify
        """httpx's `verify` for presigned URLs of this system."""
        self._handshakes = handshakes
        self.sender = sender or service(NOBODY)
        """Whose credentials it uses. Every command is sent in this name; the server refuses any other."""
        self.closed = closed or asyncio.Event()
        """Set when the connection is closed for good, for example because the server rejected the credentials again."""
        self._reconnected = reconnected if reconnected is not None else []
        self.clock_ahead: timedelta | None = None
        """How far this machine's clock is ahead of the services', as of the last answer; None before the first."""
        self.api = PEOPLE_API if self.sender.kind is ActorKind.PERSON else API
        """The name of JetStream's API in the account of the sender."""
        self.js: JetStreamContext = connection.jetstream(timeout=PUBLISH_TIMEOUT_S, prefix=self.api)

    @classmethod
    async def connect(cls, settings: BusSettings, *, name: str, patient: bool = True, **options: Any) -> BusClient:
        """Connects. `patient` reconnects forever after the first success; a first failure is always an error.

        Raises `Unreachable`, `CredentialsRefused`, `ServerUntrusted`, `InvalidMessage`.
        """
        sender = None
        if settings.nats_creds is not None and "user_credentials" not in options:
            sender = sender_in(settings.nats_creds)
            options = {
                "user_credentials": str(settings.nats_creds),
                "inbox_prefix": subjects.inbox_of(sender).encode(),
            } | options
        reconnected: list[Callable[[], None]] = []
        closed, handshakes = asyncio.Event(), Handshakes(settings)
        reconnected.append(handshakes.succeeded)

        async def on_close() -> None:
            closed.set()

        async def on_reconnect() -> None:
            for callback in reconnected:
                callback()

        dial = partial(
            _dialed,
            settings.nats_proxy,
            reconnected_cb=on_reconnect,
            servers=settings.nats_url.split(","),
            name=name,
            connect_timeout=5,
            reconnect_time_wait=0.5,
            error_cb=handshakes.note,
            **encryption(settings),
            **options,
        )
        try:
            # nats-py retries a first connection as often as a later one (60 times). Connect once without retries, so
            # a wrong address is an error at once.
            connection = await dial(allow_reconnect=False, max_reconnect_attempts=1)
            if patient:
                await connection.close()
                connection = await dial(max_reconnect_attempts=-1, closed_cb=on_close)
        except (TimeoutError, NatsError, NoServersError, OSError) as error:
            raise handshakes.failed or _no_connection(error, settings.nats_url) from error
        return cls(connection, reconnected, closed, handshakes, https_trust(settings.tls_ca), sender)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Registers a callback for each reconnection. Messages on plain subjects were missed before it."""
        self._reconnected.append(callback)

    async def close(self) -> None:
        if not self.connection.is_closed:
            await self.connection.close()

    async def request(self, command: Command[R], timeout: timedelta = REQUEST_TIMEOUT) -> R:
        """Sends `command` to its service and returns the result.

        Inside a command that this process carries out, it waits no longer than the requester of that command.
        Raises the service's typed error, `MessageTooLarge`, and `Unreachable`.
        """
        template = type(command).subject_template()
        with span(f"request {template}", kind=SpanKind.CLIENT):
            headers = _with_trace({"content-type": "application/json"})
            if not command.per_gateway:  # between gateways' account and ours the server returns only one message
                headers[PARTS_HEADER] = str(MAX_PARTS)
            payload = command.model_dump_json(by_alias=True).encode()
            asked_at, timeout = utc_now(), remaining(timeout)
            try:
                subject = command.sent_by(self.sender)
                answer = await exchange(self.connection, subject, payload, timeout, headers)
            except NoRespondersError as error:
                raise Unreachable(
                    f"the {command.service} service is not running",
                    where=template,
                    fix="Start it and try again.",
                ) from error
            except ConnectionClosedError as error:
                raise _closed(self.connection) from error
            except (TimeoutError, NatsError) as error:
                if self._handshakes is not None and self._handshakes.failed and not self.connection.is_connected:
                    raise self._handshakes.failed from error
                raise Unreachable(
                    f"the {command.service} service did not answer within {timeout.total_seconds():g} s",
                    where=template,
                    fix="Try again. If it happens again, check the service's log.",
                ) from error
            self._compare_clocks(asked_at, answer.headers)
            return _answer(command, answer.data, answer.headers)

    def _compare_clocks(self, asked_at: datetime, headers: Mapping[str, str] | None) -> None:
        """Compares the clocks. The services' time counts as that in the middle of the request."""
        if (theirs := time_in((headers or {}).get(TIME_HEADER))) is not None:
            self.clock_ahead = asked_at + (utc_now() - asked_at) / 2 - theirs

    async def publish(self, event: Event, envelope: Envelope) -> None:
        """Stores an event on its stream and waits for the acknowledgement. Repeating it changes nothing."""
        await self.store(event.subject, event.model_dump_json().encode(), envelope.headers())

    async def store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        """Publishes to the stream that owns `subject` and waits for its acknowledgement.

        Raises `Unreachable`, `DiskFull` if the stream refuses the message and does not store it, and `MessageTooLarge`.
        """
        stream = subjects.stream_of(subject)
        if len(payload) > self.connection.max_payload - HEADER_ROOM_BYTES:
            raise MessageTooLarge(f"the message has {len(payload)} bytes, too many for the bus", where=subject)
        try:
            await self.js.publish(subject, payload, timeout=PUBLISH_TIMEOUT_S, stream=stream, headers=dict(headers))
        except (TimeoutError, NatsError, OSError) as error:
            if full := await no_room(self.js, stream or subject, error):
                raise full from error
            raise Unreachable(f"JetStream did not store the message: {error}", where=subject) from error

    async def tell(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> bool:
        """Publishes a message that may be lost, and waits for nothing. Returns False if there is no connection now."""
        if not self.connection.is_connected:
            return False
        try:
            await self.connection.publish(subject, payload, headers=dict(headers))
        except (NatsError, OSError):
            return False
        return True

    async def recorded(self, kind: type[E], after: int = 0) -> AsyncIterator[tuple[int, E]]:
        """Yields the stored events of a kind after sequence `after`, oldest first, each with its sequence.

        Skips messages that do not parse. Raises `Unreachable`.
        """
        async for sequence, _subject, data in self.stored(kind.type, after):
            if event := _event(kind, data):
                yield sequence, event

    async def stored(self, pattern: str, after: int = 0) -> AsyncIterator[tuple[int, str, bytes]]:
        """Yields sequence, subject and payload of the messages stored on the subjects of a pattern, oldest first.

        Reads them one at a time, so a reader that crashes leaves nothing on the server. Raises `Unreachable`.
        """
        stream = subjects.stream_of(pattern)
        assert stream is not None, f"no stream stores {pattern}"
        try:
            last = (await self.js.stream_info(stream)).state.last_seq
            after = after if after <= last else 0  # the stream was recreated
            while after < last:
                message = await self.js.get_msg(stream, seq=after + 1, subject=pattern, next=True, direct=True)
                after = int(message.seq or 0)
                if after <= last:
                    yield after, message.subject or "", bytes(message.data or b"")
        except NotFoundError:
            return
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the stored events cannot be read: {error}", where=stream) from error

    async def latest(self, kind: type[E], key: str) -> E | None:
        """Returns the last stored event of a kind and key, such as a gateway's. Raises `Unreachable`."""
        message = await self.last_message(kind, key)
        return _event(kind, message.data) if message else None

    async def sequence_of(self, kind: type[E], key: str) -> int | None:
        """Returns the sequence of the last stored event of a kind and key, None without one. Raises `Unreachable`."""
        message = await self.last_message(kind, key)
        return int(message.seq or 0) if message else None

    async def last_message(self, kind: type[E], key: str) -> RawStreamMsg | None:
        """Returns the last stored message of a kind and key, as the server stored it. Raises `Unreachable`."""
        subject = f"{kind.type}.{key}"
        try:
            return await self.js.get_msg(_stream_of(subject), subject=subject, direct=True)
        except NotFoundError:
            return None
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the stored events cannot be read: {error}", where=subject) from error

    async def delete_stored(self, kind: type[E], key: str, sequence: int) -> None:
        """Deletes one stored event. Deleting it again changes nothing. Raises `Unreachable`."""
        stream = _stream_of(f"{kind.type}.{key}")
        try:
            await self.js.delete_msg(stream, sequence)
        except (TimeoutError, NatsError) as error:
            if isinstance(error, APIError) and error.err_code == _NO_SUCH_MESSAGE:
                return
            raise Unreachable(f"the stored event cannot be deleted: {error}", where=stream) from error

    async def read_desired(self, key: str) -> tuple[bytes, int] | None:
        """Returns a twin document and its revision by direct get; None if it does not exist."""
        try:
            bucket = f"KV_{subjects.DESIRED_BUCKET}"
            message = await self.js.get_msg(bucket, subject=subjects.desired(key), direct=True)
        except NotFoundError:
            return None
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the twin cannot be read: {error}", where=key) from error
        return bytes(message.data or b""), int(message.seq or 0)

    async def desired_keys(self, pattern: str) -> list[str]:
        """Returns the keys of the twin that match a subject pattern, sorted."""
        prefix = subjects.desired("")
        try:
            found = await self.js.stream_info(f"KV_{subjects.DESIRED_BUCKET}", subjects_filter=prefix + pattern)
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the twin cannot be listed: {error}", where=pattern) from error
        return sorted(subject.removeprefix(prefix) for subject in found.state.subjects or {})

    async def write_desired(self, key: str, data: bytes, replaces: int) -> int:
        """Writes a twin document and returns its revision. Only the service that owns the plan may do this.

        `replaces`: the revision that the caller read; 0 if there was no document. Raises `Conflict` if another process
        has written since, and `Unreachable`.
        """
        try:
            ack = await self.js.publish(
                subjects.desired(key),
                data,
                stream=f"KV_{subjects.DESIRED_BUCKET}",
                timeout=PUBLISH_TIMEOUT_S,
                headers={Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(replaces)},
            )
        except (TimeoutError, NatsError) as error:
            if isinstance(error, APIError) and error.err_code in _WRONG_SEQUENCE:
                raise Conflict("another process wrote the plan first", where=key) from error
            raise Unreachable(f"the plan was not stored: {error}", where=key) from error
        return ack.seq


def _stream_of(subject: str) -> str:
    stream = subjects.stream_of(subject)
    assert stream is not None, f"no stream stores {subject}"
    return stream


def sender_in(creds: Path) -> Actor:
    """Returns whose credentials a file holds. Raises `InvalidMessage`."""
    return read_file(creds).who


def read_file(creds: Path) -> Credentials:
    """Reads a credentials file. Raises `InvalidMessage`."""
    try:
        return read_creds(creds.read_text())
    except OSError as error:
        raise InvalidMessage(
            f"the credentials cannot be read: {error.strerror}", where=str(creds), fix="Set SLMOPS_NATS_CREDS."
        ) from error


def _closed(connection: Connection) -> Unreachable:
    """Returns the error for a connection that is closed for good: connecting again is for whoever opened it."""
    url, last = str(connection.connected_url or ""), connection.last_error
    if last is not None and _is_refusal(str(last)):
        return _no_connection(last, url)
    return Unreachable("the connection to NATS is closed", where=url or None, fix="Connect again.")


def _is_refusal(reason: str) -> bool:
    """Returns whether the server rejected credentials. It says so in several ways, also when they expire or are
    revoked while connected."""
    return any(word in reason.lower() for word in ("authorization", "authentication", "credentials"))


def _no_connection(error: Exception, url: str) -> Unreachable:
    reason = str(error) or type(error).__name__
    if _is_refusal(reason):
        fix = "Use credentials of this system: set SLMOPS_NATS_CREDS."
        return CredentialsRefused(f"NATS rejected the credentials: {reason}", where=url, fix=fix)
    fix = "Start it (slmops up) or set SLMOPS_NATS_URL and SLMOPS_NATS_CREDS."
    return Unreachable(f"NATS does not answer: {reason}", where=url, fix=fix)


async def _dialed(proxy: str | None, **options: Any) -> Connection:
    connection = DialedConnection(proxy)
    await connection.connect(**options)
    return connection


def _event(kind: type[E], data: bytes | None) -> E | None:
    try:
        return kind.model_validate_json(data or b"")
    except ValidationError as error:
        log.warning("skipped a message on %s that does not validate: %s errors", kind.type, error.error_count())
        return None


def _with_trace(headers: dict[str, str]) -> dict[str, str]:
    parent = traceparent()
    return headers | {"traceparent": parent} if parent else headers


def _answer(command: Command[R], data: bytes, headers: Mapping[str, str] | None) -> R:
    try:
        if headers and PROBLEM_HEADER in headers:
            raise Problem.model_validate_json(data).error()
        return command.result_type().model_validate_json(data)
    except ValidationError as error:
        raise InvalidMessage(
            f"the answer of the {command.service} service does not validate",
            where=type(command).subject_template(),
            fix="Run the same release of slmops everywhere.",
        ) from error

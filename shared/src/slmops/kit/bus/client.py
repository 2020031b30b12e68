"""One connection to the bus, for asking, publishing and reading the twin. Services add handlers on top (`kit.bus`)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nats
from nats.aio.client import Client as Connection
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError, NoServersError
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from opentelemetry.trace import SpanKind
from pydantic import BaseModel, ValidationError

from slmops.contracts import subjects
from slmops.contracts.cloudevent import Envelope
from slmops.contracts.commands import Command
from slmops.contracts.errors import CredentialsRefused, InvalidMessage, Problem, Unreachable
from slmops.contracts.events import Event
from slmops.kit.bus.nats_auth import user_of
from slmops.kit.bus.refusals import no_room
from slmops.kit.settings import BusSettings
from slmops.kit.tracing import span, traceparent

log = logging.getLogger("slmops.client")
R = TypeVar("R", bound=BaseModel)
E = TypeVar("E", bound=Event)
PROBLEM_HEADER = "slmops-problem"
REQUEST_TIMEOUT = timedelta(seconds=30)
PUBLISH_TIMEOUT_S = 10.0  # the client's default is 0.5 s, which a busy disk exceeds


class BusClient:
    """Wraps a nats-py connection. Raises `Unreachable`, and the answering service's typed errors."""

    def __init__(self, connection: Connection, reconnected: list[Callable[[], None]] | None = None) -> None:
        self.connection = connection
        self._reconnected = reconnected if reconnected is not None else []
        self.js: JetStreamContext = connection.jetstream(timeout=PUBLISH_TIMEOUT_S)

    @classmethod
    async def connect(cls, settings: BusSettings, *, name: str, patient: bool = True, **options: Any) -> BusClient:
        """Connect. `patient` keeps trying for ever after the first success; the first failure is always an error.

        Raises `Unreachable`, `CredentialsRefused`, `InvalidMessage`.
        """
        if settings.nats_creds is not None and "user_credentials" not in options:
            options = _as_user(settings.nats_creds) | options
        reconnected: list[Callable[[], None]] = []

        async def on_reconnect() -> None:
            for callback in reconnected:
                callback()

        dial = partial(
            nats.connect,
            reconnected_cb=on_reconnect,
            servers=settings.nats_url.split(","),
            name=name,
            connect_timeout=5,
            reconnect_time_wait=0.5,
            error_cb=_quiet,
            **options,
        )
        try:
            # nats-py retries a first connection as often as a later one (60 times): dial without, so that a wrong
            # address is an error now.
            connection = await dial(allow_reconnect=False, max_reconnect_attempts=1)
            if patient:
                await connection.close()
                connection = await dial(max_reconnect_attempts=-1)
        except (TimeoutError, NatsError, NoServersError, OSError) as error:
            raise _no_connection(error, settings.nats_url) from error
        return cls(connection, reconnected)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call back after each reconnection: what was published meanwhile on plain subjects was missed."""
        self._reconnected.append(callback)

    async def close(self) -> None:
        if not self.connection.is_closed:
            await self.connection.close()

    async def request(self, command: Command[R], timeout: timedelta = REQUEST_TIMEOUT) -> R:
        """Ask the service that owns `command`. Raises the service's own typed error, or `Unreachable`."""
        template = type(command).subject_template()
        with span(f"request {template}", kind=SpanKind.CLIENT):
            headers = _with_trace({"content-type": "application/json"})
            payload = command.model_dump_json(by_alias=True).encode()
            try:
                answer = await self.connection.request(
                    command.subject, payload, timeout=timeout.total_seconds(), headers=headers
                )
            except NoRespondersError as error:
                raise Unreachable(
                    f"the {command.service} service is not running",
                    where=command.subject,
                    fix="Start it and try again.",
                ) from error
            except (TimeoutError, NatsError) as error:
                raise Unreachable(
                    f"the {command.service} service did not answer within {timeout.total_seconds():g} s",
                    where=command.subject,
                    fix="Try again; if it repeats, look at its log.",
                ) from error
            return _answer(command, answer.data, answer.headers)

    async def publish(self, event: Event, envelope: Envelope) -> None:
        """Store an event on its stream, acknowledged. Publishing the same envelope again changes nothing."""
        await self.store(event.subject, event.model_dump_json().encode(), envelope.headers())

    async def store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        """Publish to the stream that owns `subject` and wait for its acknowledgement.

        Raises `Unreachable`, and `DiskFull` when the stream refuses: then the message is not stored.
        """
        stream = subjects.stream_of(subject)
        try:
            await self.js.publish(subject, payload, timeout=PUBLISH_TIMEOUT_S, stream=stream, headers=dict(headers))
        except (TimeoutError, NatsError, OSError) as error:
            if full := await no_room(self.js, stream or subject, error):
                raise full from error
            raise Unreachable(f"JetStream did not store the message: {error}", where=subject) from error

    async def recorded(self, kind: type[E], after: int = 0) -> AsyncIterator[tuple[int, E]]:
        """Events of a kind that are stored now, oldest first, each with its sequence; only those after one.

        What is no such event is left out. Raises `Unreachable`.
        """
        async for sequence, _subject, data in self.stored(kind.type, after):
            if event := _event(kind, data):
                yield sequence, event

    async def stored(self, pattern: str, after: int = 0) -> AsyncIterator[tuple[int, str, bytes]]:
        """Messages that are stored now on the subjects of a pattern: sequence, subject and payload, oldest first.

        One by one, so that a reader that dies leaves nothing on the server. Raises `Unreachable`.
        """
        stream = subjects.stream_of(pattern)
        assert stream is not None, f"no stream stores {pattern}"
        try:
            last = (await self.js.stream_info(stream)).state.last_seq
            after = after if after <= last else 0  # it is another stream than the one that was read
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
        """The last stored event of a kind that is stored by keys, like a gateway's. Raises `Unreachable`."""
        subject = f"{kind.type}.{key}"
        stream = subjects.stream_of(subject)
        assert stream is not None, f"no stream stores {subject}"
        try:
            message = await self.js.get_msg(stream, subject=subject, direct=True)
        except NotFoundError:
            return None
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the stored events cannot be read: {error}", where=stream) from error
        return _event(kind, message.data)

    async def read_desired(self, key: str) -> tuple[bytes, int] | None:
        """A twin document and its revision by direct get; None when there is none."""
        try:
            bucket = f"KV_{subjects.DESIRED_BUCKET}"
            message = await self.js.get_msg(bucket, subject=subjects.desired(key), direct=True)
        except NotFoundError:
            return None
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the twin cannot be read: {error}", where=key) from error
        return bytes(message.data or b""), int(message.seq or 0)

    async def desired_keys(self, pattern: str) -> list[str]:
        """The keys of the twin that a subject pattern fits, sorted."""
        prefix = subjects.desired("")
        try:
            found = await self.js.stream_info(f"KV_{subjects.DESIRED_BUCKET}", subjects_filter=prefix + pattern)
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the twin cannot be listed: {error}", where=pattern) from error
        return sorted(subject.removeprefix(prefix) for subject in found.state.subjects or {})

    async def write_desired(self, key: str, data: bytes) -> int:
        """Write a twin document; returns its revision. Only the service that owns the plan may."""
        try:
            ack = await self.js.publish(
                subjects.desired(key),
                data,
                stream=f"KV_{subjects.DESIRED_BUCKET}",
                timeout=PUBLISH_TIMEOUT_S,
            )
        except (TimeoutError, NatsError) as error:
            raise Unreachable(f"the plan was not stored: {error}", where=key) from error
        return ack.seq


def _as_user(creds: Path) -> dict[str, Any]:
    """How to connect as the user of a credentials file. A user may listen on its own inbox only."""
    try:
        user = user_of(creds.read_text())
    except OSError as error:
        raise InvalidMessage(
            f"the credentials cannot be read: {error.strerror}", where=str(creds), fix="Set SLMOPS_NATS_CREDS."
        ) from error
    return {"user_credentials": str(creds), "inbox_prefix": subjects.inbox(user).encode()}


def _no_connection(error: Exception, url: str) -> Unreachable:
    reason = str(error) or type(error).__name__
    if "authorization" in reason.lower():
        fix = "Use credentials of this system: set SLMOPS_NATS_CREDS."
        return CredentialsRefused(f"NATS refuses the credentials: {reason}", where=url, fix=fix)
    fix = "Start it (slmops up) or set SLMOPS_NATS_URL and SLMOPS_NATS_CREDS."
    return Unreachable(f"NATS does not answer: {reason}", where=url, fix=fix)


async def _quiet(_error: Exception) -> None:
    """Connection errors surface where a call fails; the client's own callback would print each twice."""


def _event(kind: type[E], data: bytes | None) -> E | None:
    try:
        return kind.model_validate_json(data or b"")
    except ValidationError as error:
        log.warning("a message on %s is no such event: %s errors", kind.type, error.error_count())
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
            f"the {command.service} service answered with something else", where=command.subject
        ) from error

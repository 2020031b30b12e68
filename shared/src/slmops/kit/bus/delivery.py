"""The rules for messages whose handling fails. No failure is swallowed and no message is lost.

- permanent error, or a message that does not validate: the message is dead-lettered at once and rejected
- temporary error: the message is redelivered after the error's delay; on the last delivery it is dead-lettered and
  rejected
- the service's own database does not answer: the message is kept and tried again in place (`outage`)
- defect of slmops (any other exception): like a temporary error, with its traceback in the log
- crash of the process: JetStream redelivers when the acknowledgement is overdue. If this happens on every delivery, the
  message is dead-lettered and not handled again

A dead letter is stored under `dlq.<subject>` with the original payload and headers and the reason. If it cannot be
stored, the message stays in its stream. The letter of a confidential command has neither payload nor headers, because
even a malformed one may contain the secret.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from faststream import BaseMiddleware
from faststream.exceptions import HandlerException, NackMessage, RejectMessage
from nats.aio.msg import Msg
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from prometheus_client import Counter, Histogram
from pydantic import ValidationError

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.commands import COMMANDS
from slmops.contracts.errors import InternalError, InvalidMessage, PermanentError, Problem, SlmopsError, TemporaryError
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.deadletters import CODE_HEADER, CONSUMER_HEADER, REASON_HEADER, SIZE_HEADER, SUBJECT_HEADER
from slmops.kit.bus.exchange import HEADER_ROOM_BYTES
from slmops.kit.tracing import span

log = logging.getLogger("slmops.delivery")
MAX_DELIVER = 6  # enforced here: the server would drop a message whose dead letter could not be stored
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Delay before each redelivery of a message after a temporary error; after the last one it is dead-lettered."""
_HEADER_LIMIT_BYTES = 64 << 10  # JetStream's
_NOT_THE_SENDERS = ("nats-", "slmops-dead-")
"""Beginnings of the headers that only the bus and we set."""

MESSAGES = Counter("slmops_messages_total", "Messages handled, by outcome", ["service", "subject", "outcome"])
SECONDS = Histogram("slmops_message_seconds", "Time to handle a message", ["service", "subject"])


async def dead_letter(client: BusClient, message: Msg, consumer: str, error: BaseException) -> None:
    """Stores a message that `consumer` gave up on, once per message and consumer."""
    problem = Problem.of(error)
    kind = COMMANDS.get(subjects.template(message.subject))
    secret = kind is not None and kind.confidential
    # The bus obeys headers that begin with `nats-`, so those of a sender could make it refuse the letter for ever.
    original = {
        str(k): str(v) for k, v in (message.headers or {}).items() if not str(k).lower().startswith(_NOT_THE_SENDERS)
    }
    ours = {
        MESSAGE_ID_HEADER: f"{consumer}:{_origin(message)}",
        REASON_HEADER: " ".join(problem.what.split())[:500],
        CODE_HEADER: problem.code,
        CONSUMER_HEADER: consumer,
        SUBJECT_HEADER: message.subject,
    }
    payload, headers = bytes(message.data), original | ours
    limit, header_bytes = client.connection.max_payload - HEADER_ROOM_BYTES, _wire_bytes(headers)
    if secret:
        payload, headers = b"", ours | {SIZE_HEADER: str(len(payload))}
    elif (
        header_bytes > _HEADER_LIMIT_BYTES or len(payload) + header_bytes > limit
    ):  # the server would close the connection
        payload, headers = payload[: limit // 2], ours | {SIZE_HEADER: str(len(payload))}
    await client.store(subjects.dead_letter(message.subject, confidential=secret), payload, headers)
    log.error("dead-lettered %s for %s: %s", subjects.template(message.subject), consumer, problem.what)


def _wire_bytes(headers: Mapping[str, str]) -> int:
    """Returns the headers' size towards the server's limit, with room for the headers that the client adds."""
    return 256 + sum(len(f"{key}: {value}\r\n".encode()) for key, value in headers.items())


def _origin(message: Msg) -> str:
    """Returns an id of the message. A core message has no sequence, so each delivery gets a new id."""
    try:
        metadata = message.metadata
        return f"{metadata.stream}:{metadata.sequence.stream}"
    except Exception:  # nats-py raises NotJSMessageError, or ValueError on an invalid reply subject
        return str(uuid.uuid4())


def classify(error: Exception, delivered: int, max_deliver: int | None = None) -> TemporaryError | None:
    """Returns the error to retry after, or None if the message must be dead-lettered. `delivered` counts from 1."""
    if isinstance(error, (PermanentError, ValidationError)) or delivered >= (max_deliver or MAX_DELIVER):
        return None
    if isinstance(error, TemporaryError):
        return error
    log.exception("handler failed", exc_info=error)
    return TemporaryError(f"unexpected {type(error).__name__}")


class Delivery:
    """The middleware of one service's broker: spans and metrics by subject template, and the rules above."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.client: BusClient | None = None
        self.stopping = asyncio.Event()
        self.max_deliver: dict[str, int] = {}
        """By durable consumer, if not `MAX_DELIVER`."""

    def __call__(self, msg: Any, /, *, context: Any) -> BaseMiddleware[Any, Any]:
        return _Middleware(msg, context=context, delivery=self)

    async def fail(self, message: Msg, consumer: str, error: Exception) -> HandlerException:
        """Returns the FastStream exception that tells JetStream what to do with a failed message."""
        delivered = message.metadata.num_delivered or 1
        retry = classify(error, delivered, self.limit(message))
        if retry is not None:
            delay = max(retry.delay.total_seconds(), BACKOFF_S[min(delivered, len(BACKOFF_S)) - 1])
            return NackMessage(delay=delay)
        if self.client is None:
            return NackMessage(delay=BACKOFF_S[0])
        try:
            await dead_letter(self.client, message, consumer, error)
        except SlmopsError as problem:  # the letter is not stored: keep the message
            log.warning("could not dead-letter a message on %s: %s", subjects.template(message.subject), problem)
            return NackMessage(delay=BACKOFF_S[-1])
        return RejectMessage()

    @contextmanager
    def measured(self, message: Msg) -> Iterator[Span]:
        """Makes a span and counts the outcome of the block, both by subject template."""
        subject = subjects.template(message.subject)
        with (
            SECONDS.labels(self.service, subject).time(),
            span(f"process {subject}", parent=_parent(message.headers), kind=SpanKind.CONSUMER) as current,
        ):
            try:
                yield current
            except HandlerException:
                raise
            except Exception as error:
                current.set_status(Status(StatusCode.ERROR, Problem.of(error).code))
                MESSAGES.labels(self.service, subject, "failed").inc()
                raise
            MESSAGES.labels(self.service, subject, "done").inc()

    def given_up(self, subject: str) -> None:
        """Counts a command that was stopped, or never started, because its requester no longer waits."""
        log.warning("stopped %s: its requester no longer waits", subject)
        MESSAGES.labels(self.service, subject, "given_up").inc()

    def limit(self, message: Msg) -> int:
        return self.max_deliver.get(message.metadata.consumer, MAX_DELIVER)


class _Middleware(BaseMiddleware[Any, Any]):
    def __init__(self, msg: Any, /, *, context: Any, delivery: Delivery) -> None:
        super().__init__(msg, context=context)
        self.delivery = delivery

    async def consume_scope(self, call_next: Any, msg: Any) -> Any:
        raw: Msg = msg.raw_message
        if isinstance(raw, list):
            return await call_next(msg)  # `Batches` applies the rules to each message
        if subjects.stream_of(raw.subject) is None:
            return await call_next(msg)  # a command: `Bus` measures it where it is carried out
        try:
            with self.delivery.measured(raw):
                check_deliveries(raw, self.delivery.limit(raw))
                return await call_next(msg)
        except (HandlerException, asyncio.CancelledError):
            raise
        except Exception as error:
            consumer = f"{self.delivery.service}/{subjects.template(raw.subject)}"
            raise await self.delivery.fail(raw, consumer, error) from error


def check_deliveries(message: Msg, max_deliver: int) -> None:
    """Raises `InternalError` for a message whose handling was interrupted on every allowed delivery."""
    delivered = message.metadata.num_delivered or 1
    if delivered > max_deliver:
        raise InternalError(f"the message was delivered {delivered} times, and its process died every time")


def _parent(headers: Mapping[str, Any] | None) -> str | None:
    return next((str(v) for k, v in (headers or {}).items() if str(k).lower() == "traceparent"), None)


def not_json(error: Exception, *, confidential: bool = False) -> InvalidMessage:
    return InvalidMessage(f"the payload does not validate: {_summary(error, confidential)}")


def _summary(error: Exception, confidential: bool) -> str:
    """Returns the names of invalid fields, without their values, which may be private.

    The name of a nested field may be a key that the sender chose, so a confidential payload's nested names are left
    out, too.
    """
    if not isinstance(error, ValidationError):
        return type(error).__name__
    depth = 1 if confidential else None
    return "; ".join(f"{'.'.join(map(str, e['loc'][:depth])) or 'payload'}: {e['msg']}" for e in error.errors()[:5])

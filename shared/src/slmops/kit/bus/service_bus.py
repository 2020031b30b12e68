"""The bus of a service: handlers for events and commands on FastStream.

It has two connections: one consumes events and publishes, the other answers commands. A request names the subject of
its answer, so the connection that answers must not have the service's publish permissions (`contracts.permissions`).

bus = Bus("registry", settings)
bus.on(VariantOptimized, handlers.variant_optimized)      # durable, acknowledged after the work
bus.serve(RegisterVersion, handlers.register_version)     # request/reply, typed errors
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.nats.annotations import NatsMessage
from faststream.nats.security import NatsCredentials, NatsSecurity
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from pydantic import BaseModel, ValidationError

from slmops.contracts import subjects
from slmops.contracts.clocks import SENT_AT_HEADER, TIME_HEADER, time_in
from slmops.contracts.cloudevent import Envelope
from slmops.contracts.commands import Command
from slmops.contracts.errors import Denied, InvalidMessage, NotReady, PermanentError, Problem, SlmopsError, Throttled
from slmops.contracts.events import Event
from slmops.contracts.identity import sender_of, service
from slmops.contracts.permissions import answering_user, authorize, may_be_answered
from slmops.kit.acting import acting
from slmops.kit.bus.batches import Batches, Received, Refused
from slmops.kit.bus.client import PROBLEM_HEADER, BusClient
from slmops.kit.bus.command_pool import AT_ONCE, CommandPool
from slmops.kit.bus.delivery import Delivery, dead_letter, not_json
from slmops.kit.bus.dialing import Handshakes, encryption
from slmops.kit.bus.exchange import PARTS_HEADER, parts_of, patience
from slmops.kit.bus.faststream_workarounds import describe, patient_pulls
from slmops.kit.bus.gaps import Durable
from slmops.kit.bus.outage import outlast
from slmops.kit.bus.provision import ACK_WAIT_S, consumer
from slmops.kit.bus.stream_watch import look_for_gaps
from slmops.kit.bus.throttle import THROTTLED, Throttle, source_of
from slmops.kit.clock import utc_now
from slmops.kit.settings import BusSettings

log = logging.getLogger("slmops.bus")
E = TypeVar("E", bound=Event)
M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound=BaseModel)
Keepalive = Callable[[], Awaitable[None]]
_PULL_TIMEOUT_S = 5.0
_BATCH, _BATCH_WITHIN_S = 256, 0.1
_BATCHES_AT_ONCE = 16  # of all processes of a service together; each has one
_STOP_GRACE = timedelta(seconds=2)
"""How long running commands may take when the service stops."""
_JSON = {"content-type": "application/json"}
# The message that a task is handling. It is not a parameter, because FastStream would resolve it in a thread each time.
_current: ContextVar[NatsMessage] = ContextVar("current message")


@dataclass(frozen=True)
class MessageContext:
    """The attributes of a message, and a function that sends in-progress acknowledgements for it."""

    id: str
    subject: str
    traceparent: str | None
    keepalive: Keepalive
    attempt: int = 1
    """The number of deliveries, including this one."""
    arrived_at: datetime = field(default_factory=utc_now)
    """When the server stored the message: the services' time, whatever the clock of the sender."""
    sent_at: datetime | None = None
    """When the sender published it by its own clock; None if the sender does not say so."""

    @property
    def clock_ahead(self) -> timedelta | None:
        """How far the sender's clock is ahead of ours; negative if it is behind, None if unknown."""
        return None if self.sent_at is None else self.sent_at - self.arrived_at

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Sends in-progress acknowledgements while the block runs, so that JetStream does not redeliver the message."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(ACK_WAIT_S / 3)
                # Continue if one is lost in a reconnection: in the worst case the message is delivered twice.
                with contextlib.suppress(NatsError):
                    await self.keepalive()

        beating = asyncio.create_task(beat())
        try:
            yield
        finally:
            beating.cancel()


Batch = Sequence[Received[M, MessageContext]]


@dataclass(frozen=True)
class _Consumer:
    stream: str
    durable: str
    subject: str
    ack_wait_s: float
    max_ack_pending: int = 64


class Bus:
    """Handlers are declared before `start`; `client` publishes and sends requests after it."""

    def __init__(self, service: str, settings: BusSettings) -> None:
        self.service = service
        self.settings = settings
        self._delivery = Delivery(service)
        self._consumers: list[_Consumer] = []
        self._pools: list[CommandPool] = []
        self._client: BusClient | None = None
        self._stopping = False
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the connection is closed and reconnecting is impossible (a credential was rejected)."""
        self._handshakes = Handshakes(settings)
        self.broker = self._broker(service, settings.nats_creds, subjects.inbox(service))
        self.answering = self._broker(answering_user(service), settings.answering_creds)

    def _broker(self, user: str, creds: Path | None, inbox: str = subjects.INBOX) -> NatsBroker:
        return NatsBroker(
            self.settings.nats_url.split(","),
            name=user,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            middlewares=[self._delivery],
            apply_types=False,  # our decoders validate
            closed_cb=self._closed,
            reconnected_cb=self._reconnected,
            error_cb=self._reported,
            logger=None,
            security=_security(self.settings, creds),
            inbox_prefix=inbox.encode(),
        )

    @property
    def client(self) -> BusClient:
        assert self._client is not None, "the bus is started by the service's app"
        return self._client

    @property
    def durables(self) -> list[Durable]:
        return [Durable(spec.stream, spec.durable) for spec in self._consumers]

    def on(self, kind: type[E], handler: Callable[[E, MessageContext], Awaitable[None]]) -> None:
        """Consumes all events of a kind durably, at least once. `handler` must be idempotent by `MessageContext.id`."""
        self.consume(re.sub(r"{.*?}", "*", kind.subject_template()), kind, handler)

    def consume(
        self,
        subject: str,
        kind: type[M],
        handler: Callable[[M, MessageContext], Awaitable[None]],
        ack_wait_s: float = ACK_WAIT_S,
        max_deliver: int | None = None,
    ) -> None:
        """Consumes stored messages, which need not be events. `max_deliver` None means `MAX_DELIVER`."""
        stream = subjects.stream_of(subject)
        assert stream is not None, f"no stream stores {subject}"
        durable = subjects.durable_name(self.service, subject)
        self._consumers.append(_Consumer(stream, durable, subject, ack_wait_s))
        if max_deliver is not None:
            self._delivery.max_deliver[durable] = max_deliver

        async def decode(message: NatsMessage) -> M:
            _current.set(message)
            try:
                return kind.model_validate_json(message.body)
            except (ValidationError, ValueError) as error:
                raise not_json(error) from error

        async def handle(message: M) -> None:
            raw = _current.get().raw_message
            context = _context(kind, raw, message)
            await outlast(lambda: handler(message, context), [raw], self._delivery.stopping)

        describe(handle, getattr(handler, "__name__", "handle"), message=kind)
        self.broker.subscriber(
            subject,
            stream=JStream(stream, declare=False),
            durable=durable,
            pull_sub=PullSub(batch_size=1, timeout=_PULL_TIMEOUT_S),
            inbox_prefix=f"{subjects.inbox(self.service)}.".encode(),  # FastStream does not use the connection's prefix
            ack_policy=AckPolicy.REJECT_ON_ERROR,
            decoder=decode,
            title=f"{subject}:{self.service}",
        )(handle)

    def on_batches(self, kind: type[E], handler: Callable[[Batch[E]], Awaitable[Refused]]) -> None:
        """Consumes all events of a kind durably in batches, as `consume_batches` does."""
        self.consume_batches(f"{kind.type}.*" if kind.per_gateway else kind.type, kind, handler)

    def consume_batches(
        self, subject: str, kind: type[M], handler: Callable[[Batch[M]], Awaitable[Refused]], *, with_ids: bool = True
    ) -> None:
        """Consumes frequent small messages, up to 256 with one call of `handler`, which waits at most 0.1 s for more.

        `handler` must be idempotent by `MessageContext.id`, and do all of its batch or raise: see `batches`. Without
        `with_ids` the senders give their messages no ids, and the id is that of the stored message.
        """
        stream = subjects.stream_of(subject)
        assert stream is not None, f"no stream stores {subject}"
        durable = subjects.durable_name(self.service, subject)
        self._consumers.append(_Consumer(stream, durable, subject, ACK_WAIT_S, _BATCHES_AT_ONCE * _BATCH))
        batches = Batches(subject, kind, handler, partial(_context, kind, with_ids=with_ids), self._delivery)

        async def decode(message: Any) -> Any:
            return message.raw_message

        async def handle(message: Any) -> None:
            await batches.consume(message)

        describe(handle, getattr(handler, "__name__", "handle"), message=kind)
        self.broker.subscriber(
            subject,
            stream=JStream(stream, declare=False),
            durable=durable,
            pull_sub=PullSub(batch_size=_BATCH, timeout=_BATCH_WITHIN_S, batch=True),
            inbox_prefix=f"{subjects.inbox(self.service)}.".encode(),
            ack_policy=AckPolicy.MANUAL,
            decoder=decode,
            title=f"{subject}:{self.service}",
        )(handle)

    def serve(
        self,
        kind: type[Command[R]],
        handler: Callable[[Any], Awaitable[R]],
        throttle: Throttle | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        """Answers a command. Several processes of a service share the work; an error is returned as a `Problem`.

        `at_once` commands run side by side, and `handler` must allow that. It is cancelled when nobody waits for its
        answer any more. A request is dead-lettered and not carried out if its reply subject is not an inbox of its
        sender, and refused if its sender may not send it. Events that `handler` records name the sender. `throttle`
        limits the rejected requests of each source; a request beyond the limit is not looked at.
        """
        template = kind.subject_template()
        pool = CommandPool(at_once)
        self._pools.append(pool)

        async def decode(message: NatsMessage) -> Any:
            _current.set(message)
            return message.body  # validated below, where an error can still be returned

        async def handle(message: bytes) -> None:
            raw = _current.get()
            wait = patience(_headers(raw.raw_message))
            if not pool.full:
                work = partial(self._carry_out, kind, handler, message, raw, throttle)
                pool.start(work, wait, partial(self._delivery.given_up, template))
            elif may_be_answered(raw.raw_message.subject, raw.raw_message.reply):
                busy = NotReady("too many requests are waiting", where=template, delay=timedelta(seconds=5))
                await self._answer(raw, template, Problem.of(busy))

        describe(handle, kind.name, message=bytes)
        self.answering.subscriber(
            kind.pattern(),
            queue=self.service,
            decoder=decode,
            no_reply=True,
            title=f"{template}:{self.service}",
            description=kind.__doc__,
        )(handle)

    async def _carry_out(
        self,
        kind: type[Command[R]],
        handler: Callable[[Any], Awaitable[R]],
        payload: bytes,
        raw: NatsMessage,
        throttle: Throttle | None,
    ) -> None:
        template, message = kind.subject_template(), raw.raw_message
        answerable = may_be_answered(message.subject, message.reply)
        source = source_of(message.headers)
        if throttle is not None and not throttle.take(source):
            await self._throttled(kind, raw, answerable)
            return
        rejected = True
        try:
            with suppress(Denied), self._delivery.measured(message):
                if not answerable:
                    refused = Denied("the reply subject is not the inbox of the command's sender", where=template)
                    await dead_letter(self.client, message, f"{self.service}/{template}", refused)
                    raise refused
                rejected = await self._answered(kind, handler, payload, raw)
        except asyncio.CancelledError:
            rejected = False
            raise
        finally:
            if throttle is not None:
                throttle.settle(source, rejected=rejected)

    async def _answered(
        self, kind: type[Command[R]], handler: Callable[[Any], Awaitable[R]], payload: bytes, raw: NatsMessage
    ) -> bool:
        """Carries out a command and sends its answer. Returns whether it was rejected."""
        template, sender = kind.subject_template(), sender_of(raw.raw_message.subject)
        try:
            authorize(kind, sender)
            command = _command(kind, payload, raw)
            with acting(sender):
                answer = await handler(command)
            await self._answer(raw, template, answer)
        except Exception as error:
            await self._answer(raw, template, await self._refuse(template, raw, error))
            return isinstance(error, PermanentError)
        return False

    async def _throttled(self, kind: type[Command[Any]], raw: NatsMessage, answerable: bool) -> None:
        THROTTLED.labels(self.service, kind.name).inc()
        if answerable:
            error = Throttled(
                "too many requests from this address were rejected", where=kind.subject_template(), fix="Wait a minute."
            )
            await self._answer(raw, kind.subject_template(), Problem.of(error))

    async def _answer(self, raw: NatsMessage, template: str, answer: BaseModel) -> None:
        """Sends an answer in as many messages as it needs. Raises `MessageTooLarge` if the requester accepts fewer."""
        headers = _JSON | {TIME_HEADER: utc_now().isoformat()}
        if isinstance(answer, Problem):
            headers[PROBLEM_HEADER] = answer.code
        accepted = _headers(raw.raw_message).get(PARTS_HEADER, "")
        limit = self.client.connection.max_payload
        payload = answer.model_dump_json(by_alias=True).encode()
        parts = parts_of(payload, limit, int(accepted) if accepted.isdecimal() else 1, template)
        for part in parts:
            await self.answering.publish(part, raw.raw_message.reply, headers=headers | {PARTS_HEADER: str(len(parts))})

    async def _refuse(self, template: str, raw: NatsMessage, error: Exception) -> Problem:
        if isinstance(error, InvalidMessage):
            await dead_letter(self.client, raw.raw_message, f"{self.service}/{template}", error)
        elif not isinstance(error, SlmopsError):
            log.exception("%s failed", template, exc_info=error)
        return Problem.of(error)

    async def start(self) -> None:
        """Connects and starts to consume. Raises `Unreachable`, `NotReady` before the streams were provisioned."""
        probe = await BusClient.connect(self.settings, name=self.service, patient=False)
        await probe.close()
        self._client = self._delivery.client = BusClient(await self.broker.connect(), sender=service(self.service))
        for spec in self._consumers:
            await consumer(
                self.client.js, spec.stream, spec.durable, spec.subject, spec.ack_wait_s, spec.max_ack_pending
            )
        await look_for_gaps(self.client, self.durables)
        await self.broker.start()
        patient_pulls(self.broker)
        if self.answering.subscribers:
            await self._start_answering()

    async def _start_answering(self) -> None:
        creds = self.settings.answering_creds
        probe = await BusClient.connect(
            self.settings.model_copy(update={"nats_creds": creds}), name=answering_user(self.service), patient=False
        )
        await probe.close()
        connection = await self.answering.connect()
        await self.answering.start()
        # Clients may send requests as soon as the service has started, so the server must know our subscriptions. Flush
        # twice, because nats-py's first PING overtakes buffered commands.
        await connection.flush()
        await connection.flush()

    async def ping(self, timeout_s: float) -> bool:
        """Returns whether the server answers on every connection."""
        brokers = (self.broker, self.answering) if self.answering.subscribers else (self.broker,)
        return all(await asyncio.gather(*(broker.ping(timeout_s) for broker in brokers)))

    async def begin_stop(self) -> None:
        """Stops accepting commands and finishes those that run. From now on a closed connection is expected."""
        self._stopping = True
        self._delivery.stopping.set()
        for subscriber in self.answering.subscribers:
            await subscriber.stop()
        await asyncio.gather(*(pool.stop(_STOP_GRACE) for pool in self._pools))
        await self.answering.stop()

    async def stop(self) -> None:
        await self.begin_stop()
        await self.broker.stop()

    async def _closed(self) -> None:
        if not self._stopping:
            self.on_lost()

    async def _reconnected(self) -> None:
        self._handshakes.succeeded()

    async def _reported(self, error: Exception) -> None:
        """Logs failed handshakes and permission errors, which surface nowhere else: a denied subscription just never
        delivers."""
        await self._handshakes.note(error)
        if "permissions violation" in str(error).lower():
            log.error("%s", error)


def _security(settings: BusSettings, creds: Path | None) -> NatsSecurity | None:
    options = encryption(settings)
    context, first = options.get("tls"), bool(options)
    if creds is not None:
        return NatsCredentials(str(creds), ssl_context=context, tls_handshake_first=first)
    return NatsSecurity(ssl_context=context, tls_handshake_first=first) if options else None


def _headers(message: Msg) -> dict[str, str]:
    return {str(key).lower(): str(value) for key, value in (message.headers or {}).items()}


def _context(kind: type[BaseModel], message: Msg, body: BaseModel, *, with_ids: bool = True) -> MessageContext:
    """Returns the context of a stored message. Raises `InvalidMessage`, and `PermanentError` for another's subject."""
    if isinstance(body, Event) and body.subject != message.subject:
        # Permissions restrict a gateway to its own subject; the body must not name another gateway.
        raise PermanentError(f"the event of {body.key} is on another gateway's subject", where=message.subject)
    if isinstance(body, Event):
        body.check_received()
    headers = _headers(message)
    if issubclass(kind, Event):
        envelope = Envelope.from_headers(message.headers)
        if envelope.type != kind.type:
            raise InvalidMessage(f"a {envelope.type} was published on the subject of {kind.type}")
        identity, parent = envelope.id, envelope.traceparent
    else:
        identity = headers.get("nats-msg-id", "") if with_ids else _stored_id(message)
        parent = headers.get("traceparent")
    if not identity:
        raise InvalidMessage("the message has no id")
    return MessageContext(
        identity,
        message.subject,
        parent,
        message.in_progress,
        message.metadata.num_delivered or 1,
        message.metadata.timestamp,
        time_in(headers.get(SENT_AT_HEADER)),
    )


def _stored_id(message: Msg) -> str:
    return f"{message.metadata.stream}:{message.metadata.sequence.stream}"


def _command(kind: type[Command[Any]], payload: bytes, raw: NatsMessage) -> Command[Any]:
    try:
        command = kind.model_validate_json(payload)
    except (ValidationError, ValueError) as error:
        raise not_json(error, confidential=kind.confidential) from error
    sender = sender_of(raw.raw_message.subject)
    if sender is not None and command.sent_by(sender) != raw.raw_message.subject:
        # Permissions restrict a gateway to its own subject; the body must not name another gateway.
        raise PermanentError("the command names another gateway than its subject", where=raw.raw_message.subject)
    return command

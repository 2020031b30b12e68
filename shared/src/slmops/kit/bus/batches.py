"""Consumes many small messages of a kind in batches: one call of the handler, and so one transaction, for each batch.

The rules for messages that fail are those of `delivery`, message by message: one that is invalid, or that the handler
refuses, is dead-lettered or redelivered alone. If the handler raises a temporary error, the whole batch is redelivered
later. After any other error the batch is halved until the message that causes it is alone, so one bad message among n
costs O(log n) more calls. Messages are acknowledged after the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from faststream.exceptions import HandlerException, NackMessage
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from opentelemetry.trace import SpanKind
from pydantic import BaseModel, ValidationError

from slmops.contracts import subjects
from slmops.contracts.errors import TemporaryError
from slmops.kit.bus.delivery import MESSAGES, SECONDS, Delivery, check_deliveries, not_json
from slmops.kit.bus.outage import outlast
from slmops.kit.tracing import span

M = TypeVar("M", bound=BaseModel)
C = TypeVar("C")


class Received(NamedTuple, Generic[M, C]):
    """A valid message with its context (`service_bus.MessageContext`)."""

    body: M
    context: C


Refused = Mapping[int, Exception]
"""Errors by the index of the message that the handler did not accept. It has handled all others."""
Handler = Callable[[Sequence[Received[M, C]]], Awaitable[Refused]]
Context = Callable[[Msg, M], C]


class Batches(Generic[M, C]):
    """One subject's consumer. `context` makes a message's context and raises the error of an invalid one."""

    def __init__(
        self, subject: str, kind: type[M], handler: Handler[M, C], context: Context[M, C], delivery: Delivery
    ) -> None:
        self._template = subjects.template(subject)
        self._kind = kind
        self._handler = handler
        self._context = context
        self._delivery = delivery

    async def consume(self, messages: Sequence[Msg]) -> None:
        """Handles and acknowledges messages. Each message that fails gets its own answer; nothing is raised."""
        service = self._delivery.service
        with (
            SECONDS.labels(service, self._template).time(),
            span(f"process batch {self._template}", kind=SpanKind.CONSUMER, messages=len(messages)),
        ):
            valid, failed = self._parsed(messages)
            await self._handle(valid, failed)
            await self._settle(messages, failed)
        MESSAGES.labels(service, self._template, "done").inc(len(messages) - len(failed))
        MESSAGES.labels(service, self._template, "failed").inc(len(failed))

    def _parsed(self, messages: Sequence[Msg]) -> tuple[list[tuple[Msg, Received[M, C]]], dict[int, Exception]]:
        valid: list[tuple[Msg, Received[M, C]]] = []
        failed: dict[int, Exception] = {}
        for message in messages:
            try:
                check_deliveries(message, self._delivery.limit(message))
                body = self._body(message)
                valid.append((message, Received(body, self._context(message, body))))
            except Exception as error:
                failed[id(message)] = error
        return valid, failed

    def _body(self, message: Msg) -> M:
        try:
            return self._kind.model_validate_json(message.data)
        except (ValidationError, ValueError) as error:
            raise not_json(error) from error

    async def _handle(self, batch: Sequence[tuple[Msg, Received[M, C]]], failed: dict[int, Exception]) -> None:
        if not batch:
            return
        try:
            received = [one for _, one in batch]
            messages, stopping = [message for message, _ in batch], self._delivery.stopping
            refused = await outlast(lambda: self._handler(received), messages, stopping)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, TemporaryError):
                failed.update((id(message), error) for message, _ in batch)
                return
            middle = len(batch) // 2
            await self._handle(batch[:middle], failed)
            await self._handle(batch[middle:], failed)
            return
        failed.update((id(batch[index][0]), error) for index, error in refused.items())

    async def _settle(self, messages: Sequence[Msg], failed: Mapping[int, Exception]) -> None:
        """Acknowledges the messages, and rejects or delays those that failed.

        An acknowledgement is a publish that waits for no answer. If it is lost, the server delivers the message again.
        """
        with suppress(NatsError):
            for message in messages:
                if id(message) not in failed:
                    await message.ack()
        bad = [message for message in messages if id(message) in failed]
        await asyncio.gather(*(self._refuse(message, failed[id(message)]) for message in bad))

    async def _refuse(self, message: Msg, error: Exception) -> None:
        with suppress(NatsError):
            consumer = f"{self._delivery.service}/{self._template}"
            answer: HandlerException = await self._delivery.fail(message, consumer, error)
            if isinstance(answer, NackMessage):
                await message.nak(**answer.extra_options)
            else:
                await message.term()

"""Workarounds for FastStream 0.7, in one module so that they can be removed when FastStream changes.

- `describe`: FastStream validates a message, and documents its channel, by the annotations and the name of the handler.
  Our handler is a closure whose message type is a parameter, so this function sets both.
- `patient_pulls`: nats-py's `fetch` raises `asyncio.TimeoutError` instead of its own error if the time is over between
  its two requests. FastStream does not catch it: the task that collects a batch ends, and another one begins without
  the collected messages. After several deliveries they would be dead-lettered, although nothing is wrong with them.
- `patient_pulls`: a pull subscriber of FastStream fetches from a closed connection in an endless loop without a
  pause, and blocks the event loop. It has no option for a pause. For both we wrap the `fetch` of its subscription.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from faststream.nats import NatsBroker
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError
from nats.errors import TimeoutError as NatsTimeout
from nats.js import JetStreamContext

Fetch = Callable[..., Coroutine[Any, Any, list[Msg]]]
_PAUSE_S = 1.0


def describe(handle: Callable[..., Any], name: str, *, message: Any) -> None:
    """Sets the name of a handler and the type of its only parameter, `message`."""
    handle.__annotations__ |= {"message": message, "return": None}
    handle.__name__ = name


def patient_pulls(broker: NatsBroker) -> None:
    """Makes every pull subscriber of a started broker keep what it collected when the time is over, and wait a second
    after it finds the connection closed."""
    for subscriber in broker.subscribers:
        pull = getattr(subscriber, "subscription", None)
        if isinstance(pull, JetStreamContext.PullSubscription):
            pull.fetch = _patient(pull.fetch)  # type: ignore[method-assign]


def _patient(fetch: Fetch) -> Fetch:
    async def patient(*args: Any, **kwargs: Any) -> list[Msg]:
        try:
            return await fetch(*args, **kwargs)
        except ConnectionClosedError:
            await asyncio.sleep(_PAUSE_S)
            raise
        except NatsTimeout:
            raise
        except TimeoutError as error:
            raise NatsTimeout from error

    return patient

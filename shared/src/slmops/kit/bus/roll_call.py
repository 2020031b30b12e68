"""The roll call: which processes of which services run, and with which code. It needs no HTTP port and stores nothing.

The operator publishes on `services.call`, and each process answers on the subject of its service. It ignores the reply
subject: a user that publishes must not publish where a request names (`slmops.contracts.permissions`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import timedelta

from nats.aio.msg import Msg
from pydantic import ValidationError

from slmops.contracts.identity import ServiceProcess
from slmops.contracts.subjects import ROLL_CALL, roll_call_answer
from slmops.kit.bus.client import BusClient

_WITHIN = timedelta(seconds=1.5)
_QUIET_S = 0.2  # a service may have several processes


async def answer_roll_calls(client: BusClient, process: ServiceProcess) -> None:
    """Answers every roll call from now on, also after a reconnection."""
    answer = process.model_dump_json().encode()

    async def tell(_: Msg) -> None:
        await client.connection.publish(roll_call_answer(process.service), answer)

    await client.connection.subscribe(ROLL_CALL, cb=tell)
    await client.connection.flush()


async def call_roll(
    client: BusClient, expected: Collection[str], within: timedelta = _WITHIN
) -> tuple[ServiceProcess, ...]:
    """Returns the processes that answer, sorted by service and host.

    It waits until each of the services `expected` has answered and no further answer arrives, at most `within`. So the
    list may lack a process that is slow.
    """
    answers: asyncio.Queue[ServiceProcess] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        try:
            answers.put_nowait(ServiceProcess.model_validate_json(message.data))
        except ValidationError:
            return  # of another release, which describes itself in another way

    listening = await client.connection.subscribe(roll_call_answer("*"), cb=hear)
    found: list[ServiceProcess] = []
    try:
        await client.connection.publish(ROLL_CALL, b"")
        async with asyncio.timeout(within.total_seconds()):
            while not set(expected) <= {process.service for process in found}:
                found.append(await answers.get())
            while True:
                found.append(await asyncio.wait_for(answers.get(), _QUIET_S))
    except TimeoutError:
        pass
    finally:
        await listening.unsubscribe()
    return tuple(sorted(found, key=lambda process: (process.service, process.host, process.pid)))

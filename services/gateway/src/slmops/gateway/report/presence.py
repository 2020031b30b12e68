"""Tells the services from time to time that this gateway is connected, when there is nothing to report.

A presence message is small, is never spooled and waits for no acknowledgement: if one is lost, the next one follows.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from slmops.contracts.clocks import SENT_AT_HEADER
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.subjects import presence
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import Clock

_FIRST = 0.1
"""The first message of a connection is sent within this share of the interval, at a random time, because a whole fleet
connects again at the same moment after the server was restarted."""


class Presence:
    """`content` returns what the next message says. `every` is the longest time between two messages."""

    def __init__(
        self,
        gateway_id: str,
        content: Callable[[], GatewayPresence],
        every: timedelta,
        clock: Clock,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._subject = presence(gateway_id)
        self._content = content
        self._every_s = every.total_seconds()
        self._clock = clock
        self._uniform = uniform

    async def send(self, client: BusClient) -> None:
        """Sends messages at random times, half to all of the interval apart. Runs until cancelled."""
        reconnected = asyncio.Event()
        client.on_reconnect(reconnected.set)
        pause_s = self._uniform(0, _FIRST * self._every_s)
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(reconnected.wait(), pause_s)
            if reconnected.is_set():
                reconnected.clear()
                pause_s = self._uniform(0, _FIRST * self._every_s)
                continue
            await self._tell(client)
            pause_s = self._uniform(0.5 * self._every_s, self._every_s)

    async def _tell(self, client: BusClient) -> None:
        payload = self._content().model_dump_json().encode()
        await client.tell(self._subject, payload, {SENT_AT_HEADER: self._clock().isoformat(timespec="milliseconds")})

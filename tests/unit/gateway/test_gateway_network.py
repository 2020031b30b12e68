"""A gateway connects again when its connection is closed for good; it stayed offline until it was restarted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from slmops.gateway import app
from slmops.gateway.app import Gateway
from slmops.kit.bus.client import BusClient


class Working:
    """Works with a connection until it is cancelled."""

    def __init__(self) -> None:
        self.clients: list[BusClient] = []
        self.stopped = 0

    async def watch(self, client: BusClient) -> None:
        self.clients.append(client)
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped += 1

    send = watch


class Connection:
    def __init__(self) -> None:
        self.closed = asyncio.Event()


async def test_it_connects_again_after_its_connection_was_closed_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, reporter, clocks = Working(), Working(), Working()
    nothing: Any = None
    parts: Any = (twin, nothing, reporter, clocks)
    gateway = Gateway(nothing, nothing, *parts)
    connections = [Connection(), Connection()]
    asked: Any = iter(connections)

    async def enrolled() -> Any: ...

    async def connected(_credentials: Any) -> Any:
        return next(asked)

    monkeypatch.setattr(gateway, "_enrolled", enrolled)
    monkeypatch.setattr(gateway, "_connected", connected)
    monkeypatch.setattr(app, "_CONNECT_AGAIN_S", 0)
    network = asyncio.create_task(gateway._network())
    async with asyncio.timeout(10):
        while not clocks.clients:  # noqa: ASYNC110 (the task fills it)
            await asyncio.sleep(0)
        connections[0].closed.set()
        while len(clocks.clients) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for part in (twin, reporter, clocks):
        assert (part.clients, part.stopped) == (connections, 1)
    assert gateway.client is connections[1]
    network.cancel()
    await asyncio.gather(network, return_exceptions=True)

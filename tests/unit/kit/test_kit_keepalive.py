"""Long work sends in-progress acknowledgements while it lasts, also over an unreliable connection."""

from __future__ import annotations

import asyncio

import pytest
from nats.errors import ConnectionReconnectingError

from slmops.kit.bus import service_bus as bus
from slmops.kit.bus.service_bus import MessageContext


async def beats(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> tuple[int, int]:
    """Returns the number of acknowledgements during the work and after it."""
    monkeypatch.setattr(bus, "ACK_WAIT_S", 0.03)
    heard: list[int] = []

    async def beat() -> None:
        heard.append(1)
        if error:
            raise error

    async with MessageContext("id", "subject", None, beat).kept_alive():
        async with asyncio.timeout(5):
            while len(heard) < 3:  # noqa: ASYNC110 - an event would need the code under test to set it
                await asyncio.sleep(0.005)
    during = len(heard)
    await asyncio.sleep(0.05)
    return during, len(heard)


async def test_acknowledgements_are_sent_only_while_the_work_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    during, after = await beats(monkeypatch, None)
    assert (during >= 3, after) == (True, during)


async def test_a_failed_acknowledgement_does_not_stop_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    during, _ = await beats(monkeypatch, ConnectionReconnectingError())
    assert during >= 3

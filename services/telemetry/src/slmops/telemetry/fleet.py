"""Reads the current state from the bus: a gateway's enrolment and labels, a blueprint's plan, and all rollouts.

Our own tables follow events. A batch may be ahead of them: its gateway reads the plan as soon as it is written, and an
event waits for its redelivery after a process of ours died with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from pydantic import ValidationError

from slmops.contracts.events import EVENTS, Event, GatewayEnrolled, GatewayReported
from slmops.contracts.plan import Identity, Plan
from slmops.contracts.signed import plan_in
from slmops.contracts.subjects import blueprint_key
from slmops.kit.bus.client import BusClient


class Fleet(Protocol):
    """Every method raises `Unreachable`."""

    async def identity(self, gateway_id: str) -> Identity | None:
        """As enrolled, with the newest labels that it reported. None: it was never enrolled."""

    async def plan(self, blueprint: str) -> Plan | None: ...

    def rollouts(self, after: int) -> AsyncIterator[tuple[int, Event]]:
        """What was stored of rollouts after a sequence, oldest first, each with its own."""


class BusFleet:
    """Direct reads of single messages: four when there is nothing new, whatever the size of the fleet."""

    def __init__(self, client: Callable[[], BusClient]) -> None:
        self._client = client

    async def identity(self, gateway_id: str) -> Identity | None:
        enrolled = await self._client().latest(GatewayEnrolled, gateway_id)
        if enrolled is None:
            return None
        report = await self._client().latest(GatewayReported, gateway_id)
        labels = (report.labels if report else {}) or enrolled.labels
        return Identity(gateway_id=gateway_id, blueprint=enrolled.blueprint, labels=labels)

    async def plan(self, blueprint: str) -> Plan | None:
        """Its signature is the gateways' to verify: only the rollout service may write here."""
        found = await self._client().read_desired(blueprint_key(blueprint))
        return plan_in(found[0]) if found else None

    async def rollouts(self, after: int) -> AsyncIterator[tuple[int, Event]]:
        async for sequence, subject, data in self._client().stored("slmops.rollout.*.v1", after):
            with suppress(ValidationError, KeyError):  # whoever consumes it dead-letters it
                yield sequence, EVENTS[subject].model_validate_json(data)

"""Reads the current state from the bus: a gateway's enrolment and labels, a blueprint's plan, and all rollouts.

The service's own tables follow events. A batch may arrive before them: its gateway reads the plan as soon as it is
written, and an event waits for its redelivery if a process died while handling it.
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
from slmops.telemetry.domain.expectation import Enrolled


class Fleet(Protocol):
    """Reads the current state of the fleet. Every method raises `Unreachable`."""

    async def enrolled(self, gateway_id: str) -> Enrolled | None:
        """Returns a gateway's enrolment with its newest reported labels; None if it is not enrolled."""

    async def plan(self, blueprint: str) -> Plan | None: ...

    def rollouts(self, after: int) -> AsyncIterator[tuple[int, Event]]:
        """Yields the stored rollout events after sequence `after`, oldest first, each with its sequence."""


class BusFleet:
    """Reads single messages directly: four if there is nothing new, whatever the size of the fleet."""

    def __init__(self, client: Callable[[], BusClient]) -> None:
        self._client = client

    async def enrolled(self, gateway_id: str) -> Enrolled | None:
        enrolled = await self._client().latest(GatewayEnrolled, gateway_id)
        if enrolled is None:
            return None
        report = await self._client().latest(GatewayReported, gateway_id)
        labels = (report.labels if report else {}) or enrolled.labels
        identity = Identity(gateway_id=gateway_id, blueprint=enrolled.blueprint, labels=labels)
        return Enrolled(identity, enrolled.public_key, enrolled.at, enrolled.moved_from)

    async def plan(self, blueprint: str) -> Plan | None:
        """Returns a plan without verifying its signature, because only the rollout service may write here."""
        found = await self._client().read_desired(blueprint_key(blueprint))
        return plan_in(found[0]) if found else None

    async def rollouts(self, after: int) -> AsyncIterator[tuple[int, Event]]:
        async for sequence, subject, data in self._client().stored("slmops.rollout.*.v1", after):
            with suppress(ValidationError, KeyError):  # its consumer dead-letters it
                yield sequence, EVENTS[subject].model_validate_json(data)

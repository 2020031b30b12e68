"""What is known now, asked where it is decided: a gateway's enrolment and labels, and the plan of a blueprint.

Our own tables follow events. A gateway may be ahead of them: it reads the plan as soon as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from slmops.contracts.events import GatewayEnrolled, GatewayReported
from slmops.contracts.plan import Identity, Plan
from slmops.contracts.signed import plan_in
from slmops.contracts.subjects import blueprint_key
from slmops.kit.client import BusClient


class Fleet(Protocol):
    """Both raise `Unreachable`."""

    async def identity(self, gateway_id: str) -> Identity | None:
        """As enrolled, with the newest labels that it reported. None: it was never enrolled."""

    async def plan(self, blueprint: str) -> Plan | None: ...


class BusFleet:
    """Three direct reads of the last message of a subject, whatever the size of the fleet."""

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

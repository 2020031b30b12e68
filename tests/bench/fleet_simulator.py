"""A simulated fleet. Each gateway resolves the plan for itself and runs the gateway's own table of phases.

What is simulated: the work between two phases takes no time, all gateways share the process and a few connections (or
one each), and the signature of a plan is checked once, not by each gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.fleet_gateway import UPDATE, Gateway, Message, heartbeat, measurement, report
from bench.fleet_wire import FIRST_SID, OnMessage, Wire

from slmops.contracts import subjects
from slmops.contracts.events import GatewayReported
from slmops.contracts.plan import Plan
from slmops.contracts.tuf_names import RolloutKeys
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.trust.plans import open_plan

REQUESTS = 40
"""Requests in a batch of measurements."""
RAW = b"bench-raw"
_AT_ONCE, _TURN = 1000, 50
"""Gateways whose phases alternate, and messages after which received ones are handled."""
_QUIET_S = 2.0


@dataclass
class Wave:
    """When the gateways got one document, or decided on it. `signed_at`: when it was made. All are Unix times."""

    plan: Plan | None
    signed_at: float
    at: list[float] = field(default_factory=list)

    def percentile(self, share: float, gateways: int) -> float:
        """Returns the seconds after which this share of the gateways had it."""
        place = max(0, math.ceil(share * gateways) - 1)
        return sorted(self.at)[place] - self.signed_at if place < len(self.at) else math.inf


class Simulator:
    """Gateways of one blueprint. `wires`: gateway i uses `wires[i % len(wires)]`."""

    def __init__(self, gateways: Sequence[Gateway], wires: Sequence[Wire], keys: RolloutKeys) -> None:
        assert gateways, "a fleet has gateways"
        self.gateways = gateways
        self.wires = wires
        self.blueprint = gateways[0].identity.blueprint
        self.waves: dict[int, Wave] = {}
        """By the sequence of the plan's document."""
        self.raw = Wave(None, 0)
        self.reports = 0
        self.heartbeats = 0
        self.reported_heartbeats = 0
        """Heartbeats that are reports."""
        self.measures = True
        """Whether a gateway sends a batch of measurements after an update."""
        self.updates = True
        """Whether the gateways begin the updates that they decided on."""
        self._keys = keys
        self._known: tuple[bytes, bytes, Wave] | None = None
        self.due: list[Gateway] = []
        """Gateways that decided to update and have not begun."""
        self._published = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, heartbeat_every_s: float, plan: Plan | None = None) -> None:
        """Subscribes every gateway to its plan. `plan`: one that all of them follow already."""
        subject = subjects.twin(subjects.blueprint_key(self.blueprint))
        for number, wire in enumerate(self.wires):
            mine = self.gateways[number :: len(self.wires)]
            wire.on_message = self._receiver(mine)
            for sid, gateway in enumerate(mine, FIRST_SID):
                gateway.wire = wire
                wire.subscribe(subject, sid)
        await asyncio.gather(*(wire.flush() for wire in self.wires))
        if plan is not None:
            for gateway in self.gateways:
                gateway.generation = plan.generation
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._beat(heartbeat_every_s))]

    async def stop(self) -> None:
        await cancel_and_wait(self._tasks)
        await asyncio.gather(*(wire.close() for wire in self.wires))

    @property
    def decided(self) -> bool:
        """Whether all gateways have decided on the newest plan."""
        return bool(self.waves) and len(self.waves[max(self.waves)].at) >= len(self.gateways)

    @property
    def newest_document(self) -> tuple[bytes, bytes]:
        """The headers and the payload of the newest plan, as they arrived."""
        assert self._known is not None, "a plan was written"
        return self._known[:2]

    def check(self) -> None:
        """Raises the error of a task that failed."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def settled(self) -> None:
        """Waits until JetStream has everything that was published."""
        await asyncio.gather(*(wire.settled() for wire in self.wires))

    # ---- receiving ----------------------------------------------------------------------------------------

    def _receiver(self, mine: Sequence[Gateway]) -> OnMessage:
        def receive(sid: int, headers: bytes, payload: bytes) -> None:
            if RAW in headers:
                self.raw.at.append(time.time())
                return
            wave = self._opened(headers, payload)
            if wave is None or wave.plan is None:
                return
            gateway = mine[sid - FIRST_SID]
            if wave.plan.generation > gateway.generation and gateway.decide(wave.plan):
                self.due.append(gateway)
            wave.at.append(time.time())

        return receive

    def _opened(self, headers: bytes, payload: bytes) -> Wave | None:
        """Returns the wave of a document. Its signature is checked when it arrives for the first time."""
        known = self._known
        if known is not None and known[0] == headers and known[1] == payload:
            return known[2]
        attributes = _attributes(headers)
        if attributes.get("nats-subject") != subjects.desired(subjects.blueprint_key(self.blueprint)):
            return None
        statement, _ = open_plan(payload, self._keys)
        wave = Wave(statement.plan, statement.signed_at.timestamp())
        self.waves[int(attributes["nats-sequence"])] = wave
        self._known = headers, payload, wave
        return wave

    # ---- sending ------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Updates the gateways that decided to, after all have decided: real ones decide at the same time."""
        while True:
            await asyncio.sleep(0.02)
            if self.due and self.updates:
                await self._all_decided()
                await self._update()

    async def _all_decided(self) -> None:
        wave = self.waves[max(self.waves)]
        while len(wave.at) < len(self.gateways) and time.time() - wave.at[-1] < _QUIET_S:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    async def _update(self) -> None:
        while self.due:
            updating, self.due = self.due[:_AT_ONCE], self.due[_AT_ONCE:]
            await self.go_through_updates(updating, wait=False)
            if self.measures:
                await self.measure(updating, 1, wait=False)

    async def go_through_updates(self, gateways: Sequence[Gateway], *, wait: bool = True) -> None:
        """Updates gateways, phase by phase, and sends their reports; waits until JetStream has all of them."""
        updates = [(gateway, gateway.update()) for gateway in gateways]
        for _ in UPDATE:
            for gateway, update in updates:
                next(update)
                self.reports += 1
                await self._publish(gateway, report(gateway))
        if wait:
            await self.settled()

    async def measure(self, gateways: Sequence[Gateway], times: int, *, wait: bool = True) -> None:
        """Sends batches of measurements of every gateway."""
        for _ in range(times):
            for gateway in gateways:
                await self._publish(gateway, measurement(gateway, REQUESTS))
        if wait:
            await self.settled()

    async def _publish(self, gateway: Gateway, message: Message) -> None:
        self._published += 1
        if self._published % _TURN == 0:
            await asyncio.sleep(0)
        wire = _wire_of(gateway)
        if wire.full:
            await wire.room()
        wire.publish(*message)

    async def _beat(self, every_s: float) -> None:
        """Sends the heartbeats of all gateways, spread over the interval."""
        last, due = time.monotonic(), 0.0
        for gateway in itertools.cycle(self.gateways):
            while due < 1:
                await asyncio.sleep(0.1)
                now = time.monotonic()
                due, last = due + (now - last) / every_s * len(self.gateways) * self.updates, now
            due -= 1
            await self._send_heartbeat(gateway)

    async def beat_once(self) -> None:
        """Sends a heartbeat of every gateway now."""
        for gateway in self.gateways:
            await self._send_heartbeat(gateway)
        await asyncio.gather(*(wire.flush() for wire in self.wires))

    async def _send_heartbeat(self, gateway: Gateway) -> None:
        message = heartbeat(gateway)
        self.heartbeats += 1
        if message[0].startswith(GatewayReported.type):
            self.reported_heartbeats += 1
            await self._publish(gateway, message)
        else:
            _wire_of(gateway).tell(*message)


def _wire_of(gateway: Gateway) -> Wire:
    assert gateway.wire is not None, "the simulator was started"
    return gateway.wire


def _attributes(headers: bytes) -> dict[str, str]:
    """Returns the headers by their name in lower case."""
    lines = (line.partition(":") for line in headers.decode().split("\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in lines if name}

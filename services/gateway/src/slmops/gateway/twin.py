"""The desired half of the twin: this gateway's plan and overlay, level-triggered.

No consumer per gateway: a core subscription to the republished copy tells that something changed, a direct get reads
what is there, and whatever has the higher sequence wins. A change that was missed is found by the next timed read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Protocol

from nats.aio.msg import Msg
from pydantic import ValidationError

from slmops.contracts import subjects
from slmops.contracts.errors import DiskFull, PermanentError, SlmopsError, TemporaryError
from slmops.contracts.plan import Desired, Identity, Overlay, Plan, resolve
from slmops.kit.bus.client import BusClient

log = logging.getLogger(__name__)
OpenPlan = Callable[[bytes], Awaitable[Plan]]


class Follower(Protocol):
    def desired_changed(self, desired: Desired, plan: Plan) -> None: ...

    def plan_refused(self, error: SlmopsError) -> None:
        """The newest plan may not be trusted, or cannot be kept; the one before stays."""


class Twin:
    """Tells `follower` what this gateway should run, whenever its plan or overlay is another."""

    def __init__(self, identity: Identity, open_plan: OpenPlan, follower: Follower, refresh_every: timedelta) -> None:
        self._identity = identity
        self._open_plan = open_plan
        self._follower = follower
        self._refresh_every = refresh_every
        self._keys = (subjects.blueprint_key(identity.blueprint), subjects.overlay_key(identity.gateway_id))
        self._seen: dict[str, int] = {}
        self._plan: Plan | None = None
        self._overlay: Overlay | None = None
        self._applying = asyncio.Lock()
        self._again = asyncio.Event()

    async def watch(self, client: BusClient) -> None:
        """Runs until cancelled."""
        for key in self._keys:
            await client.connection.subscribe(subjects.twin(key), cb=self._heard)
        client.on_reconnect(self._again.set)
        while True:
            self._again.clear()
            pause = self._refresh_every
            try:
                await self._read(client)
            except TemporaryError as error:
                log.warning("could not read the plan, retrying: %s", error)
                pause = min(pause, error.delay)
            # Jitter, so that a fleet that came back together does not read together for ever.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), pause.total_seconds() * random.uniform(0.75, 1.25))

    async def adopt(self, plan: Plan) -> None:
        """A plan that came by another way than the bus, and may be followed."""
        async with self._applying:
            self._plan = plan
            self._tell(plan)

    def refused(self, error: PermanentError) -> None:
        """What came by another way may not be followed."""
        self._follower.plan_refused(error)

    async def _read(self, client: BusClient) -> None:
        for key in self._keys:
            found = await client.read_desired(key)
            if found is not None:
                await self._apply(key, *found)

    async def _heard(self, message: Msg) -> None:
        key = message.subject.removeprefix(subjects.twin(""))
        headers = message.headers or {}
        # Another gateway can have an answer of the server delivered here. Only a copy of our own document counts.
        ours = headers.get("Nats-Subject") == subjects.desired(key)
        sequence = headers.get("Nats-Sequence", "")
        if ours and sequence.isdigit():
            try:
                await self._apply(key, bytes(message.data), int(sequence))
            except TemporaryError as error:
                log.warning("%s waits: %s", key, error)
                self._again.set()

    async def _apply(self, key: str, data: bytes, sequence: int) -> None:
        """Raises `TemporaryError` while the plan's trust cannot be decided yet."""
        async with self._applying:
            if sequence <= self._seen.get(key, 0):
                return
            try:
                if key == self._keys[0]:
                    self._plan = await self._open_plan(data)
                else:
                    self._overlay = Overlay.model_validate_json(data)
            except ValidationError as error:
                # What this release of the gateway cannot read must not move it: it stays where it is.
                log.error("ignored %s: it does not parse (%d errors)", key, error.error_count())
                self._seen[key] = sequence
                return
            except PermanentError as error:
                # Not seen: the next read asks again, for its key may have been named by then.
                self._follower.plan_refused(error)
                return
            except DiskFull as error:
                self._follower.plan_refused(error)
                raise
            self._seen[key] = sequence
            if self._plan is not None:
                self._tell(self._plan)

    def _tell(self, plan: Plan) -> None:
        overlays = [self._overlay] if self._overlay else []
        self._follower.desired_changed(resolve(plan, overlays, self._identity), plan)

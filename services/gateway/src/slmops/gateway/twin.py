"""The desired half of the twin: this gateway's plan and overlay, level-triggered.

No consumer per gateway: a core subscription to the republished copy tells that something changed, a direct get reads
what is there, and whatever has the higher sequence wins. A change that was missed is found by the next timed read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from datetime import timedelta

from nats.aio.msg import Msg
from pydantic import ValidationError

from slmops.contracts import subjects
from slmops.contracts.errors import TemporaryError
from slmops.contracts.plan import Desired, Identity, Overlay, Plan, resolve
from slmops.kit.client import BusClient

log = logging.getLogger(__name__)
Changed = Callable[[Desired, Plan], None]


class Twin:
    """Calls `on_change` with what this gateway should run, whenever its plan or overlay is another."""

    def __init__(self, identity: Identity, on_change: Changed, refresh_every: timedelta) -> None:
        self._identity = identity
        self._on_change = on_change
        self._refresh_every = refresh_every
        self._keys = (subjects.blueprint_key(identity.blueprint), subjects.overlay_key(identity.gateway_id))
        self._seen: dict[str, int] = {}
        self._plan: Plan | None = None
        self._overlay: Overlay | None = None

    async def watch(self, client: BusClient) -> None:
        """Runs until cancelled."""
        for key in self._keys:
            await client.connection.subscribe(subjects.twin(key), cb=self._heard)
        reconnected = asyncio.Event()
        client.on_reconnect(reconnected.set)
        while True:
            try:
                await self._read(client)
            except TemporaryError as error:
                log.warning("the twin waits: %s", error)
            # Jitter, so that a fleet that came back together does not read together for ever.
            wait = self._refresh_every.total_seconds() * random.uniform(0.75, 1.25)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reconnected.wait(), wait)
            reconnected.clear()

    async def _read(self, client: BusClient) -> None:
        for key in self._keys:
            found = await client.read_desired(key)
            if found is not None:
                self._apply(key, *found)

    async def _heard(self, message: Msg) -> None:
        key = message.subject.removeprefix(subjects.twin(""))
        sequence = (message.headers or {}).get("Nats-Sequence", "")
        if sequence.isdigit():
            self._apply(key, bytes(message.data), int(sequence))

    def _apply(self, key: str, data: bytes, sequence: int) -> None:
        if sequence <= self._seen.get(key, 0):
            return
        self._seen[key] = sequence
        try:
            if key == self._keys[0]:
                self._plan = Plan.model_validate_json(data)
            else:
                self._overlay = Overlay.model_validate_json(data)
        except ValidationError as error:
            # What this release of the gateway cannot read must not move it: it stays where it is.
            log.error("%s is not understood (%d errors); ignored", key, error.error_count())
            return
        if self._plan is not None:
            overlays = [self._overlay] if self._overlay else []
            self._on_change(resolve(self._plan, overlays, self._identity), self._plan)

"""The desired half of the twin: this gateway's plan and overlay, level-triggered.

There is no consumer per gateway. A core subscription to the republished copy delivers changes, and a direct get reads
the current document. The higher sequence wins. The next periodic read finds a change that was missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
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
_REFUSED_AGAIN = timedelta(minutes=1)
"""Pause before a refused plan is read again. It doubles twice."""
OpenPlan = Callable[[bytes], Awaitable[Plan]]


class Follower(Protocol):
    def desired_changed(self, desired: Desired, plan: Plan) -> None: ...

    def plan_refused(self, error: SlmopsError) -> None:
        """Called when the newest plan is not trusted or cannot be stored. The previous plan stays in force."""


class Twin:
    """Notifies `follower` of the release that this gateway should run, whenever its plan or overlay changes."""

    def __init__(self, identity: Identity, open_plan: OpenPlan, follower: Follower, refresh_every: timedelta) -> None:
        self._identity = identity
        self._open_plan = open_plan
        self._follower = follower
        self._refresh_every = refresh_every
        self._keys = _keys(identity)
        self.on_moved: Callable[[str], None] = lambda _blueprint: None
        """Called with the blueprint that the gateway's overlay names."""
        self._applied_sequences: dict[str, int] = {}
        self._plan: Plan | None = None
        self._overlay: Overlay | None = None
        self._applying = asyncio.Lock()
        self._read_again = asyncio.Event()
        self._refusals = 0
        """How often in a row the newest plan was refused."""

    @property
    def blueprint(self) -> str:
        return self._identity.blueprint

    def move_to(self, identity: Identity) -> None:
        """Forgets the plan: from the next connection on, follows that of the identity's blueprint."""
        self._identity, self._keys = identity, _keys(identity)
        self._applied_sequences.clear()
        self._plan, self._refusals = None, 0

    async def watch(self, client: BusClient) -> None:
        """Subscribes to the plan and the overlay and reads them periodically. Runs until cancelled."""
        for key in self._keys:
            await client.connection.subscribe(subjects.twin(key), cb=self._on_message)
        client.on_reconnect(self._read_again.set)
        while True:
            self._read_again.clear()
            failed = None
            try:
                await self._read(client)
            except TemporaryError as error:
                log.warning("could not read the plan, retrying: %s", error)
                failed = error.delay
            await self._wait(failed)

    async def _wait(self, failed: timedelta | None) -> None:
        """Waits until it is time to read again, or a reading was asked for. `failed`: pause after a failed one."""
        # Jitter, so that a fleet that reconnects at the same moment does not read at the same moment from then on.
        begun, jitter = time.monotonic(), random.uniform(0.75, 1.25)
        while not self._read_again.is_set():
            pause = min(self._pause(), failed) if failed is not None else self._pause()
            left = begun + pause.total_seconds() * jitter - time.monotonic()
            if left <= 0:
                return
            # A plan that arrives meanwhile may be refused, which makes the pause shorter.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._read_again.wait(), min(left, _REFUSED_AGAIN.total_seconds() / 2))

    def _pause(self) -> timedelta:
        """Returns the pause between two readings. A refused plan is read again sooner, because its key may become
        trusted, or fresh metadata may follow."""
        if not self._refusals:
            return self._refresh_every
        return min(self._refresh_every, _REFUSED_AGAIN * (1 << min(self._refusals - 1, 2)))

    async def adopt(self, plan: Plan) -> None:
        """Follows a trusted plan that did not come over the bus. Ignores that of a blueprint that the gateway left."""
        async with self._applying:
            if plan.blueprint != self._identity.blueprint:
                return
            self._plan = plan
            self._notify(plan)

    def refused(self, error: PermanentError) -> None:
        """Passes on why a plan that did not come over the bus was rejected."""
        self._follower.plan_refused(error)

    async def _read(self, client: BusClient) -> None:
        # The overlay first: a plan that cannot be checked now must not keep the gateway from learning of a move.
        for key in reversed(self._keys):
            found = await client.read_desired(key)
            if found is not None:
                await self._apply(key, *found)

    async def _on_message(self, message: Msg) -> None:
        key = message.subject.removeprefix(subjects.twin(""))
        headers = message.headers or {}
        # Another gateway can make the server send a reply to this subject. Accept only copies of our own document.
        ours = headers.get("Nats-Subject") == subjects.desired(key)
        sequence = headers.get("Nats-Sequence", "")
        if ours and sequence.isdigit():
            try:
                await self._apply(key, bytes(message.data), int(sequence))
            except TemporaryError as error:
                log.warning("could not apply %s, retrying: %s", key, error)
                self._read_again.set()

    async def _apply(self, key: str, data: bytes, sequence: int) -> None:
        """Applies a newer plan or overlay. Raises `TemporaryError` while the plan's signature cannot be checked.

        Ignores the plan of a blueprint that the gateway left, also if it left while the plan was checked.
        """
        async with self._applying:
            identity = self._identity
            if key not in self._keys or sequence <= self._applied_sequences.get(key, 0):
                return
            try:
                if key == self._keys[0]:
                    plan = await self._open_plan(data)
                    if self._identity is not identity:
                        return
                    self._plan, self._refusals = plan, 0
                else:
                    self._follow_overlay(data)
            except (ValidationError, SlmopsError) as error:
                if self._identity is not identity:
                    return
                self._failed(key, sequence, error)
                return
            self._applied_sequences[key] = sequence
            if self._plan is not None:
                self._notify(self._plan)

    def _failed(self, key: str, sequence: int, error: ValidationError | SlmopsError) -> None:
        """Records why a document was not applied. Raises a `TemporaryError` again."""
        if isinstance(error, ValidationError):
            # A document that this version of the gateway cannot parse must not change what it runs.
            log.error("ignored %s: it does not parse (%d errors)", key, error.error_count())
            self._applied_sequences[key] = sequence
            return
        if isinstance(error, PermanentError | DiskFull):
            # Not marked as applied: the next read tries again, because the key may be trusted by then.
            self._refusals += isinstance(error, PermanentError)
            self._follower.plan_refused(error)
        if not isinstance(error, PermanentError):
            raise error

    def _follow_overlay(self, data: bytes) -> None:
        """Applies an overlay; an empty one was removed. Raises `ValidationError`."""
        self._overlay = Overlay.model_validate_json(data) if data else None
        if self._overlay is not None and self._overlay.blueprint is not None:
            self.on_moved(self._overlay.blueprint)

    def _notify(self, plan: Plan) -> None:
        overlays = [self._overlay] if self._overlay else []
        self._follower.desired_changed(resolve(plan, overlays, self._identity), plan)


def _keys(identity: Identity) -> tuple[str, str]:
    """Returns the keys of the gateway's documents: its blueprint's plan, and its own overlay."""
    return subjects.blueprint_key(identity.blueprint), subjects.overlay_key(identity.gateway_id)

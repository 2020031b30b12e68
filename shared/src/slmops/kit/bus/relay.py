"""Publishes the events of the journal's outbox, and marks each as published when it is stored.

Events of one key are published one after another. Up to 64 of different keys wait for their acknowledgements at the
same time: they are sent in the order of the journal, and only an error of one can bring another before it.

A full stream that refuses its events does not hold up those of other streams. It is tried again after 2 to 30 seconds.
The later events of an aggregate whose event was refused wait, whatever their stream.

After a crash between storing and marking an event is published again. This is harmless because of JetStream's dedupe
window and because consumers are idempotent by event id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from slmops.contracts import subjects
from slmops.contracts.errors import DiskFull, TemporaryError
from slmops.contracts.events import EVENTS
from slmops.kit.bus.client import BusClient
from slmops.kit.journal import Journal, Recorded

log = logging.getLogger("slmops.relay")
_IN_FLIGHT = 64
_POLL_S = 1.0  # another process of the service may have filled the outbox
_FIRST_S, _LONGEST_S = 2.0, 30.0


class Refusing:
    """The streams that refuse new messages, and when each is tried again. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        self._delay_s: dict[str, float] = {}

    def refused(self, stream: str) -> float:
        """Doubles and returns the delay of a stream, in seconds."""
        delay = min(2 * self._delay_s.get(stream, _FIRST_S / 2), _LONGEST_S)
        self._delay_s[stream], self._until[stream] = delay, self._clock() + delay
        return delay

    def accepted(self, stream: str) -> None:
        """Forgets the refusals before. A stream that waits stays so: it may accept some subjects and refuse others."""
        if not self.waits(stream):
            self._delay_s.pop(stream, None)
            self._until.pop(stream, None)

    def waits(self, stream: str) -> bool:
        return self._until.get(stream, 0.0) > self._clock()

    def types(self) -> list[str]:
        """Returns the types of the events that are not tried now."""
        waiting = {stream for stream in self._until if self.waits(stream)}
        return [name for name, kind in EVENTS.items() if subjects.stream_of(kind.subject_template()) in waiting]


async def run_relay(journal: Journal, client: BusClient) -> None:
    """Runs until cancelled."""
    refusing = Refusing()
    while True:
        try:
            while await drain(journal, client, refusing):
                pass
        except TemporaryError as error:
            log.warning("could not publish the outbox, retrying: %s", error)
            await asyncio.sleep(error.delay.total_seconds())
        journal.appended.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(journal.appended.wait(), _POLL_S)


async def drain(journal: Journal, client: BusClient, refusing: Refusing | None = None) -> int:
    """Publishes one page of the outbox; returns the number of published events. O(page).

    After an error of one event the later ones of its key stay in the outbox. If a stream refuses events, it is noted in
    `refusing`, and another page follows without its events. Raises the first other error at the end.
    """
    refusing = refusing or Refusing()
    published = 0
    while True:
        relaying = _Page(client, refusing)
        try:
            ended = await relaying.publish(await journal.outbox(without=refusing.types()))
        finally:
            if relaying.done:
                await journal.published(relaying.done)
        for error in ended:
            if error is not None:
                raise error
        published += len(relaying.done)
        if not relaying.refused:
            return published


class _Page:
    """Publishes one page. `done` are the positions of the stored events; `refused`: whether a stream is full."""

    def __init__(self, client: BusClient, refusing: Refusing) -> None:
        self._client = client
        self._refusing = refusing
        self._free = asyncio.Semaphore(_IN_FLIGHT)
        self.done: list[int] = []
        self.refused = False

    async def publish(self, page: Sequence[Recorded]) -> list[BaseException | None]:
        """Returns the error of each key, None for those without one."""
        keys: dict[str, list[Recorded]] = defaultdict(list)
        for recorded in page:
            keys[recorded.event.key].append(recorded)
        return await asyncio.gather(*map(self._in_order, keys.values()), return_exceptions=True)

    async def _in_order(self, events: list[Recorded]) -> None:
        for recorded in events:
            stream = str(subjects.stream_of(recorded.event.subject))
            async with self._free:
                if self._refusing.waits(stream):
                    return
                try:
                    await self._client.publish(recorded.event, recorded.envelope)
                except DiskFull as error:
                    self._note(stream, error)
                    return
            self._refusing.accepted(stream)
            self.done.append(recorded.position)

    def _note(self, stream: str, error: DiskFull) -> None:
        if not self._refusing.waits(stream):  # others of the page were refused at the same time
            delay = self._refusing.refused(stream)
            log.warning("events wait in the outbox, retrying in %.0f s: %s", delay, error)
        self.refused = True

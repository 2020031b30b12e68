"""Checks that the registry has received every fact; a collection after a gap would remove blobs that are needed.

A consumer's gaps are kept beside the consumer, which goes with its stream. So which stream we read is remembered in our
own database: when another one stands in its place, that is a gap of all our consumers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

from slmops.contracts.errors import FactsMissing, TemporaryError
from slmops.contracts.subjects import spec_of
from slmops.kit.bus import gaps
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.gaps import Durable, Found, Gap
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal, UnitOfWork
from slmops.registry import store

log = logging.getLogger("slmops.registry")
_EVERY = timedelta(minutes=1)
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime.fromtimestamp(0, UTC)


class Facts:
    """`client` and `durables` are there once the bus has started."""

    def __init__(
        self, journal: Journal, client: Callable[[], BusClient], durables: Callable[[], Sequence[Durable]]
    ) -> None:
        self._journal = journal
        self._client = client
        self._durables = durables

    async def check(self) -> None:
        """Raises `FactsMissing` while a gap in the facts is not accepted, `Unreachable`, `NotReady`."""
        await self._recognize()
        found = [Found(durable, gap) for durable in self._ours() if (gap := await gaps.look(self._client(), durable))]
        if not found:
            return
        stream = found[0].durable.stream
        raise FactsMissing(
            f"events were lost before the registry handled them: {gaps.described(found)}. "
            "Blobs that they name would look like garbage",
            where=stream,
            fix="Restore the stream from a backup, or push and optimize again what slmops model ls lacks. Then accept "
            f"the loss: slmops stream accept {stream}. From then on blobs that only lost events name are garbage.",
        )

    async def run(self) -> None:
        """Recognize the stream every minute, so that its replacement is known before a collection. Until cancelled."""
        while True:
            try:
                await self._recognize()
            except TemporaryError as error:
                log.warning("the stream of facts is looked at later: %s", error)
            await asyncio.sleep(_EVERY.total_seconds())

    def _ours(self) -> list[Durable]:
        return [durable for durable in self._durables() if (spec := spec_of(durable.stream)) and spec.facts]

    async def _recognize(self) -> None:
        for stream in {durable.stream for durable in self._ours()}:
            made, key = await self._made(stream), f"stream {stream}"
            known = await self._journal.read(partial(store.heard, kind=key))
            if known and known != made:
                # Noted before the new stream is remembered: who is killed in between notes it again.
                await self._note_replacement(stream)
                await self._journal.transact(_forget)
            if known != made:
                await self._journal.transact(partial(_remember, key=key, made=made))

    async def _made(self, stream: str) -> int:
        with gaps.answering(Durable(stream, "")):
            info = await self._client().js.stream_info(stream)
        assert info.created, "the server says when it made a stream"
        return (info.created - _EPOCH) // _MICROSECOND

    async def _note_replacement(self, stream: str) -> None:
        why = "the stream was deleted and made anew; how many events it held is not known"
        for durable in (one for one in self._ours() if one.stream == stream):
            await gaps.declare(self._client(), durable, Gap(first=1, last=1, why=why, found_at=utc_now()))


def _forget(unit: UnitOfWork) -> None:
    """What was read of another stream says nothing of this one, which is read from its beginning."""
    store.forget_heard(unit.connection)


def _remember(unit: UnitOfWork, key: str, made: int) -> None:
    store.set_heard(unit.connection, key, made)

"""Checks that the registry has received every fact; a collection after a gap would remove blobs that are needed.

A consumer's gaps are stored with the consumer, and deleting a stream deletes its consumers. So the registry stores the
creation time of the stream in its database. Another creation time is a gap of all its consumers.
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
from slmops.kit.bus.gaps import Durable, Found, Gap, check_for_gap
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal, UnitOfWork
from slmops.registry import store

log = logging.getLogger("slmops.registry")
_EVERY = timedelta(minutes=1)
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime.fromtimestamp(0, UTC)


class Facts:
    """Checks the streams of facts. `client` and `durables` work once the bus has started."""

    def __init__(
        self, journal: Journal, client: Callable[[], BusClient], durables: Callable[[], Sequence[Durable]]
    ) -> None:
        self._journal = journal
        self._client = client
        self._durables = durables

    async def check(self) -> None:
        """Raises `FactsMissing` while there is an unaccepted gap, `Unreachable`, `NotReady`."""
        await self._check_replacement()
        found = [
            Found(durable, gap) for durable in self._ours() if (gap := await check_for_gap(self._client(), durable))
        ]
        if not found:
            return
        stream = found[0].durable.stream
        raise FactsMissing(
            f"events were lost before the registry handled them: {gaps.described(found)}. "
            "Blobs that they name would look like garbage",
            where=stream,
            fix="Restore the stream from a backup, or push and optimize again what is missing in slmops model ls. Then "
            f"accept the loss: slmops stream accept {stream}. Then blobs that only lost events name are garbage.",
        )

    async def run(self) -> None:
        """Checks every minute, until cancelled, whether the stream was replaced, to know it before a collection."""
        while True:
            try:
                await self._check_replacement()
            except TemporaryError as error:
                log.warning("could not check the stream of facts, retrying: %s", error)
            await asyncio.sleep(_EVERY.total_seconds())

    def _ours(self) -> list[Durable]:
        return [durable for durable in self._durables() if (spec := spec_of(durable.stream)) and spec.facts]

    async def _check_replacement(self) -> None:
        for stream in {durable.stream for durable in self._ours()}:
            created, key = await self._created(stream), f"stream {stream}"
            known = await self._journal.read(partial(store.read_until, kind=key))
            if known and known != created:
                # Declare the gap before storing the new time: a process that is killed in between declares it again.
                await self._declare_replacement(stream)
                await self._journal.transact(_read_again)
            if known != created:
                await self._journal.transact(partial(_store_created, key=key, created=created))

    async def _created(self, stream: str) -> int:
        with gaps.answering(Durable(stream, "")):
            info = await self._client().js.stream_info(stream)
        assert info.created, "the server sends the creation time"
        return (info.created - _EPOCH) // _MICROSECOND

    async def _declare_replacement(self, stream: str) -> None:
        why = "the stream was deleted and recreated; the number of lost events is unknown"
        for durable in (one for one in self._ours() if one.stream == stream):
            await gaps.declare(self._client(), durable, Gap(first=1, last=1, why=why, found_at=utc_now()))


def _read_again(unit: UnitOfWork) -> None:
    """Makes the marker read the new stream from its beginning."""
    store.forget_read_until(unit.connection)


def _store_created(unit: UnitOfWork, key: str, created: int) -> None:
    store.set_read_until(unit.connection, key, created)

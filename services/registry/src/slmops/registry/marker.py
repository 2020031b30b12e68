"""Finds the blobs that events name: the registry's own events in the journal, those of other services on the bus.

Events of other services are read from their stream and not only as they are delivered. So undelivered events, dead
letters and events from before this table count, too. The position in the stream is stored per event type, so an event
type that is new in a release is read from the beginning.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import datetime

from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import CorruptBlob, InvalidMessage, NotFound
from slmops.contracts.events import Event, ModelVersionRetired
from slmops.kit.bus.client import BusClient
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.objects.store import Objects
from slmops.registry import store
from slmops.registry.domain.live_blobs import OWN, RULES, WITHDRAWALS, BlobReference, Key, living, named, named_in

log = logging.getLogger("slmops.registry")
_PAGE = 500


class Marker:
    """Marks live blobs. `client` works once the bus has started. `check` raises `FactsMissing` if there are gaps."""

    def __init__(
        self,
        journal: Journal,
        objects: Objects,
        client: Callable[[], BusClient],
        check: Callable[[], Awaitable[None]],
    ) -> None:
        self._journal = journal
        self._objects = objects
        self._client = client
        self._check = check
        self._read: dict[Digest, frozenset[Digest]] = {}
        """Cache of the blobs that documents name. Documents never change."""

    async def mark(self, before: datetime) -> set[Digest]:
        """Returns the live blobs. Raises `Unreachable`, `NotReady`, `FactsMissing`, `CorruptBlob`, `InvalidMessage`."""
        await self._check()
        roots = await self._roots(
            before, self._check
        )  # again, to detect events that were removed before they were read
        live = {one.digest for one in roots}
        for document in {one.digest for one in roots if one.document}:
            live |= await self._named_in(document)
        return live

    async def named(self, before: datetime) -> set[Digest]:
        """Returns the live blobs as far as they are known: without the check for gaps, and without those that only an
        unreadable document names. Never for a decision to delete. Raises `Unreachable`."""
        return set(await self.referrers(None, before))

    async def referrers(
        self, digests: Collection[Digest] | None, before: datetime
    ) -> dict[Digest, list[BlobReference]]:
        """Returns what names these blobs, None: all named blobs. A document's reference counts for what it names."""
        wanted = None if digests is None else frozenset(digests)
        found: dict[Digest, list[BlobReference]] = {one: [] for one in digests or ()}
        for root in await self._roots(before):
            names = {root.digest} | (await self._readable(root.digest) if root.document else frozenset())
            for one in names if wanted is None else names & wanted:
                found.setdefault(one, []).append(root)
        return found

    async def _roots(self, before: datetime, check: Callable[[], Awaitable[None]] | None = None) -> list[BlobReference]:
        """Returns the references of all events that still count."""
        for kind in (RULES.keys() | WITHDRAWALS.keys()) - OWN:
            await self._catch_up(kind)
        if check:
            await check()
        everything, withdrawn = await self._journal.read(
            lambda connection: (store.named(connection), store.withdrawn(connection))
        )
        retired: dict[Key, datetime] = {}
        async for event in self._own():
            everything += named(event)
            if isinstance(event, ModelVersionRetired):
                retired[event.model, event.version] = event.at
        return living(everything, retired, withdrawn, before)

    async def _readable(self, document: Digest) -> frozenset[Digest]:
        try:
            return await self._named_in(document)
        except (CorruptBlob, InvalidMessage):  # a verification reports the document itself
            return frozenset()

    async def _catch_up(self, kind: type[Event]) -> None:
        """Reads the events of a type up to the current end of the stream."""
        after = await self._journal.read(lambda connection: store.read_until(connection, kind.type))
        page: list[Event] = []
        async for sequence, event in self._client().recorded(kind, after):
            page.append(event)
            if len(page) >= _PAGE:
                await self._keep(kind, page, sequence)
                page = []
            after = sequence
        if page:
            await self._keep(kind, page, after)

    async def _keep(self, kind: type[Event], events: list[Event], sequence: int) -> None:
        def work(unit: UnitOfWork) -> None:
            for event in events:
                store.name(unit.connection, event)
            store.set_read_until(unit.connection, kind.type, sequence)

        await self._journal.transact(work)

    async def _own(self) -> AsyncIterator[Event]:
        after = 0
        while page := await self._journal.history(after):
            for recorded in page:
                yield recorded.event
            after = page[-1].position

    async def _named_in(self, document: Digest) -> frozenset[Digest]:
        if document not in self._read:
            try:
                self._read[document] = frozenset(named_in(await self._objects.get_bytes(document)))
            except NotFound:  # it counts as missing, and the blobs that it names are useless without it
                log.warning("the referenced document %s is missing from the store", document)
                return frozenset()
        return self._read[document]

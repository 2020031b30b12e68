"""Writes moves into the gateways' overlays, and deletes the enrolments of removed ones.

What has to be told is a table of the journal's database, filled in the transaction of the decision. So a crash loses
nothing, and a tick without changes costs two queries whatever the size of the fleet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from pydantic import ValidationError

from slmops.contracts import subjects
from slmops.contracts.errors import Conflict, TemporaryError
from slmops.contracts.events import GatewayEnrolled
from slmops.contracts.plan import Overlay
from slmops.kit.bus.client import BusClient
from slmops.kit.journal import Journal
from slmops.rollout import membership_rows

log = logging.getLogger("slmops.rollout")
_AT_ONCE = 50


class Overlays:
    """Safe in several processes at once: a document is only written over the revision that was read."""

    def __init__(self, journal: Journal, client: Callable[[], BusClient], every: timedelta) -> None:
        self._journal = journal
        self._client = client
        self._every = every
        self._telling = asyncio.Lock()

    async def run(self) -> None:
        """Publishes pending overlays and removals at every tick, until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(self._every.total_seconds())

    async def tell(self) -> None:
        """Publishes pending overlays and removals. If the bus is unreachable, the next tick retries."""
        try:
            async with self._telling:
                for gateway_id in await self._journal.read(lambda c: membership_rows.overlay_writes(c, _AT_ONCE)):
                    with suppress(Conflict):  # another process wrote first: the next tick reads both again
                        await self._write(gateway_id)
                for gateway_id in await self._journal.read(
                    lambda c: membership_rows.forgotten(c, self._journal.events, _AT_ONCE)
                ):
                    await self._forget(gateway_id)
        except TemporaryError as error:
            log.warning("could not tell the bus about gateways, retrying at the next tick: %s", error)

    async def _write(self, gateway_id: str) -> None:
        key = subjects.overlay_key(gateway_id)
        # Read the document first: its writer's decision was committed before, so the row read next is not older.
        held = await self._client().read_desired(key)
        row = await self._journal.read(lambda connection: membership_rows.overlay_write(connection, gateway_id))
        if row is None:
            return
        data = _document(gateway_id, row.blueprint, held[0] if held else b"")
        if data != (held[0] if held else b""):
            await self._client().write_desired(key, data, held[1] if held else 0)
        await self._journal.transact(
            lambda unit: membership_rows.overlay_written(unit.connection, gateway_id, row.blueprint)
        )
        log.info("overlay of %s written", gateway_id)

    async def _forget(self, gateway_id: str) -> None:
        """Deletes a removed gateway's enrolment from its stream. An enrolment that is newer has another sequence."""
        sequence = await self._client().sequence_of(GatewayEnrolled, gateway_id)
        still = await self._journal.read(lambda connection: membership_rows.is_forgotten(connection, gateway_id))
        if sequence is not None and still:
            await self._client().delete_stored(GatewayEnrolled, gateway_id, sequence)
        await self._journal.transact(lambda unit: membership_rows.enrolment_removed(unit.connection, gateway_id))


def _document(gateway_id: str, blueprint: str | None, held: bytes) -> bytes:
    """Returns the overlay with another blueprint and otherwise unchanged; nothing for a gateway that was removed."""
    if blueprint is None:
        return b""
    try:
        overlay = Overlay.model_validate_json(held)
    except ValidationError:
        overlay = Overlay(gateway_id=gateway_id)
    return overlay.model_copy(update={"blueprint": blueprint}).model_dump_json().encode()

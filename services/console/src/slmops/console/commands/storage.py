"""`slmops storage`: usage of the object store, and garbage collection."""

from __future__ import annotations

from typing import Annotated

import typer

from slmops.console.commands.optimizing import duration
from slmops.console.render import fleet as render
from slmops.console.render.progress import Teller
from slmops.console.session import Session, command
from slmops.contracts.commands import CollectGarbage, GarbageReport, Share
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.kit.bus.client import BusClient

app = typer.Typer(
    name="storage", help="What the object store holds, and what of it nobody needs.", no_args_is_help=True
)
AT_A_TIME = 500
"""Blobs per command, so that there is something to tell."""


async def collect(client: BusClient, asked: CollectGarbage, teller: Teller) -> GarbageReport:
    """Remove everything that is garbage now, piece by piece. What was removed before an error stays removed."""
    part = await client.request(asked, ANSWER_WITHIN)
    first = part
    removed, size_bytes = 0, 0
    while part.removed is not None:
        removed, size_bytes = removed + part.removed.objects, size_bytes + part.removed.size_bytes
        teller.bytes_done("collect", size_bytes, first.garbage.size_bytes)
        if part.removed.objects < asked.at_most:  # no more there, or wanted again meanwhile
            return first.model_copy(update={"removed": Share(objects=removed, size_bytes=size_bytes)})
        part = await client.request(asked, ANSWER_WITHIN)
    return first


@command(app, "gc", "slmops storage gc --dry-run", "slmops storage gc --grace 7d --json")
async def gc(
    session: Session,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Keep what somebody wanted within this time: 12h, 30d. Default: 7d."),
    ] = None,
) -> None:
    """Remove blobs that no version, variant or package names, and what failed uploads left.

    Source files and unpackaged variants of retired versions go; packages stay, for a gateway may return to them. It
    may run at any time and be interrupted: what is being pushed, optimized or packaged is not touched, as long as that
    takes less than --grace.
    """
    asked = CollectGarbage(dry_run=dry_run, at_most=AT_A_TIME)
    if grace is not None:
        asked = asked.model_copy(update={"grace": duration(grace)})
    client = await session.client()
    with Teller(session) as teller:
        teller.status("look at every blob")
        report = await collect(client, asked, teller)
    session.show(report, render.garbage(report))


@command(app, "usage", "slmops storage usage", "slmops storage usage --json")
async def usage(session: Session) -> None:
    """What the blobs of the store are there for. Changes nothing."""
    report = await (await session.client()).request(CollectGarbage(dry_run=True), ANSWER_WITHIN)
    session.show(report, render.garbage(report))

"""`slmops storage`: usage of the object store, and garbage collection."""

from __future__ import annotations

from typing import Annotated

import typer

from slmops.console.commands.optimizing import duration
from slmops.console.render import fleet as render
from slmops.console.render.progress import ProgressReporter
from slmops.console.session import Session, command
from slmops.contracts.commands import CollectGarbage, GarbageReport, Share
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.kit.bus.client import BusClient

app = typer.Typer(
    name="storage",
    help="Show the usage of the object store, verify its blobs, and remove unused ones.",
    no_args_is_help=True,
)
AT_A_TIME = 500
"""Blobs per command. Several commands allow a progress display."""


async def collect(client: BusClient, asked: CollectGarbage, progress: ProgressReporter) -> GarbageReport:
    """Removes all current garbage in several commands. After an error, already removed blobs stay removed."""
    part = await client.request(asked, ANSWER_WITHIN)
    first = part
    removed, size_bytes = 0, 0
    while part.removed is not None:
        removed, size_bytes = removed + part.removed.objects, size_bytes + part.removed.size_bytes
        progress.bytes_done("collect", size_bytes, first.garbage.size_bytes)
        if part.removed.objects < asked.at_most:  # no more garbage, or blobs are in use again
            return first.model_copy(update={"removed": Share(objects=removed, size_bytes=size_bytes)})
        part = await client.request(asked, ANSWER_WITHIN)
    return first


@command(app, "gc", "slmops storage gc --dry-run", "slmops storage gc --grace 7d --json")
async def gc(
    session: Session,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and change nothing.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Keep blobs that were used within this time: 12h, 30d. Default: 7d."),
    ] = None,
) -> None:
    """Remove blobs that no version, variant or package names, and files of failed uploads.

    Source files and unpackaged variants of retired versions are removed. Packages are kept, because a gateway may
    return to them. The command may run at any time and may be interrupted. It does not touch blobs that are being
    pushed, optimized or packaged, as long as that takes less than --grace.
    """
    asked = CollectGarbage(dry_run=dry_run, at_most=AT_A_TIME)
    if grace is not None:
        asked = asked.model_copy(update={"grace": duration(grace)})
    client = await session.client()
    with ProgressReporter(session) as progress:
        progress.status("checking every blob")
        report = await collect(client, asked, progress)
    session.show(report, render.garbage(report))


@command(app, "usage", "slmops storage usage", "slmops storage usage --json")
async def usage(session: Session) -> None:
    """Show how many blobs of the store are in use and how many are garbage. Changes nothing."""
    report = await (await session.client()).request(CollectGarbage(dry_run=True), ANSWER_WITHIN)
    session.show(report, render.garbage(report))

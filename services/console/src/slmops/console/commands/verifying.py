"""`slmops storage verify`: reads every blob again, lists the damaged ones, and brings back what it can."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from slmops.console.commands.uploading import Source, StoreWait, connections, put_file
from slmops.console.render import fleet as render
from slmops.console.render.progress import ProgressReporter
from slmops.console.render.tables import size
from slmops.console.session import Session, command
from slmops.contracts.commands import BeginRestore, DamagedBlob, RestoreBlobs, Share, VerifyStorage
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.exit_codes import ExitCode
from slmops.contracts.model import ModelFile
from slmops.contracts.permissions import ANSWER_WITHIN
from slmops.kit.bus.client import BusClient
from slmops.kit.objects.store import digest_of_path
from slmops.kit.sizes import parse_size

_HEX = re.compile(r"[0-9a-f]{64}")
_AT_A_TIME = 1000
"""Blobs in one request."""
_FILE = "application/octet-stream"


class Verification(BaseModel):
    """The output with `--json`. `after`: where to continue if it was interrupted."""

    checked: Share = Share()
    damaged: list[DamagedBlob] = []
    after: Digest | None = None

    @property
    def left(self) -> list[DamagedBlob]:
        return [blob for blob in self.damaged if not blob.restored]


async def verify_parts(
    client: BusClient, asked: VerifyStorage, found: Verification, progress: ProgressReporter
) -> None:
    """Verifies everything after `asked.after`, and adds to `found` after each part."""
    while True:
        part = await client.request(asked, ANSWER_WITHIN)
        found.checked = Share(
            objects=found.checked.objects + part.checked.objects,
            size_bytes=found.checked.size_bytes + part.checked.size_bytes,
        )
        found.damaged += part.damaged
        found.after = part.after
        if part.after is None:
            return
        share = int(part.after.removeprefix("sha256:")[:8], 16) / (1 << 32)
        progress.status(f"verified {found.checked.objects} blobs, {size(found.checked.size_bytes)}, {share:.0%}")
        asked = asked.model_copy(update={"after": part.after})


def find_copies(folders: Iterable[Path], wanted: Iterable[Digest]) -> Iterator[tuple[Path, Descriptor]]:
    """Yields a file for each digest that some file has: of an OCI layout by its name, of other folders by hashing each.

    Every file is hashed before it is yielded. Blocks. Raises `NotFound` for a path that does not exist.
    """
    left = set(wanted)
    for folder in folders:
        if not folder.exists():
            raise NotFound("there is no such file or folder", where=str(folder), fix="Check the path given to --from.")
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            named = f"sha256:{path.name}" if _HEX.fullmatch(path.name) else None
            if not left or not path.is_file() or (named and named not in left):
                continue
            digest, size_bytes = digest_of_path(path)
            if digest in left:
                left.remove(digest)
                yield path, Descriptor(media_type=_FILE, digest=digest, size=size_bytes)


async def restore_from(client: BusClient, folders: Sequence[Path], found: Verification, on: ProgressReporter) -> None:
    """Uploads copies of damaged blobs, and marks those in `found` as restored."""
    on.status("looking for copies")
    store = StoreWait(say=on.status)
    wanted = [blob.digest for blob in found.left]
    copies = await asyncio.to_thread(lambda: list(find_copies(folders, wanted)))
    for start in range(0, len(copies), _AT_A_TIME):
        part = copies[start : start + _AT_A_TIME]
        ticket = await client.request(BeginRestore(digests=tuple(blob.digest for _, blob in part)), ANSWER_WITHIN)
        part = [(path, blob) for path, blob in part if blob.digest in ticket.urls]
        async with connections(client.verify) as http:
            for path, blob in part:
                file = ModelFile(path=path.name, digest=blob.digest, size_bytes=blob.size)
                on.status(f"restoring {path.name}, {size(blob.size)}")
                await put_file(http, ticket.urls[blob.digest], Source(path, file), lambda _: None, store)
        if part:
            blobs = tuple(blob for _, blob in part)
            answer = await client.request(RestoreBlobs(upload=ticket.upload, blobs=blobs), ANSWER_WITHIN)
            found.damaged = [_marked(blob, answer.restored) for blob in found.damaged]


def _marked(blob: DamagedBlob, restored: Sequence[Digest]) -> DamagedBlob:
    if blob.digest not in restored:
        return blob
    return blob.model_copy(update={"restored": True, "quarantined": False, "fix": ""})


async def verify(
    session: Session,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put corrupt blobs into quarantine, and restore those that have a copy.")
    ] = False,
    copies: Annotated[
        list[Path] | None,
        typer.Option("--from", help="A folder, file or OCI layout with copies; may be repeated.", show_default=False),
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Continue an interrupted verification.", show_default=False)
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Read at most this much per second: 20MiB.", show_default=False)
    ] = None,
) -> int:
    """Read every stored blob and compare it with its digest. Lists the damaged ones with what needs them.

    Without --repair it changes nothing. A blob in quarantine is replaced when the right bytes are put again: by a push
    of the same files, a new optimization, or --from. The registry also verifies all blobs by itself once in 30 days.
    Exits with 1 if damaged blobs are left.
    """
    if copies and not repair:
        raise InvalidMessage("--from needs --repair", fix="Add --repair.")
    asked = VerifyStorage(after=after, repair=repair, bytes_per_s=parse_size(rate) if rate else None)
    found, client = Verification(after=after), await session.client()
    try:
        with ProgressReporter(session) as progress:
            progress.status("verifying")
            await verify_parts(client, asked, found, progress)
            if copies and found.left:
                await restore_from(client, copies, found, progress)
    except BaseException:
        if found.after:
            session.remark(f"Continue with: slmops storage verify --after {found.after}")
        raise
    session.show(found, render.damage(found.checked, found.damaged))
    return ExitCode.REFUSED if found.left else 0


def declare(app: typer.Typer) -> None:
    """Adds the command to the group `storage`."""
    examples = ("slmops storage verify", "slmops storage verify --repair --from ./exported")
    command(app, "verify", *examples)(verify)

"""`slmops bundle`: updates for gateways without a network, as one file to carry."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from pydantic import AwareDatetime, BaseModel
from rich.table import Table

from slmops.console.commands.export import TIMEOUT, fetch
from slmops.console.render.tables import size
from slmops.console.session import Session, command
from slmops.contracts.bundle import (
    BUNDLE_SUFFIX,
    PLAN_NAME,
    BundledDelta,
    BundledPackage,
    BundleIndex,
    Member,
    blob_name,
    metadata_name,
)
from slmops.contracts.commands import BundleContents, FetchMetadata, PackageFiles, PrepareBundle
from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.contracts.manifest import PackageFile
from slmops.contracts.permissions import BUNDLER
from slmops.contracts.signed import PLAN_LIMIT_BYTES, SignedPlan
from slmops.kit.atomic_write import atomic_write
from slmops.kit.bundle import BundleFile, write_bundle
from slmops.kit.clock import utc_now
from slmops.kit.trust.asking import Answers

app = typer.Typer(name="bundle", help="Export and import updates for gateways without a network.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(metavar="FILE", help="A file written by `slmops bundle export`.")]


class BundleView(BaseModel):
    """The content of a bundle. `plan_expires_at` is not verified here; only a gateway checks the plan's signature."""

    file: str
    blueprint: str
    created_at: AwareDatetime
    generation: int
    plan_expires_at: AwareDatetime
    packages: tuple[BundledPackage, ...]
    files: int
    size_bytes: int


@command(
    app,
    "export",
    "slmops bundle export --for edge-chat --out edge-chat.slmops",
    "slmops bundle export --for edge-chat --from sha256:4be1… --out edge-chat.slmops",
)
async def export(
    session: Session,
    blueprint: Annotated[str, typer.Option("--for", help="Blueprint of the gateways that the bundle is for.")],
    out: Annotated[Path, typer.Option(help=f"File to write; its name ends with {BUNDLE_SUFFIX}.")],
    base: Annotated[
        list[str] | None,
        typer.Option(
            "--from", help="Manifest digest of the package that the gateways run, to include deltas from it if any."
        ),
    ] = None,
) -> None:
    """Write a bundle for gateways of a blueprint: its plan, its packages, and the metadata that proves them."""
    if out.suffix != BUNDLE_SUFFIX:
        raise InvalidMessage(
            "gateways ignore a file with this name", where=str(out), fix=f"Use a name that ends with {BUNDLE_SUFFIX}."
        )
    await write(await session.client(), blueprint, tuple(base or ()), out, session.verify)
    view = await asyncio.to_thread(_view, out)
    session.show(view, _table(view))


@command(app, "show", "slmops bundle show edge-chat.slmops", "slmops bundle show edge-chat.slmops --json")
async def show(session: Session, file: File) -> None:
    """Show the content of a bundle after checking every byte against its index. Signatures are checked by gateways."""
    view = await asyncio.to_thread(_view, file)
    session.show(view, _table(view))


@command(app, "import", "slmops bundle import edge-chat.slmops --to /media/stick")
async def import_(
    session: Session,
    file: File,
    to: Annotated[Path, typer.Option(help="Folder that a gateway watches (SLMOPS_BUNDLES).")],
) -> None:
    """Check a bundle against its index and copy it atomically into a folder that a gateway watches."""
    view = await asyncio.to_thread(_view, file)
    with readable(to):
        await asyncio.to_thread(_copy, file, to)
    session.show(view, f"{file.name} is in {to}. The gateway's log says when it has processed the bundle.")


async def write(
    client: Answers, blueprint: str, have: tuple[Digest, ...], out: Path, verify: ssl.SSLContext | bool = True
) -> None:
    """Fetches the content from the packager and writes the bundle. `verify` is httpx's.

    Raises the packager's errors, `Unreachable`, `InvalidBundle`, `Denied`.
    """
    contents = await client.request(PrepareBundle(blueprint=blueprint, have=have))
    content: dict[str, bytes | Path] = {PLAN_NAME: b64decode(contents.plan)}
    content |= await _metadata(client, contents)
    members = [
        Member(name=name, digest=digest_of(data), size=len(data))
        for name, data in content.items()
        if isinstance(data, bytes)
    ]
    with readable(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as folder:
        blobs = {file.descriptor.digest: file for package in contents.packages for file in _wanted(package)}
        async with httpx.AsyncClient(timeout=TIMEOUT, verify=verify) as http:
            for digest, file in blobs.items():
                path = Path(folder) / digest.removeprefix("sha256:")
                await fetch(http, file, path)
                content[blob_name(digest)] = path
                members.append(Member(name=blob_name(digest), digest=digest, size=file.descriptor.size))
        index = BundleIndex(
            blueprint=blueprint,
            created_at=utc_now(),
            packages=tuple(_package(package) for package in contents.packages),
            members=tuple(sorted(members, key=lambda member: member.name)),
        )
        await asyncio.to_thread(write_bundle, out, index, content)


async def _metadata(client: Answers, contents: BundleContents) -> dict[str, bytes | Path]:
    found: dict[str, bytes | Path] = {metadata_name("timestamp.json"): b64decode(contents.timestamp)}
    for file in contents.metadata:
        answer = await client.request(FetchMetadata(gateway_id=BUNDLER, file=file))
        found[metadata_name(file)] = b64decode(answer.content)
    return found


def _wanted(package: PackageFiles) -> list[PackageFile]:
    """Returns manifest, signature, and the deltas of the route or, without a route, the whole files."""
    deltas = [PackageFile(path=step.delta.digest, descriptor=step.delta, url=step.url) for step in package.route]
    return [package.manifest, package.signature, *(deltas or package.files)]


def _package(package: PackageFiles) -> BundledPackage:
    return BundledPackage(
        manifest=package.manifest.descriptor,
        signature=package.signature.descriptor,
        route=tuple(BundledDelta.model_validate(step.model_dump(exclude={"url"})) for step in package.route),
    )


def _view(file: Path) -> BundleView:
    with readable(file):
        bundle = BundleFile(file)
        bundle.check()
        statement = SignedPlan.decode(bundle.read(PLAN_NAME, PLAN_LIMIT_BYTES)).statement()
        return BundleView(
            file=str(file),
            blueprint=bundle.index.blueprint,
            created_at=bundle.index.created_at,
            generation=statement.plan.generation,
            plan_expires_at=statement.expires_at,
            packages=bundle.index.packages,
            files=len(bundle.index.members),
            size_bytes=file.stat().st_size,
        )


def _copy(file: Path, to: Path) -> None:
    with file.open("rb") as source, atomic_write(to / file.name) as out:
        shutil.copyfileobj(source, out)


@contextmanager
def readable(where: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(
            "there is no such file or folder", where=str(error.filename or where), fix="Check the path."
        ) from error
    except OSError as error:
        raise Denied(f"cannot read or write: {error.strerror}", where=str(error.filename or where)) from error


def _table(view: BundleView) -> Table:
    table = Table(
        title=f"{view.blueprint}, generation {view.generation}: {size(view.size_bytes)}", title_justify="left"
    )
    table.caption = f"made {view.created_at:%Y-%m-%d %H:%M}, its plan expires {view.plan_expires_at:%Y-%m-%d %H:%M}"
    for column in ("package", "included as"):
        table.add_column(column)
    for package in view.packages:
        table.add_row(package.manifest.digest, f"{len(package.route)} deltas" if package.route else "whole files")
    return table

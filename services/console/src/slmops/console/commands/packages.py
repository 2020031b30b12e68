"""`slmops package`: list, export and verify published packages."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError

from slmops.console.commands.export import write_layout
from slmops.console.commands.models import find_versions, query
from slmops.console.render import package as render
from slmops.console.render.progress import Teller
from slmops.console.session import Session, command
from slmops.contracts.commands import ExportPackage, PackageOfVersion, WithdrawPackage
from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.manifest import MANIFEST_PATH, Manifest
from slmops.contracts.names import check_name, parse_model_ref
from slmops.kit.clock import utc_now
from slmops.kit.oci_layout import is_layout, manifest_digest_of, verify_layout
from slmops.kit.package import verify_package

app = typer.Typer(name="package", help="Signed packages: list, export, verify, withdraw.", no_args_is_help=True)
Reference = Annotated[str, typer.Argument(metavar="MODEL:VERSION|DIGEST", help="A version, or a manifest.")]
_DIGEST: TypeAdapter[Digest] = TypeAdapter(Digest)
Profile = Annotated[str | None, typer.Option(help="Of several device profiles.", show_default=False)]


class PackageList(BaseModel):
    packages: tuple[PackageOfVersion, ...]


class Verified(BaseModel):
    """What may be trusted: the manifest's digest, and what it says."""

    digest: Digest
    manifest: Manifest


def asked(reference: str, profile: str | None = None) -> ExportPackage:
    """Raises `InvalidName`, `InvalidVersion`, `InvalidMessage`."""
    profile = check_name(profile, "profile name") if profile else None
    if reference.startswith("sha256:"):
        return ExportPackage(manifest=_digest(reference), profile=profile)
    model, version = parse_model_ref(reference)
    return ExportPackage(model=model, version=version, profile=profile)


@command(app, "ls", "slmops package ls", "slmops package ls smollm2 --json")
async def ls(
    session: Session,
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME[:VERSION]]", help="A model or version.", show_default=False)
    ] = None,
) -> None:
    """Packages that were published."""
    versions = await find_versions(await session.client(), query(reference))
    rows = [
        PackageOfVersion(model=version.model, version=version.version, **dict(package))
        for version in versions
        for package in version.packages
    ]
    session.show(PackageList(packages=tuple(rows)), render.packages(rows, utc_now()))


@command(app, "show", "slmops package show smollm2:1.0.0", "slmops package show sha256:… --json")
async def show(session: Session, reference: Reference, profile: Profile = None) -> None:
    """One package and its files."""
    package = await (await session.client()).request(asked(reference, profile))
    session.show(package, render.package(package, utc_now()))


@command(
    app,
    "export",
    "slmops package export smollm2:1.0.0 --to smollm2/",
    "slmops package export sha256:… --to smollm2/",
)
async def export(
    session: Session,
    reference: Reference,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.")],
    profile: Profile = None,
) -> None:
    """Write a package as an OCI image layout, with its signature as a referrer beside it.

    Then any tool copies it: skopeo copy oci:smollm2:1.0.0 docker://registry.example/smollm2:1.0.0
    """
    package = await (await session.client()).request(asked(reference, profile))
    with Teller(session) as teller:
        await write_layout(package, to, teller.bytes_done)
    session.show(package, render.exported(package, to))


@command(
    app,
    "verify",
    "slmops package verify smollm2/ --key trusted.pem",
    "slmops package verify sha256:… --key trusted.pem",
)
async def verify(
    session: Session,
    what: Annotated[
        str, typer.Argument(metavar="FOLDER|DIGEST", help="An OCI layout, a laid out package, or a manifest's digest.")
    ],
    key: Annotated[Path, typer.Option(metavar="FILE", help="The public key that is trusted (PEM).")],
    digest: Annotated[
        str | None, typer.Option(help="The manifest that it has to be; else any that was signed.", show_default=False)
    ] = None,
) -> None:
    """Check every file against the manifest, and the signature by your key. A bit that is another is refused."""
    wanted = _digest(digest) if digest else None
    if what.startswith("sha256:"):
        view = await _fetched_and_verified(session, _digest(what), key)
    else:
        view = await asyncio.to_thread(verified, Path(what), key, wanted)
    session.show(view, render.verified(view.digest, view.manifest))


@command(
    app,
    "withdraw",
    "slmops package withdraw smollm2:1.0.0 --dry-run",
    "slmops package withdraw sha256:… --reason 'superseded by 1.0.2' --json",
)
async def withdraw(
    session: Session,
    reference: Reference,
    profile: Profile = None,
    reason: Annotated[str, typer.Option(help="Kept with the event.")] = "",
    even_if_running: Annotated[
        bool, typer.Option("--even-if-running", help="Although gateways said last that they run it: they are lost.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would go, and change nothing.")] = False,
) -> None:
    """Take back a package that nobody needs. No gateway installs it again, and `slmops storage gc` removes its files.

    Refused while a plan names it: as stable, as candidate, or as what a rollback returns to. To forbid a package at
    once and for ever, whoever has our keys, let keyholders revoke it: slmops trust revoke.
    """
    wanted = asked(reference, profile).model_dump()
    rest = {"reason": reason, "even_if_running": even_if_running, "dry_run": dry_run}
    answer = await (await session.client()).request(WithdrawPackage(**wanted, **rest))
    session.show(answer, render.withdrawn(answer))


def verified(folder: Path, key: Path, digest: Digest | None = None) -> Verified:
    """Raises what `verify_layout` and `verify_package` raise, and `NotFound`."""
    if not folder.is_dir():
        raise NotFound("there is no such folder", where=str(folder), fix="Name a folder, or a digest: sha256:….")
    if is_layout(folder):
        manifest = verify_layout(folder, key, digest)
        return Verified(digest=digest or manifest_digest_of(folder), manifest=manifest)
    manifest = verify_package(folder, key, digest)
    return Verified(digest=digest or digest_of((folder / MANIFEST_PATH).read_bytes()), manifest=manifest)


async def _fetched_and_verified(session: Session, digest: Digest, key: Path) -> Verified:
    package = await (await session.client()).request(ExportPackage(manifest=digest))
    with tempfile.TemporaryDirectory(prefix="slmops-verify-") as folder, Teller(session) as teller:
        await write_layout(package, Path(folder), teller.bytes_done)
        return await asyncio.to_thread(verified, Path(folder), key, digest)


def _digest(text: str) -> Digest:
    try:
        return _DIGEST.validate_python(text)
    except ValidationError as error:
        raise InvalidMessage(f"{text!r} is not a digest", fix="Write sha256: and 64 hexadecimal digits.") from error

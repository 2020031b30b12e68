"""`slmops package`: lists, exports, verifies and withdraws published packages."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError

from slmops.console.commands.export import write_layout
from slmops.console.commands.models import find_versions, query
from slmops.console.commands.registry_copy import SCHEME, PackageAddress, copy_from_registry
from slmops.console.render import package as render
from slmops.console.render.progress import ProgressReporter
from slmops.console.session import Session, command
from slmops.contracts.commands import ExportPackage, PackageOfVersion, WithdrawPackage
from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.manifest import MANIFEST_PATH, Manifest
from slmops.contracts.names import check_name, parse_model_ref
from slmops.kit.clock import utc_now
from slmops.kit.oci_layout import is_layout, manifest_digest_of, verify_layout
from slmops.kit.package import verify_package

app = typer.Typer(name="package", help="List, export, verify and withdraw signed packages.", no_args_is_help=True)
Reference = Annotated[
    str, typer.Argument(metavar="MODEL:VERSION|DIGEST", help="A version, or the digest of a manifest.")
]
TrustedKey = Annotated[
    Path,
    typer.Option(
        metavar="PEM",
        help="The public half of the key that signs packages. slmops up: keys/package-trusted.pem in the data folder.",
    ),
]
_DIGEST: TypeAdapter[Digest] = TypeAdapter(Digest)
Profile = Annotated[str | None, typer.Option(help="Device profile, if there are several.", show_default=False)]


class PackageList(BaseModel):
    packages: tuple[PackageOfVersion, ...]


class Verified(BaseModel):
    """A verified package: the manifest and its digest."""

    digest: Digest
    manifest: Manifest


def export_request(reference: str, profile: str | None = None) -> ExportPackage:
    """Returns the command that exports a package. Raises `InvalidName`, `InvalidVersion`, `InvalidMessage`."""
    profile = check_name(profile, "profile name") if profile else None
    if reference.startswith("sha256:"):
        return ExportPackage(manifest=_parse_digest(reference), profile=profile)
    model, version = parse_model_ref(reference)
    return ExportPackage(model=model, version=version, profile=profile)


@command(app, "ls", "slmops package ls", "slmops package ls smollm2 --json")
async def ls(
    session: Session,
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME[:VERSION]]", help="A model or version.", show_default=False)
    ] = None,
) -> None:
    """List published packages."""
    versions = await find_versions(await session.client(), query(reference))
    rows = [
        PackageOfVersion(model=version.model, version=version.version, **dict(package))
        for version in versions
        for package in version.packages
    ]
    session.show(PackageList(packages=tuple(rows)), render.packages(rows, utc_now()))


@command(app, "show", "slmops package show smollm2:1.0.0", "slmops package show sha256:… --json")
async def show(session: Session, reference: Reference, profile: Profile = None) -> None:
    """Show one package and its files."""
    package = await (await session.client()).request(export_request(reference, profile))
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
    """Write a package as an OCI image layout, with its signature as a referrer.

    Other tools can then copy it: skopeo copy oci:smollm2:1.0.0 docker://registry.example/smollm2:1.0.0
    """
    package = await (await session.client()).request(export_request(reference, profile))
    with ProgressReporter(session) as progress:
        await write_layout(package, to, progress.bytes_done, session.verify)
    session.show(package, render.exported(package, to))


@command(
    app,
    "verify",
    "slmops package verify smollm2/ --key trusted.pem",
    "slmops package verify sha256:… --key trusted.pem",
    "slmops package verify docker://registry.example/smollm2:1.0.0 --key trusted.pem",
)
async def verify(
    session: Session,
    what: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|DIGEST|docker://…",
            help="An OCI layout, a package folder, the digest of a manifest, or a package in a registry.",
        ),
    ],
    key: TrustedKey,
    digest: Annotated[
        str | None,
        typer.Option(help="Expected digest of the manifest. Default: any signed manifest.", show_default=False),
    ] = None,
    tls_verify: Annotated[
        bool, typer.Option("--tls-verify/--no-tls-verify", help="Require HTTPS and a valid certificate of a registry.")
    ] = True,
) -> None:
    """Check every file against the manifest, and the manifest's signature against your key.

    Names and tags do not count: the version shown is the signed one.
    """
    wanted = _parse_digest(digest) if digest else None
    if what.startswith(SCHEME):
        view = await _copy_and_verify(PackageAddress.parse(what), key, wanted, tls_verify)
    elif what.startswith("sha256:"):
        view = await _fetch_and_verify(session, _parse_digest(what), key)
    else:
        view = await asyncio.to_thread(verify_folder, Path(what), key, wanted)
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
    reason: Annotated[str, typer.Option(help="Reason; it is stored with the event.")] = "",
    even_if_running: Annotated[
        bool,
        typer.Option(
            "--even-if-running", help="Ignore gateways that last reported as running it, because they are lost."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be withdrawn, and change nothing.")
    ] = False,
) -> None:
    """Withdraw a package that is no longer needed. No gateway installs it again; `slmops storage gc` removes its files.

    Refused while a plan names the package as stable, as candidate, or as the release that a rollback returns to. To
    forbid a package at once and permanently, even against somebody who has our online keys, let the keyholders revoke
    it: slmops trust revoke.
    """
    wanted = export_request(reference, profile).model_dump()
    rest = {"reason": reason, "even_if_running": even_if_running, "dry_run": dry_run}
    answer = await (await session.client()).request(WithdrawPackage(**wanted, **rest))
    session.show(answer, render.withdrawn(answer))


def verify_folder(folder: Path, key: Path, digest: Digest | None = None) -> Verified:
    """Verifies an OCI layout or a package folder.

    Raises `NotFound`, and what `verify_layout` and `verify_package` raise.
    """
    if not folder.is_dir():
        raise NotFound("there is no such folder", where=str(folder), fix="Name a folder or a digest (sha256:…).")
    if is_layout(folder):
        manifest = verify_layout(folder, key, digest)
        return Verified(digest=digest or manifest_digest_of(folder), manifest=manifest)
    manifest = verify_package(folder, key, digest)
    return Verified(digest=digest or digest_of((folder / MANIFEST_PATH).read_bytes()), manifest=manifest)


async def _fetch_and_verify(session: Session, digest: Digest, key: Path) -> Verified:
    package = await (await session.client()).request(ExportPackage(manifest=digest))
    with tempfile.TemporaryDirectory(prefix="slmops-verify-") as folder, ProgressReporter(session) as progress:
        await write_layout(package, Path(folder), progress.bytes_done, session.verify)
        return await asyncio.to_thread(verify_folder, Path(folder), key, digest)


async def _copy_and_verify(reference: PackageAddress, key: Path, digest: Digest | None, tls_verify: bool) -> Verified:
    with tempfile.TemporaryDirectory(prefix="slmops-verify-") as folder:
        found = await copy_from_registry(reference, Path(folder), key, digest, tls_verify=tls_verify)
        return await asyncio.to_thread(verify_folder, Path(folder), key, found)


def _parse_digest(text: str) -> Digest:
    try:
        return _DIGEST.validate_python(text)
    except ValidationError as error:
        raise InvalidMessage(f"{text!r} is not a digest", fix="Write sha256: and 64 hexadecimal digits.") from error

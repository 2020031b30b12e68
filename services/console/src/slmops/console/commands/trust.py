"""`slmops trust`: the key ceremony, key rotation, revocation and signing, in a folder.

The commands do not connect to a service. The packager publishes completed metadata from `metadata/`; keyholders pass
on the rest. `tuf` is imported only when one of these commands runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel
from rich.console import RenderableType

from slmops.console import settings
from slmops.console.commands import trust_client
from slmops.console.render.tables import Column, cell, table
from slmops.console.session import Session, command
from slmops.kit.clock import utc_now

if TYPE_CHECKING:
    from slmops.kit.trust.ceremony import Keys
    from slmops.kit.trust.folder import Changes, Folder
    from slmops.kit.trust.overview import RoleView, TrustView

app = typer.Typer(name="trust", help="Manage the keys that sign packages and plans.", no_args_is_help=True)
app.add_typer(trust_client.app)

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--folder", help="Folder of the key ceremony. Default: keys/tuf of the data folder.", show_default=False
    ),
]
KeyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--key", help="A keyholder's key file; may be repeated. Default: those in offline/.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]


class Done(BaseModel):
    """The changes of a command. With `dry_run`, they were not made."""

    dry_run: bool
    folder: Path
    changes: tuple[str, ...]


@command(app, "ceremony", "slmops trust ceremony --folder ./trust", "slmops trust ceremony --folder ./trust --dry-run")
async def ceremony(
    session: Session,
    folder: FolderOption = None,
    keys: Annotated[int, typer.Option(help="Number of keyholders of root, and of targets.")] = 3,
    threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 2,
    dry_run: DryRun = False,
) -> None:
    """Make the keys, the first root and the first targets. Then give each key in offline/ to a different keyholder."""
    from slmops.kit.trust import ceremony as engine

    where = _folder(session, folder)
    _finish(session, where, engine.ceremony(where, utc_now(), keys=keys, threshold=threshold), dry_run)


@command(app, "rotate", "slmops trust rotate timestamp", "slmops trust rotate root --keep-keys --dry-run")
async def rotate(
    session: Session,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, packages or rollout.")],
    folder: FolderOption = None,
    key: KeyOption = None,
    keys: Annotated[int, typer.Option(help="New number of keyholders; 0 keeps the number.")] = 0,
    keep_keys: Annotated[bool, typer.Option("--keep-keys", help="Only renew the expiry date.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Make new keys for a role. Metadata that still needs signatures waits in pending/ for `slmops trust sign`."""
    from slmops.kit.trust import ceremony as engine

    def work(where: Folder, holders: Keys) -> Changes:
        return engine.rotate(where, role, holders, utc_now(), keep_keys=keep_keys, keys=keys)

    _edit(session, folder, key, work, dry_run)


@command(app, "revoke", "slmops trust revoke smollm2:1.0.0 --dry-run", "slmops trust revoke 1a2b3c4d")
async def revoke(
    session: Session,
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="MODEL, MODEL:VERSION, or the first characters of a key id.")
    ],
    folder: FolderOption = None,
    key: KeyOption = None,
    dry_run: DryRun = False,
) -> None:
    """Revoke a model, one of its versions, or a key. The packager's signatures cannot undo a revocation."""
    from slmops.kit.trust import ceremony as engine

    _edit(session, folder, key, lambda where, holders: engine.revoke(where, what, holders, utc_now()), dry_run)


@command(app, "sign", "slmops trust sign --key /media/stick/root-1a2b3c4d.pem")
async def sign(session: Session, folder: FolderOption = None, key: KeyOption = None, dry_run: DryRun = False) -> None:
    """Add a keyholder's signature to pending metadata. It takes effect when it has all required signatures."""
    from slmops.kit.trust import ceremony as engine

    _edit(session, folder, key, engine.sign, dry_run)


@command(app, "lock", "slmops trust lock /media/stick/root-1a2b3c4d.pem")
async def lock(
    session: Session, key: Annotated[Path, typer.Argument(metavar="KEY", help="A keyholder's key file.")]
) -> None:
    """Lock a key file with a passphrase, or change its passphrase. Signing with the key then asks for the passphrase.

    Only for keyholders' keys. The unlocked file is replaced, but copies of it and traces on the storage medium remain.
    """
    from slmops.kit.trust.folder import Changes
    from slmops.kit.trust.keys import locked, read_key

    signer = read_key(key, passphrase)
    new = typer.prompt(f"New passphrase of {key.name}", hide_input=True, confirmation_prompt=True, err=True)
    changes = Changes(lines=[f"{key.name}: locked"], write={key: locked(signer, new.encode())})
    changes.apply()
    session.show(Done(dry_run=False, folder=key.parent, changes=tuple(changes.lines)), cell(changes.lines[0]))


@command(app, "show", "slmops trust show", "slmops trust show --folder ./trust --json")
async def show(session: Session, folder: FolderOption = None) -> None:
    """Show roles, keys, expiry dates, revocations, and metadata that waits for signatures."""
    from slmops.kit.trust.overview import overview

    view = overview(_folder(session, folder), utc_now())
    session.show(view, _roles(view, session.out.width))
    for text in view.warnings:
        session.remark(f"Warning: {text}")
    session.remark(f"Plans are signed by: {_short(view.rollout_keys)}")
    if view.revoked:
        session.remark(f"Revoked: {', '.join(view.revoked)}")
    for draft in view.waiting:
        lacks = f"signatures by {draft.missing} of {_short(draft.keys)}" if draft.missing else "the other files"
        session.remark(f"{draft.role} {draft.version} waits for {lacks}")


def _roles(view: TrustView, width: int) -> RenderableType:
    columns: list[Column[RoleView]] = [
        Column("role", lambda r: r.role),
        Column("version", lambda r: str(r.version) if r.version else "the packager's", right=True),
        Column("until", lambda r: f"{r.expires:%Y-%m-%d}" if r.expires else "-"),
        Column("state", lambda r: r.validity or "-"),
        Column("needs", lambda r: f"{r.threshold} of {len(r.keys)}"),
        Column("keys", lambda r: cell(_short(r.keys)), fold=True),
    ]
    return table(view.roles, columns, width)


def _short(keys: tuple[str, ...]) -> str:
    return " ".join(keyid[:8] for keyid in keys)


def passphrase(key: Path) -> bytes:
    """Asks for the passphrase at the terminal, or reads it from standard input, one line for each locked key."""
    asked: str = typer.prompt(f"Passphrase of {key.name}", hide_input=True, err=True)
    return asked.encode()


def _folder(session: Session, folder: Path | None) -> Folder:
    from slmops.kit.trust.folder import Folder

    return Folder(folder or (session.settings.data or settings.DEFAULT_DATA) / "keys" / "tuf")


def _edit(
    session: Session,
    folder: Path | None,
    key: list[Path] | None,
    work: Callable[[Folder, Keys], Changes],
    dry_run: bool,
) -> None:
    from slmops.kit.trust.keys import read_keys

    where = _folder(session, folder)
    holders = read_keys(key or where.offline.glob("*.pem"), passphrase)
    _finish(session, where, work(where, holders), dry_run)


def _finish(session: Session, folder: Folder, changes: Changes, dry_run: bool) -> None:
    if not dry_run:
        changes.apply()
    done = Done(dry_run=dry_run, folder=folder.root, changes=tuple(changes.lines))
    session.show(done, cell("\n".join(changes.lines)))
    if dry_run:
        session.remark("Dry run: nothing was changed. New keys shown here were not stored.")

"""`slmops delta`: from one version's files to another's in few bytes, made and applied by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.table import Table

from slmops.console.render.progress import Teller
from slmops.console.render.tables import size
from slmops.console.session import Session, command
from slmops.contracts.errors import Denied, InvalidMessage, NotFound

if TYPE_CHECKING:
    from slmops.kit.delta import DeltaFile, Stat

app = typer.Typer(name="delta", help="The difference of two versions, by tensor and bit-exact.", no_args_is_help=True)
R = TypeVar("R")
Base = Annotated[Path, typer.Argument(metavar="BASE", help="A model file, or a folder: what is there already.")]


class Applied(BaseModel):
    """The files that lie there now, verified."""

    files: tuple[Path, ...]
    target_bytes: int
    seconds: float


@command(app, "make", "slmops delta make ./1.0.0 ./1.0.1 --out 1.0.1.delta")
async def make_(
    session: Session,
    base: Base,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The same of what shall be there.")],
    out: Annotated[Path, typer.Option(help="The delta; what is there is replaced.")],
) -> None:
    """Make the delta from BASE to TARGET. Whatever they are, there is one: at worst a compressed copy."""
    from slmops.kit.delta import make  # it brings numpy: only these commands wait for it

    _check(base)
    _check(target)
    with Teller(session) as teller:
        teller.status("reading both")
        stat = await _guarded(make, base, target, out, lambda done, of: teller.bytes_done("comparing", done, of))
    session.show(stat, _table(stat))


@command(app, "apply", "slmops delta apply 1.0.1.delta ./1.0.0 --to ./1.0.1")
async def apply_(
    session: Session,
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="What `slmops delta make` wrote.")],
    base: Base,
    to: Annotated[Path, typer.Option(help="Folder for the target's files. One that is there already is kept.")],
) -> None:
    """Make the target from DELTA and BASE. A file appears when it has the target's digest, or not at all."""
    from slmops.kit.delta import apply, by_digest

    _check(base)
    _check(delta)
    start = time.perf_counter()
    with Teller(session) as teller:
        teller.status("reading the base")
        bases = await _guarded(by_digest, base)
        files = await _guarded(
            apply, delta, bases, lambda file: to / file.path, lambda done, of: teller.bytes_done("making", done, of)
        )
    made = sum(path.stat().st_size for path in files)
    done = Applied(files=tuple(files), target_bytes=made, seconds=round(time.perf_counter() - start, 2))
    session.show(done, f"{len(files)} files, {size(made)}, verified, in {to}")


@command(app, "stat", "slmops delta stat 1.0.1.delta", "slmops delta stat 1.0.1.delta --json")
async def stat(
    session: Session, delta: Annotated[Path, typer.Argument(metavar="DELTA", help="What `slmops delta make` wrote.")]
) -> None:
    """What a delta holds: its two sides, and how many bytes each coding takes."""
    from slmops.kit.delta import describe

    found = await _guarded(describe, delta)
    session.show(found, _table(found))


def _check(path: Path) -> None:
    if not path.exists():
        raise NotFound("there is no such file or folder", where=str(path), fix="Check the path.")
    if path.is_dir() and not any(found.is_file() for found in path.rglob("*")):
        raise InvalidMessage("the folder holds no file", where=str(path))


async def _guarded(work: Callable[..., R], *arguments: object) -> R:
    try:
        return await asyncio.to_thread(work, *arguments)
    except OSError as error:
        raise Denied(f"a file cannot be read or written: {error.strerror}", where=str(error.filename)) from error


def _table(stat: Stat) -> Table:
    share = stat.size_bytes / stat.target_bytes if stat.target_bytes else 0
    table = Table(title=f"{size(stat.size_bytes)} for {size(stat.target_bytes)} ({share:.2%})", title_justify="left")
    table.caption = f"from {_side(stat.base)}\nto {_side(stat.target)}"
    for column in ("coding", "records", "delta bytes", "target bytes"):
        table.add_column(column, justify="left" if column == "coding" else "right")
    for name, one in stat.codings.items():
        table.add_row(name, f"{one.records:,}", f"{one.delta_bytes:,}", f"{one.target_bytes:,}")
    return table


def _side(files: tuple[DeltaFile, ...]) -> str:
    largest = max(files, key=lambda file: file.size_bytes, default=None)
    return f"{len(files)} files; {largest.path} is {largest.digest}" if largest else "nothing"

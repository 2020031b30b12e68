"""`slmops delta`: makes and applies the delta between the files of two versions by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.table import Table

from slmops.console.render.progress import ProgressReporter
from slmops.console.render.tables import size
from slmops.console.session import Session, command
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import Denied, InvalidDelta, InvalidMessage, NotFound

if TYPE_CHECKING:
    from slmops.kit.delta import DeltaFile, Stat

app = typer.Typer(
    name="delta", help="Make and apply bit-exact deltas between two versions, by tensor.", no_args_is_help=True
)
R = TypeVar("R")
_SMALLEST_LIMIT_BYTES = 64 << 20
Base = Annotated[Path, typer.Argument(metavar="BASE", help="A model file or folder to start from.")]


class Applied(BaseModel):
    """The verified files that a delta made."""

    files: tuple[Path, ...]
    target_bytes: int
    seconds: float


@command(app, "make", "slmops delta make ./1.0.0 ./1.0.1 --out 1.0.1.delta")
async def make_(
    session: Session,
    base: Base,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A model file or folder to be made from BASE.")],
    out: Annotated[Path, typer.Option(help="File for the delta; an existing file is replaced.")],
) -> None:
    """Make the delta from BASE to TARGET. For unrelated files it is a compressed copy of TARGET."""
    from slmops.kit.delta import make  # imports numpy, so only in these commands

    _check(base)
    _check(target)
    with ProgressReporter(session) as progress:
        progress.status("reading base and target")
        stat = await _run_in_thread(
            make, base, target, out, lambda done, of: progress.bytes_done("comparing", done, of)
        )
    session.show(stat, _table(stat))


@command(
    app,
    "apply",
    "slmops delta apply 1.0.1.delta ./1.0.0 --to ./1.0.1",
    "slmops delta apply 1.0.1.delta ./1.0.0 --to ./1.0.1 --signed ./package-1.0.1 --key trusted.pem",
)
async def apply_(
    session: Session,
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A file written by `slmops delta make`.")],
    base: Base,
    to: Annotated[
        Path,
        typer.Option(
            help="Folder for the target's files. A file that exists there is kept if it is correct, otherwise replaced."
        ),
    ],
    signed: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with the target's manifest.json and model.sig: only what they name is made, in its size.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="The trusted public key, for --signed.", show_default=False),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The most that it may make. Default: the signed size, otherwise twice that of BASE or 64 MiB.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the target from DELTA and BASE. A file appears only if it has the target's digest.

    A delta is not signed, and a small one can make a large target. So the result is limited before anything is written.
    """
    from slmops.kit.delta import apply, by_digest

    _check(base)
    _check(delta)
    start = time.perf_counter()
    with ProgressReporter(session) as progress:
        progress.status("reading the base")
        bases = await _run_in_thread(by_digest, base)
        target = await _run_in_thread(_target, to, signed, key)
        limit = _limit(target, bases) if max_bytes is None else max_bytes
        on_progress = lambda done, of: progress.bytes_done("making", done, of)  # noqa: E731
        work = partial(apply, limit_bytes=limit)
        files = await _run_in_thread(work, delta, bases, target.place, on_progress)
    made = sum(path.stat().st_size for path in files)
    done = Applied(files=tuple(files), target_bytes=made, seconds=round(time.perf_counter() - start, 2))
    session.show(done, f"{len(files)} files, {size(made)}, verified, in {to}")


@command(app, "stat", "slmops delta stat 1.0.1.delta", "slmops delta stat 1.0.1.delta --json")
async def stat(
    session: Session,
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A file written by `slmops delta make`.")],
) -> None:
    """Show the content of a delta: base, target, and the bytes that each coding takes."""
    from slmops.kit.delta import describe

    found = await _run_in_thread(describe, delta)
    session.show(found, _table(found))


@dataclass(frozen=True)
class _Target:
    """Where the target's files go. `layers` are the signed ones; None: everything that the delta declares."""

    folder: Path
    layers: Mapping[str, Descriptor] | None = None

    def place(self, file: DeltaFile) -> Path:
        if self.layers is None:
            return self.folder / file.path
        path = next((path for path, layer in self.layers.items() if layer.digest == file.digest), None)
        if path is None or self.layers[path].size != file.size_bytes:
            raise InvalidDelta(f"the delta makes {file.path}, which is not a file of the signed package in its size")
        return self.folder / path


def _target(to: Path, signed: Path | None, key: Path | None) -> _Target:
    """Raises `InvalidMessage` without a key, and what `signed_layers` raises."""
    if signed is None:
        return _Target(to)
    if key is None:
        raise InvalidMessage("--signed needs the trusted public key", fix="Add --key PEM.")
    from slmops.kit.package import signed_layers  # imports the signature's verification

    return _Target(to, signed_layers(signed, key))


def _limit(target: _Target, bases: Mapping[Digest, Path]) -> int:
    """Returns the default of `--max-bytes`: versions of a model have about the same size."""
    if target.layers is not None:
        return sum(layer.size for layer in target.layers.values())
    return max(2 * sum(path.stat().st_size for path in bases.values()), _SMALLEST_LIMIT_BYTES)


def _check(path: Path) -> None:
    if not path.exists():
        raise NotFound("there is no such file or folder", where=str(path), fix="Check the path.")
    if path.is_dir() and not any(found.is_file() for found in path.rglob("*")):
        raise InvalidMessage("the folder contains no files", where=str(path))


async def _run_in_thread(work: Callable[..., R], *arguments: object) -> R:
    try:
        return await asyncio.to_thread(work, *arguments)
    except OSError as error:
        raise Denied(f"cannot read or write a file: {error.strerror}", where=str(error.filename)) from error


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

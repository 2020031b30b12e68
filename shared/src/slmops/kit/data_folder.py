"""The version of a data folder's layout: newer folders are refused, older ones are migrated.

`layout.json` in the folder says what the folder is and which version its layout has. A folder without the file is of
version 1, the layout of release 0.1, which wrote none. Databases have revisions of their own (`slmops.kit.migrations`).

Invariant: a folder that is refused is left as it was. Nothing is written to it, and nothing is removed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.contracts.errors import Denied, DiskFull, IncompatibleFolder
from slmops.kit.atomic_write import atomic_write

log = logging.getLogger(__name__)
LAYOUT_FILE: Final = "layout.json"
Migration = Callable[[Path], None]
"""Leads a folder to the next version. It may be repeated after a crash, so it may find its work done."""


class Stamp(BaseModel):
    """The content of `layout.json`. `release` wrote it, for people."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str
    version: int = Field(ge=1)
    release: str = ""


@dataclass(frozen=True)
class FolderLayout:
    """A kind of data folder. `migrations` lead from version 1 to 2, from 2 to 3 and so on.

    A folder without `layout.json` that contains none of `marks` is new and gets the newest version.
    """

    kind: str
    marks: tuple[str, ...]
    migrations: Sequence[Migration] = ()

    @property
    def newest(self) -> int:
        return 1 + len(self.migrations)

    def check(self, folder: Path) -> int:
        """Returns the version of a folder, which may not exist yet; writes nothing. Raises `IncompatibleFolder`."""
        stamp = _read(folder / LAYOUT_FILE)
        if stamp is None:
            return 1 if any((folder / mark).exists() for mark in self.marks) else self.newest
        if stamp.kind != self.kind:
            raise IncompatibleFolder(
                f"this is the data folder of {stamp.kind}, not of {self.kind}",
                where=str(folder),
                fix="Use another folder.",
            )
        if stamp.version > self.newest:
            raise IncompatibleFolder(
                f"the data folder has version {stamp.version} of its layout, written by release "
                f"{stamp.release or 'unknown'}; this release knows versions up to {self.newest}",
                where=str(folder),
                fix="Start the newer release, or use a backup of the folder from before the upgrade.",
            )
        return stamp.version

    def migrate(self, folder: Path) -> None:
        """Brings an existing folder to the newest version, which no other process may use meanwhile.

        Each step is recorded when it is complete, so a start that is killed repeats at most one. Raises
        `IncompatibleFolder`, `DiskFull`, and what a migration raises.
        """
        found = self.check(folder)
        for number in range(found, self.newest):
            self.migrations[number - 1](folder)
            self._stamp(folder, number + 1)
            log.info("%s: the layout was migrated from version %d to %d", folder, number, number + 1)
        if not (folder / LAYOUT_FILE).exists():
            self._stamp(folder, self.newest)

    def _stamp(self, folder: Path, number: int) -> None:
        stamp = Stamp(kind=self.kind, version=number, release=version("slmops-shared"))
        try:
            with atomic_write(folder / LAYOUT_FILE) as out:
                os.fchmod(out.fileno(), 0o600)
                out.write(stamp.model_dump_json(indent=2).encode() + b"\n")
        except OSError as error:
            raise DiskFull(
                f"cannot write the layout's version: {error.strerror}", where=str(folder), fix="Free disk space."
            ) from error


def _read(path: Path) -> Stamp | None:
    try:
        return Stamp.model_validate(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise Denied("no permission to read the data folder", where=str(path), fix="Check its owner.") from error
    except (OSError, ValueError, ValidationError) as error:
        raise IncompatibleFolder(
            "the file with the layout's version cannot be read",
            where=str(path),
            fix="Restore it from a backup. If the folder was never used by a newer release, remove the file.",
        ) from error

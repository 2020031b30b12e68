"""The offline half of a repository as a folder: the ceremony's keys and the metadata that keyholders signed.

metadata/     1.root.json 1.targets.json …   complete and public: the packager reads them here
pending/      2.root.json …                  waits for signatures
offline/      root-1a2b3c4d.pem …            one key per keyholder: move each to another place
online/       snapshot-….pem timestamp-….pem packages-….pem    for the packager
rollout/      plan.pem                       for the rollout service
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError

from slmops.contracts.errors import Denied, InvalidMessage, NotFound
from slmops.contracts.tuf_names import REVOKED_ROLE

OFFLINE_ROLES: Final = ("root", "targets", REVOKED_ROLE)
_NAME = re.compile(r"^([1-9]\d*)\.(root|targets|revoked)\.json$")


def read_root(path: Path) -> bytes:
    """Reads a root of trust, which says who may sign what. Raises `NotFound`, `InvalidMessage` for another file."""
    try:
        data = path.read_bytes()
        Metadata[Root].from_bytes(data).verify_delegate(Root.type, Metadata[Root].from_bytes(data))
    except OSError as error:
        raise NotFound(f"the root of trust cannot be read: {error.strerror}", where=str(path)) from error
    except (DeserializationError, RepositoryError, AttributeError) as error:
        fix = "Use metadata/1.root.json of the ceremony."
        raise InvalidMessage("the file is not a root of trust", where=str(path), fix=fix) from error
    return data


@dataclass
class Changes:
    """The changes of a command: `lines` describe them, `apply` makes them. The files in `remove` were moved."""

    lines: list[str] = field(default_factory=list)
    write: dict[Path, bytes] = field(default_factory=dict)
    remove: list[Path] = field(default_factory=list)

    def apply(self) -> None:
        """Writes and removes the files. Raises `Denied`."""
        for path, data in self.write.items():
            _write(path, data)
        for path in self.remove:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Folder:
    root: Path

    @property
    def metadata(self) -> Path:
        return self.root / "metadata"

    @property
    def pending(self) -> Path:
        return self.root / "pending"

    @property
    def offline(self) -> Path:
        return self.root / "offline"

    @property
    def online(self) -> Path:
        return self.root / "online"

    @property
    def rollout(self) -> Path:
        return self.root / "rollout"

    @property
    def first_root(self) -> Path:
        """The root of trust that gateways receive out of band."""
        return self.metadata / "1.root.json"

    @property
    def plan_key(self) -> Path:
        """The key with which the rollout service signs plans."""
        return self.rollout / "plan.pem"

    def check(self) -> None:
        """Raises `NotFound` if no ceremony was held in this folder."""
        if not self.first_root.exists():
            raise NotFound(
                "no key ceremony was held in this folder",
                where=str(self.root),
                fix="Hold it: slmops trust ceremony --folder FOLDER.",
            )

    def newest(self, role: str) -> Metadata[Any] | None:
        """Returns an offline role's newest complete metadata; None if there is none. Raises `InvalidMessage`."""
        versions = numbered(self.metadata).get(role, {})
        return parse(versions[max(versions)]) if versions else None

    def draft(self, role: str) -> Metadata[Any] | None:
        """Returns the pending metadata of a role, or None. Raises `InvalidMessage`."""
        versions = numbered(self.pending).get(role, {})
        return parse(versions[max(versions)]) if versions else None


def numbered(folder: Path) -> dict[str, dict[int, Path]]:
    """Returns role → version → file. Ignores other files."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if name := _NAME.match(path.name):
            found.setdefault(name[2], {})[int(name[1])] = path
    return found


def parse(path: Path) -> Metadata[Any]:
    """Parses metadata. Raises `InvalidMessage`."""
    try:
        return Metadata.from_bytes(path.read_bytes())
    except (DeserializationError, OSError) as error:
        raise InvalidMessage("the metadata cannot be read", where=str(path)) from error


def file_name(role: str, version: int) -> str:
    return f"{version}.{role}.json"


def _write(path: Path, data: bytes) -> None:
    """Writes a file atomically. From the start only its owner can read it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Denied(f"the file cannot be written: {error.strerror}", where=str(path)) from error

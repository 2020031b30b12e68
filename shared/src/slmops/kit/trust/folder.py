"""The offline half of a repository as a folder: what the ceremony made and its keyholders signed.

metadata/     1.root.json 1.targets.json …   complete, public: the packager reads them here
pending/      2.root.json …                  waits for signatures
offline/      root-1a2b3c4d.pem …            one keyholder each: take them apart, out of here
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
from slmops.contracts.trust import REVOKED_ROLE

OFFLINE_ROLES: Final = ("root", "targets", REVOKED_ROLE)
_NAME = re.compile(r"^([1-9]\d*)\.(root|targets|revoked)\.json$")


def read_root(path: Path) -> bytes:
    """A file that says who may sign what. Raises `NotFound`, `InvalidMessage` when it is another one."""
    try:
        data = path.read_bytes()
        Metadata[Root].from_bytes(data).verify_delegate(Root.type, Metadata[Root].from_bytes(data))
    except OSError as error:
        raise NotFound(f"the root of trust cannot be read: {error.strerror}", where=str(path)) from error
    except (DeserializationError, RepositoryError, AttributeError) as error:
        fix = "Give metadata/1.root.json of the ceremony."
        raise InvalidMessage("this is no root of trust", where=str(path), fix=fix) from error
    return data


@dataclass
class Changes:
    """What a command would do: said first, then done. `remove` are files whose content moved elsewhere."""

    lines: list[str] = field(default_factory=list)
    write: dict[Path, bytes] = field(default_factory=dict)
    remove: list[Path] = field(default_factory=list)

    def apply(self) -> None:
        """Raises `Denied`."""
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
        """What gateways are given as the root of their trust."""
        return self.metadata / "1.root.json"

    @property
    def plan_key(self) -> Path:
        """With what the rollout service signs."""
        return self.rollout / "plan.pem"

    def check(self) -> None:
        """Raises `NotFound` when no ceremony was held here."""
        if not self.first_root.exists():
            raise NotFound(
                "there was no key ceremony in this folder",
                where=str(self.root),
                fix="Hold it: slmops trust ceremony --folder FOLDER.",
            )

    def newest(self, role: str) -> Metadata[Any] | None:
        """The complete metadata of an offline role; None before its first. Raises `InvalidMessage`."""
        versions = numbered(self.metadata).get(role, {})
        return parse(versions[max(versions)]) if versions else None

    def draft(self, role: str) -> Metadata[Any] | None:
        """What waits for signatures."""
        versions = numbered(self.pending).get(role, {})
        return parse(versions[max(versions)]) if versions else None


def numbered(folder: Path) -> dict[str, dict[int, Path]]:
    """Role → version → file. Other files are overlooked."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if name := _NAME.match(path.name):
            found.setdefault(name[2], {})[int(name[1])] = path
    return found


def parse(path: Path) -> Metadata[Any]:
    """Raises `InvalidMessage`."""
    try:
        return Metadata.from_bytes(path.read_bytes())
    except (DeserializationError, OSError) as error:
        raise InvalidMessage("this metadata cannot be read", where=str(path)) from error


def file_name(role: str, version: int) -> str:
    return f"{version}.{role}.json"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and for its owner only from the first moment."""
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
        raise Denied(f"cannot write: {error.strerror}", where=str(path)) from error

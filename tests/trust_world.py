"""A real TUF repository in memory, made as packager and keyholders do, and a mirror that can return forged files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata
from tuf.ngclient import FetcherInterface

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.manifest import OCI_MANIFEST
from slmops.contracts.tuf_names import package_target
from slmops.kit.trust.ceremony import ceremony
from slmops.kit.trust.client import TrustedState
from slmops.kit.trust.folder import Folder, numbered
from slmops.kit.trust.keys import read_keys
from slmops.packager.repository import Offline, Repository


@dataclass
class Memory:
    """`repository.Files` as dictionaries."""

    files: dict[tuple[str, int], bytes] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)

    def newest(self, role: str) -> bytes | None:
        versions = [version for name, version in self.files if name == role]
        return self.files[role, max(versions)] if versions else None

    def put(self, role: str, version: int, data: bytes) -> None:
        self.files[role, version] = data

    def model_key(self, model: str) -> bytes | None:
        return self.keys.get(model)

    def put_model_key(self, model: str, pem: bytes) -> None:
        self.keys[model] = pem


@dataclass
class Mirror(FetcherInterface):
    """Returns the files of `serves`, except for the names in `overrides`, whose content may be an iterator."""

    serves: Callable[[str], bytes | None]
    overrides: dict[str, Any] = field(default_factory=dict)

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        data = self.overrides[name] if name in self.overrides else self.serves(name)
        if data is None:
            raise DownloadHTTPError("no such file", 404)
        return iter([data]) if isinstance(data, bytes) else data


class TrustWorld:
    def __init__(self, root: Path, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)
        self.folder, self.memory = Folder(root / "tuf"), Memory()
        if not self.folder.first_root.exists():
            ceremony(self.folder, self.now).apply()
        self.adopt()
        self.mirror = Mirror(self.file)
        self.client = TrustedState(root / "client", self.folder.first_root)

    def holders(self, *roles: str) -> dict[str, CryptoSigner]:
        found = [path for role in roles or ("*",) for path in self.folder.offline.glob(f"{role}-*.pem")]
        return read_keys(found)

    def repository(self, now: datetime | None = None) -> Repository:
        return Repository(self.memory, read_keys(self.folder.online.glob("*.pem")), now or self.now)

    def adopt(self) -> None:
        """Takes over the files that keyholders signed, as the packager does."""
        files = numbered(self.folder.metadata)
        newest = {role: found[max(found)].read_bytes() for role, found in files.items()}
        roots = {version: path.read_bytes() for version, path in files["root"].items()}
        repository = self.repository()
        repository.adopt(Offline(roots, newest["targets"], newest.get("revoked")))
        repository.settle()

    def publish(self, model: str = "smollm2", version: str = "1.0.0", content: bytes = b"manifest") -> str:
        """Publishes a package and returns the path of its target."""
        manifest = Descriptor.of(content, OCI_MANIFEST)
        repository = self.repository()
        repository.add(model, version, "edge-small", manifest)
        repository.settle()
        return package_target(model, version, manifest.digest)

    def age(self, by: timedelta) -> None:
        """Replaces every online file by one that was made `by` ago."""
        repository = self.repository(self.now - by)
        repository._is_current = lambda *_: False  # type: ignore[method-assign]
        repository.settle()

    def file(self, name: str) -> bytes | None:
        version, _, role = name.removesuffix(".json").rpartition(".")
        return self.memory.files.get((role, int(version))) if version else self.memory.newest(role)

    def version(self, role: str) -> int:
        return max(version for name, version in self.memory.files if name == role)

    def sign_as(self, role: str, edit: Callable[[dict[str, Any]], None], *signers: CryptoSigner) -> bytes:
        """Returns the newest file of a role, edited and signed by the attacker's keys, with the same version."""
        document = json.loads(self.memory.newest(role) or b"")
        edit(document["signed"])
        metadata: Metadata[Any] = Metadata.from_dict(document)
        metadata.signatures.clear()
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def online(self, role: str) -> CryptoSigner:
        [signer] = read_keys(self.folder.online.glob(f"{role}-*.pem")).values()
        return signer


def everything_below(folder: Path) -> dict[str, bytes]:
    """Returns path → content, following links."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

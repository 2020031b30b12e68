"""The online half of the TUF repository: lists the installable packages and keeps the metadata fresh.

    root, targets, revoked    offline: taken over as the keyholders signed them, never changed here
    packages                  ours: delegates to one role per model, each with its own key
    model-<name>              ours: the packages of one model and nothing else
    snapshot, timestamp       ours: which versions belong together, and which snapshot is the newest

An edit reads metadata from `Files` and writes it back in dependency order: a file is written after the files that it
names. If `Files` is one transaction, a reader sees the whole edit or nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from slmops.contracts import freshness
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.errors import InvalidMessage, NotReady
from slmops.contracts.tuf_names import (
    METADATA_LIMIT_BYTES,
    PACKAGES_ROLE,
    REVOKED_ROLE,
    model_paths,
    model_role,
    package_target,
)
from slmops.kit.trust.keys import load_key, locked, new_key

T = TypeVar("T", Root, Targets, Snapshot, Timestamp)
VALID_FOR = {"timestamp": freshness.TIMESTAMP, "snapshot": freshness.SNAPSHOT}
"""Validity of our roles; `packages` and the models' roles use `freshness.DELEGATED`.

A file is signed again when half of its validity is over.
"""
_MODEL = "model-"


class Files(Protocol):
    """Storage for metadata by role and version, and for the encrypted private keys of models."""

    def newest(self, role: str) -> bytes | None: ...
    def put(self, role: str, version: int, data: bytes) -> None: ...
    def model_key(self, model: str) -> bytes | None: ...
    def put_model_key(self, model: str, pem: bytes) -> None: ...


@dataclass(frozen=True)
class Offline:
    """The metadata that keyholders signed: roots by version, the newest targets and revoked."""

    roots: Mapping[int, bytes]
    targets: bytes
    revoked: bytes | None = None


class Repository:
    """One edit of the repository at the time `now`; `keys` are the online keys by key id."""

    def __init__(self, files: Files, keys: Mapping[str, CryptoSigner], now: datetime) -> None:
        self._files = files
        self._keys = keys
        self._now = now
        self._known: dict[str, Metadata[Any]] = {}
        self._changed: dict[str, bytes] = {}

    # ---- the offline half ---------------------------------------------------------------------------------

    def adopt(self, offline: Offline) -> bool:
        """Takes over offline metadata that is newer than ours; returns whether anything was.

        Raises `InvalidMessage` for metadata that is not signed by its keys, `NotReady` when it names an online key that
        we do not have.
        """
        before = dict(self._changed)
        for version in sorted(offline.roots):
            self._adopt_root(version, offline.roots[version])
        self._adopt_targets("targets", offline.targets)
        if offline.revoked is not None:
            self._adopt_targets(REVOKED_ROLE, offline.revoked)
        root = self._get(Root, "root")
        _verify(root, "targets", self._get(Targets, "targets"))
        for role in VALID_FOR:
            self._signer(root, role)
        self._signer(self._get(Targets, "targets"), PACKAGES_ROLE)
        return self._changed != before

    def _adopt_root(self, version: int, data: bytes) -> None:
        current = self._find(Root, "root")
        if current is not None and version <= current.signed.version:
            return
        new, expected = _parse(Root, data, "root"), current.signed.version + 1 if current else version
        if new.signed.version != expected:
            raise InvalidMessage(
                f"the file holds root {new.signed.version}, expected root {expected}", where=f"{version}.root.json"
            )
        if current is not None:
            _verify(current, "root", new)
        _verify(new, "root", new)
        self._put("root", new, data)

    def _adopt_targets(self, role: str, data: bytes) -> None:
        current, new = self._find(Targets, role), _parse(Targets, data, role)
        if current is None or new.signed.version > current.signed.version:
            delegator = self._get(Root, "root") if role == "targets" else self._get(Targets, "targets")
            _verify(delegator, role, new)
            self._put(role, new, data)

    # ---- packages -----------------------------------------------------------------------------------------

    def add(self, model: str, version: str, profile: str, manifest: Descriptor) -> bool:
        """Adds a package to its model's role; returns False when it is there already."""
        role, path = model_role(model), package_target(model, version, manifest.digest)
        known = self._find(Targets, role)
        if known is not None and path in known.signed.targets:
            return False
        metadata = known or Metadata(Targets())
        hashes = {"sha256": manifest.digest.removeprefix("sha256:")}
        custom = {"custom": {"profile": profile}}
        metadata.signed.targets[path] = TargetFile(manifest.size, hashes, path, custom)
        self._sign(role, metadata, self._model_signer(model))
        return True

    def remove(self, model: str, version: str, manifest: Digest) -> bool:
        """Removes a package from its model's role; returns False when it is not there."""
        role, path = model_role(model), package_target(model, version, manifest)
        known = self._find(Targets, role)
        if known is None or known.signed.targets.pop(path, None) is None:
            return False
        self._sign(role, known, self._model_signer(model))
        return True

    def _model_signer(self, model: str) -> CryptoSigner:
        """Returns the model's own key. It is made on first use, and made again after the packages key changed."""
        role = model_role(model)
        packages = self._packages()
        delegated = (packages.signed.delegations.roles or {}).get(role) if packages.signed.delegations else None
        signer = self._kept_key(model)
        if signer is not None and delegated is not None and signer.public_key.keyid in delegated.keyids:
            return signer
        signer = new_key()
        self._files.put_model_key(model, locked(signer, self._password()))
        self._delegate(packages, model, signer)
        return signer

    def _kept_key(self, model: str) -> CryptoSigner | None:
        pem = self._files.model_key(model)
        if pem is None:
            return None
        try:
            return load_key(pem, model_role(model), self._password())
        except InvalidMessage:  # encrypted under the previous packages key
            return None

    def _delegate(self, packages: Metadata[Targets], model: str, signer: CryptoSigner) -> None:
        role, key = model_role(model), signer.public_key
        delegations = packages.signed.delegations or Delegations({}, {})
        roles = dict(delegations.roles or {})
        roles[role] = DelegatedRole(role, [key.keyid], 1, True, paths=[model_paths(model)])
        wanted = {keyid for delegated in roles.values() for keyid in delegated.keyids}
        keys = {keyid: known for keyid, known in {**delegations.keys, key.keyid: key}.items() if keyid in wanted}
        packages.signed.delegations = Delegations(keys, roles)
        self._sign(PACKAGES_ROLE, packages, self._packages_signer())

    def _packages(self) -> Metadata[Targets]:
        return self._find(Targets, PACKAGES_ROLE) or Metadata(Targets(delegations=Delegations({}, {})))

    def _packages_signer(self) -> CryptoSigner:
        return self._signer(self._get(Targets, "targets"), PACKAGES_ROLE)

    def _password(self) -> bytes:
        """Returns the password of the models' keys in the database: the packages key, which can replace them anyway."""
        return self._packages_signer().private_bytes

    # ---- freshness ----------------------------------------------------------------------------------------

    def settle(self) -> bool:
        """Signs every file that lacks a valid signature or is past half of its validity, then snapshot and timestamp.

        Returns whether anything changed. Afterwards clients accept the repository.
        """
        self._settle_packages()
        for role in self._model_roles():
            self._settle_model(role)
        self._settle_snapshot()
        self._settle_timestamp()
        return bool(self._changed)

    def _settle_packages(self) -> None:
        packages = self._find(Targets, PACKAGES_ROLE)
        if packages is None or not self._is_current(self._get(Targets, "targets"), PACKAGES_ROLE, packages):
            self._sign(PACKAGES_ROLE, packages or self._packages(), self._packages_signer())

    def _settle_model(self, role: str) -> None:
        metadata, signer = self._get(Targets, role), self._model_signer(role.removeprefix(_MODEL))
        if not self._is_current(self._get(Targets, PACKAGES_ROLE), role, metadata):
            self._sign(role, metadata, signer)

    def _settle_snapshot(self) -> None:
        root, snapshot = self._get(Root, "root"), self._find(Snapshot, "snapshot")
        names = ["targets", PACKAGES_ROLE, *self._model_roles()]
        names += [REVOKED_ROLE] if self._find(Targets, REVOKED_ROLE) else []
        old = snapshot.signed.meta if snapshot else {}
        meta = {f"{name}.json": self._meta(name, old.get(f"{name}.json")) for name in names}
        if snapshot is None or old != meta or not self._is_current(root, "snapshot", snapshot):
            new = snapshot or Metadata(Snapshot())
            new.signed.meta = meta
            self._sign("snapshot", new, self._signer(root, "snapshot"))

    def _settle_timestamp(self) -> None:
        root, timestamp = self._get(Root, "root"), self._find(Timestamp, "timestamp")
        old = timestamp.signed.snapshot_meta if timestamp else None
        meta = self._meta("snapshot", old)
        if timestamp is None or old != meta or not self._is_current(root, "timestamp", timestamp):
            new = timestamp or Metadata(Timestamp())
            new.signed.snapshot_meta = meta
            self._sign("timestamp", new, self._signer(root, "timestamp"))

    def _meta(self, role: str, known: MetaFile | None) -> MetaFile:
        version = self._get(Targets, role).signed.version
        if known is not None and known.version == version:
            return known
        data = self._changed.get(role) or self._files.newest(role) or b""
        return MetaFile.from_data(version, data, ["sha256"])

    def _model_roles(self) -> list[str]:
        delegations = self._packages().signed.delegations
        return sorted(delegations.roles or {}) if delegations else []

    def _is_current(self, delegator: Metadata[Any], role: str, metadata: Metadata[Any]) -> bool:
        """Returns whether the metadata is signed by its keys and has more than half of its validity left."""
        valid_for = VALID_FOR.get(role, freshness.DELEGATED)
        if metadata.signed.is_expired(self._now + valid_for / 2):
            return False
        try:
            delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError):
            return False
        return True

    # ---- files --------------------------------------------------------------------------------------------

    def _sign(self, role: str, metadata: Metadata[Any], signer: CryptoSigner) -> None:
        if role in self._known and role not in self._changed:  # one edit raises the version once
            metadata.signed.version += 1
        metadata.signed.expires = (self._now + VALID_FOR.get(role, freshness.DELEGATED)).replace(microsecond=0)
        metadata.sign(signer)
        self._put(role, metadata, metadata.to_bytes())

    def _put(self, role: str, metadata: Metadata[Any], data: bytes) -> None:
        if len(data) > METADATA_LIMIT_BYTES:
            raise InvalidMessage(
                f"the metadata of {role} would have {len(data)} bytes; gateways read at most {METADATA_LIMIT_BYTES}",
                fix="Withdraw packages of this model that nobody needs: slmops package withdraw.",
            )
        self._files.put(role, metadata.signed.version, data)
        self._known[role] = metadata
        self._changed[role] = data

    def _find(self, kind: type[T], role: str) -> Metadata[T] | None:
        if role not in self._known:
            data = self._files.newest(role)
            if data is None:
                return None
            self._known[role] = _parse(kind, data, role)
        return self._known[role]

    def _get(self, kind: type[T], role: str) -> Metadata[T]:
        found = self._find(kind, role)
        if found is None:
            raise NotReady(
                f"the packager has no {role} metadata yet", fix="Hold the key ceremony: slmops trust ceremony."
            )
        return found

    def _signer(self, delegator: Metadata[Any], role: str) -> CryptoSigner:
        """Returns the key that `delegator` names for `role`. Raises `NotReady` when we do not have it."""
        for keyid in delegator.signed.get_delegated_role(role).keyids:
            if keyid in self._keys:
                return self._keys[keyid]
        raise NotReady(
            f"the packager does not have the key of {role}",
            fix="Copy its file from the folder online/ of the ceremony to SLMOPS_TRUST_KEYS.",
        )


def _parse(kind: type[T], data: bytes, role: str) -> Metadata[T]:
    """Parses a metadata file of one kind. Raises `InvalidMessage`."""
    try:
        metadata = Metadata[T].from_bytes(data)
    except (RepositoryError, ValueError) as error:
        raise InvalidMessage(f"the {role} metadata cannot be read", where=role) from error
    if not isinstance(metadata.signed, kind):
        raise InvalidMessage(f"the {role} metadata has type {metadata.signed.type}, not {kind.type}", where=role)
    return metadata


def _verify(delegator: Metadata[Any], role: str, metadata: Metadata[Any]) -> None:
    try:
        delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise InvalidMessage(f"{role} {metadata.signed.version} lacks valid signatures: {error}") from error

"""Keeps the TUF repository in the journal's database. A package is added in the transaction that publishes it.

Therefore a package is announced if and only if it is in the repository, a crash leaves the state before or after the
edit, and two packagers do not lose each other's packages: the journal lets one of them write at a time.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from sqlalchemy import Connection
from tuf.api.metadata import Metadata, Targets

from slmops.contracts.commands import DescribeTrust, FetchMetadata, MetadataFile, TrustStatus
from slmops.contracts.errors import InvalidMessage, NotFound, SlmopsError, TemporaryError
from slmops.contracts.events import PackagePublished
from slmops.contracts.tuf_names import METADATA_NAME_PATTERN, PACKAGES_ROLE, RolloutKeys
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.trust.ceremony import ONLINE_ROLES, rollout_file, rollout_keys
from slmops.kit.trust.expiry import ExpiryWatch
from slmops.kit.trust.folder import OFFLINE_ROLES, numbered
from slmops.kit.trust.keys import read_keys
from slmops.packager import store
from slmops.packager.repository import Offline, Repository

log = logging.getLogger("slmops.packager")
_KEPT_FOR = timedelta(days=1)  # replaced metadata stays this long, for clients that are reading it
_FILE = re.compile(METADATA_NAME_PATTERN)


class TufMetadata:
    """Edits and serves the TUF repository.

    `keys` is the folder with the online keys, `metadata` the folder with the files that keyholders signed. Both may
    change while we run: every edit reads them again.
    """

    def __init__(self, journal: Journal, keys: Path, metadata: Path, clock: Clock, renew_every: timedelta) -> None:
        self._journal = journal
        self._keys = keys
        self._metadata = metadata
        self._clock = clock
        self._renew_every = renew_every
        self._expiry = ExpiryWatch()

    async def open(self) -> None:
        """Takes over the ceremony's files and adds all published packages. Raises `InvalidMessage`, `NotReady`."""
        if await self._journal.read(lambda connection: store.metadata(connection, "root", None)) is None:
            await self._journal.transact(self._adopt)
        await self._refresh()

    async def run(self) -> None:
        """Keeps the metadata fresh and takes over newly signed offline metadata. Runs until cancelled."""
        while True:
            await asyncio.sleep(self._renew_every.total_seconds())
            try:
                await self._refresh()
            except TemporaryError as error:
                log.warning("could not read the trust metadata, will retry: %s", error)

    async def _refresh(self) -> None:
        """Runs each step in its own transaction: invalid offline metadata must not stop us from renewing ours."""
        for step in (self._adopt, self._renew):
            try:
                await self._journal.transact(step)
            except TemporaryError as error:
                log.warning("could not update the trust metadata, will retry: %s", error)
            except SlmopsError as error:
                log.error("could not update the trust metadata: %s", error)
        self._expiry.note(await self._journal.read(_expiries), self._clock())

    def add(self, unit: UnitOfWork, package: PackagePublished) -> None:
        """Lets gateways install the package, as soon as `unit` commits."""
        repository = self._repository(unit)
        repository.add(package.model, package.version, package.profile, package.manifest)
        repository.settle()

    def remove(self, unit: UnitOfWork, package: PackagePublished) -> None:
        """Stops gateways from installing the package, as soon as `unit` commits."""
        repository = self._repository(unit)
        repository.remove(package.model, package.version, package.manifest.digest)
        repository.settle()

    async def fetch(self, command: FetchMetadata) -> MetadataFile:
        """Answers with a metadata file. Raises `NotFound`."""
        data = await self.file(command.file)
        if data is None:
            raise NotFound("there is no such metadata file", where=command.file)
        return MetadataFile(file=command.file, content=base64.b64encode(data).decode())

    async def describe(self, _: DescribeTrust) -> TrustStatus:
        return TrustStatus(expires=await self._journal.read(_expiries))

    async def file(self, name: str) -> bytes | None:
        """Returns a metadata file by its name in a consistent snapshot, such as `3.root.json`; None if missing."""
        if not _FILE.fullmatch(name):
            return None
        version, _, role = name.removesuffix(".json").rpartition(".")
        return await self._journal.read(
            lambda connection: store.metadata(connection, role, int(version) if version else None)
        )

    async def rollout_keys(self) -> RolloutKeys:
        """Returns the keys that may sign plans, as published in the targets metadata."""
        data = await self._journal.read(lambda connection: store.metadata(connection, "targets", None))
        return rollout_keys(Metadata[Targets].from_bytes(data or b"").signed)

    async def rollout_file(self) -> bytes:
        """Returns the content of the target file that holds these keys."""
        return rollout_file(await self.rollout_keys())

    def _adopt(self, unit: UnitOfWork) -> None:
        repository = self._repository(unit)
        if repository.adopt(self._offline()):
            repository.settle()
            log.info("took over newly signed offline metadata")

    def _renew(self, unit: UnitOfWork) -> None:
        repository = self._repository(unit)
        for package in store.packages(unit.connection):
            repository.add(package.model, package.version, package.profile, package.manifest)
        if repository.settle():
            log.info("renewed the trust metadata")
        store.delete_replaced_metadata(unit.connection, self._clock() - _KEPT_FOR)

    def _repository(self, unit: UnitOfWork) -> Repository:
        return Repository(store.TrustFiles(unit.connection, self._clock()), self._online_keys(), self._clock())

    def _online_keys(self) -> dict[str, CryptoSigner]:
        return read_keys(_require_keys(self._keys.glob("*.pem"), self._keys))

    def _offline(self) -> Offline:
        files = numbered(self._metadata)
        roots, targets, revoked = (files.get(role, {}) for role in ("root", "targets", "revoked"))
        if not roots or not targets:
            raise _no_ceremony(self._metadata)
        return Offline(
            roots={version: path.read_bytes() for version, path in roots.items()},
            targets=targets[max(targets)].read_bytes(),
            revoked=revoked[max(revoked)].read_bytes() if revoked else None,
        )


def _expiries(connection: Connection) -> dict[str, datetime]:
    """Returns when the published metadata expires, by role."""
    roles = (*OFFLINE_ROLES, PACKAGES_ROLE, *ONLINE_ROLES)
    found = {role: data for role in roles if (data := store.metadata(connection, role, None)) is not None}
    return {role: Metadata.from_bytes(data).signed.expires for role, data in found.items()}


def _require_keys(paths: Iterable[Path], where: Path) -> list[Path]:
    found = list(paths)
    if not found:
        fix = "Point SLMOPS_TRUST_KEYS to the folder online/ of the ceremony."
        raise InvalidMessage("the folder has no online keys of the TUF repository", where=str(where), fix=fix)
    return found


def _no_ceremony(where: Path) -> InvalidMessage:
    return InvalidMessage(
        "the folder has no root and targets metadata",
        where=str(where),
        fix="Hold the key ceremony (slmops trust ceremony) and point SLMOPS_TRUST_METADATA to its folder metadata/.",
    )

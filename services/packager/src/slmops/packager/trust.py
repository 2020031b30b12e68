"""The TUF repository in the journal's database: every edit is one transaction, that of the package it is about.

So a package is announced if and only if gateways find it vouched for, a crash leaves the state before or the state
after, and two packagers do not lose each other's packages: the journal lets one of them write at a time.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Targets

from slmops.contracts.commands import FetchMetadata, MetadataFile
from slmops.contracts.errors import InvalidMessage, NotFound, SlmopsError, TemporaryError
from slmops.contracts.events import PackagePublished
from slmops.contracts.trust import METADATA_NAME_PATTERN, RolloutKeys
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.trust.ceremony import rollout_file, rollout_keys
from slmops.kit.trust.folder import numbered
from slmops.kit.trust.keys import read_keys
from slmops.packager import store
from slmops.packager.repository import Offline, Repository

log = logging.getLogger("slmops.packager")
_KEPT_FOR = timedelta(days=1)  # what a client is in the middle of reading stays there
_FILE = re.compile(METADATA_NAME_PATTERN)


class Trust:
    """`keys` is the folder with the online keys, `metadata` the one with what the keyholders signed. Both may change
    while we run: they are read anew with every edit."""

    def __init__(self, journal: Journal, keys: Path, metadata: Path, clock: Clock, renew_every: timedelta) -> None:
        self._journal = journal
        self._keys = keys
        self._metadata = metadata
        self._clock = clock
        self._renew_every = renew_every

    async def open(self) -> None:
        """Take over the ceremony, and vouch for whatever was published before. Raises `InvalidMessage`, `NotReady`."""
        if await self._journal.read(lambda connection: store.metadata(connection, "root", None)) is None:
            await self._journal.transact(self._adopt)
        await self._look()

    async def run(self) -> None:
        """Keep it fresh and take over what keyholders signed. Runs until cancelled."""
        while True:
            await asyncio.sleep(self._renew_every.total_seconds())
            await self._look()

    async def _look(self) -> None:
        """Each in a transaction of its own: what keyholders did wrong must not keep us from staying fresh."""
        for step in (self._adopt, self._renew):
            try:
                await self._journal.transact(step)
            except TemporaryError as error:
                log.warning("the trust metadata stays as it is for now: %s", error)
            except SlmopsError as error:
                log.error("the trust metadata stays as it is: %s", error)

    def vouch(self, unit: UnitOfWork, package: PackagePublished) -> None:
        """The package may be installed, as soon as `unit` commits."""
        repository = self._repository(unit)
        repository.add(package.model, package.version, package.profile, package.manifest)
        repository.settle()

    def disown(self, unit: UnitOfWork, package: PackagePublished) -> None:
        """The package may be installed no more, as soon as `unit` commits."""
        repository = self._repository(unit)
        repository.remove(package.model, package.version, package.manifest.digest)
        repository.settle()

    async def fetch(self, command: FetchMetadata) -> MetadataFile:
        """Raises `NotFound`."""
        data = await self.file(command.file)
        if data is None:
            raise NotFound("there is no such metadata", where=command.file)
        return MetadataFile(file=command.file, content=base64.b64encode(data).decode())

    async def file(self, name: str) -> bytes | None:
        """A metadata file by its name in a consistent snapshot."""
        if not _FILE.fullmatch(name):
            return None
        version, _, role = name.removesuffix(".json").rpartition(".")
        return await self._journal.read(
            lambda connection: store.metadata(connection, role, int(version) if version else None)
        )

    async def rollout_keys(self) -> RolloutKeys:
        """Who may sign plans, as gateways are told."""
        data = await self._journal.read(lambda connection: store.metadata(connection, "targets", None))
        return rollout_keys(Metadata[Targets].from_bytes(data or b"").signed)

    async def rollout_file(self) -> bytes:
        """The target that holds them."""
        return rollout_file(await self.rollout_keys())

    def _adopt(self, unit: UnitOfWork) -> None:
        repository = self._repository(unit)
        if repository.adopt(self._offline()):
            repository.settle()
            log.info("what the keyholders signed is taken over")

    def _renew(self, unit: UnitOfWork) -> None:
        repository = self._repository(unit)
        for package in store.packages(unit.connection):
            repository.add(package.model, package.version, package.profile, package.manifest)
        if repository.settle():
            log.info("the trust metadata is renewed")
        store.forget_metadata(unit.connection, self._clock() - _KEPT_FOR)

    def _repository(self, unit: UnitOfWork) -> Repository:
        return Repository(store.TrustFiles(unit.connection, self._clock()), self._online_keys(), self._clock())

    def _online_keys(self) -> dict[str, CryptoSigner]:
        return read_keys(_there(self._keys.glob("*.pem"), self._keys))

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


def _there(paths: Iterable[Path], where: Path) -> list[Path]:
    found = list(paths)
    if not found:
        fix = "Point SLMOPS_TRUST_KEYS to the folder online/ of the ceremony."
        raise InvalidMessage("there are no keys of the trust repository", where=str(where), fix=fix)
    return found


def _no_ceremony(where: Path) -> InvalidMessage:
    return InvalidMessage(
        "there is no root of trust",
        where=str(where),
        fix="Hold the key ceremony (slmops trust ceremony) and point SLMOPS_TRUST_METADATA to its folder metadata/.",
    )

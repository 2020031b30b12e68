"""Event or command in, decision, events out."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeVar

from slmops.contracts.commands import (
    BeginUpload,
    CollectGarbage,
    GarbageReport,
    ListVersions,
    RegisterVersion,
    RetireVersion,
    SetAlias,
    UploadTicket,
    VersionList,
    VersionView,
)
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.events import Event, VariantProgressed, VariantStarted
from slmops.contracts.golden import GOLDEN_FILE, parse_golden
from slmops.contracts.model import ModelFile
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.objects.store import Objects
from slmops.registry import store
from slmops.registry.domain.roots import OWN, RULES, WITHDRAWALS
from slmops.registry.domain.versions import Model, check_files, holds, register, retire, set_alias
from slmops.registry.garbage import Collector

C = TypeVar("C", RegisterVersion, SetAlias, RetireVersion)
UPLOAD_ID = re.compile(r"[0-9a-f]{32}")
GOLDEN_LIMIT_BYTES = 1 << 20


class Handlers:
    """`new_upload` draws an upload's id: unguessable, so that nobody writes into another's upload."""

    def __init__(
        self,
        journal: Journal,
        objects: Objects,
        collector: Collector,
        clock: Clock,
        new_upload: Callable[[], str],
        shortest_grace: timedelta,
    ) -> None:
        self._journal = journal
        self._objects = objects
        self._collector = collector
        self._shortest_grace = shortest_grace
        self._clock = clock
        self._new_upload = new_upload

    # ---- events -------------------------------------------------------------------------------------------

    async def on_lineage(self, event: Event, delivered: MessageContext) -> None:
        """What became of a version. Its order of arrival does not matter."""

        def work(unit: UnitOfWork) -> None:
            if unit.first_time("registry", delivered.id):
                store.project(unit.connection, event)
                store.name(unit.connection, event)

        await self._journal.transact(work)

    # ---- commands -----------------------------------------------------------------------------------------

    async def begin_upload(self, command: BeginUpload) -> UploadTicket:
        """Raises `AlreadyExists` when the version is registered with other files."""
        check_files(command.files)
        upload = self._new_upload()
        if holds(await self._model(command.model), command.version, command.files):
            return UploadTicket(upload=upload, urls={})
        wanted = dict.fromkeys(file.digest for file in command.files)
        missing = [digest for digest in wanted if not await self._objects.keep(digest)]
        urls = {digest: await self._objects.presigned_upload(upload, digest) for digest in missing}
        return UploadTicket(upload=upload, urls=urls)

    async def register_version(self, command: RegisterVersion) -> VersionView:
        """Raises `DigestMismatch`, `NotFound`, `AlreadyExists`, `InvalidMessage`; then nothing is registered."""
        # Refused before gigabytes are hashed; decided again below, in the transaction that counts.
        if register(await self._model(command.model), command, self._clock()):
            await self._adopt(command)
        return await self._decide(command, register)

    async def set_alias(self, command: SetAlias) -> VersionView:
        return await self._decide(command, set_alias)

    async def retire_version(self, command: RetireVersion) -> VersionView:
        return await self._decide(command, retire)

    async def list_versions(self, query: ListVersions) -> VersionList:
        found = await self._journal.read(lambda connection: store.views(connection, query.model, query.version))
        return VersionList(versions=tuple(found))

    async def collect_garbage(self, command: CollectGarbage) -> GarbageReport:
        """Raises `InvalidMessage` for a grace period in which nobody could finish, `FactsMissing`, `Unreachable`."""
        if command.grace < self._shortest_grace:
            raise InvalidMessage(
                f"a grace period of {command.grace} is shorter than {self._shortest_grace}",
                where="grace",
                fix="What is being pushed, optimized or packaged must be named before it is over. Give it longer.",
            )
        return await self._collector.collect(command)

    # ---- steps --------------------------------------------------------------------------------------------

    async def _model(self, name: str) -> Model:
        model, _ = await self._journal.transact(lambda unit: store.load(unit, name))
        return model

    async def _decide(self, command: C, decide: Callable[[Model, C, datetime], list[Event]]) -> VersionView:
        def work(unit: UnitOfWork) -> VersionView:
            model, version = store.load(unit, command.model)
            events = decide(model, command, self._clock())
            unit.append(store.stream(command.model), version, events)
            return store.views(unit.connection, command.model, command.version)[0]

        return await self._journal.transact(work)

    async def _adopt(self, command: RegisterVersion) -> None:
        """Every file of the command in the store, verified."""
        if not UPLOAD_ID.fullmatch(command.upload):
            raise InvalidMessage("this is not an upload", where="upload", fix="Begin an upload first and name its id.")
        for file in command.files:
            await self._adopt_file(command.upload, file)
        if command.golden:
            await self._adopt_file(command.upload, command.golden)
            await self._check_golden(command.golden)

    async def _adopt_file(self, upload: str, file: ModelFile) -> None:
        try:
            await self._objects.adopt(upload, file.digest, file.size_bytes)
        except NotFound as error:
            # A command that is repeated while its first copy still works finds the upload moved.
            if not await self._objects.keep(file.digest):
                raise NotFound(
                    f"the file {file.path} was not uploaded",
                    where=file.digest,
                    fix="Begin a new upload and push again.",
                ) from error

    async def _check_golden(self, golden: ModelFile) -> None:
        """A gateway judges releases by these: refuse here what it could not read. Raises `InvalidMessage`."""
        if golden.size_bytes > GOLDEN_LIMIT_BYTES:
            raise InvalidMessage(f"golden prompts are larger than {GOLDEN_LIMIT_BYTES} bytes", where=golden.path)
        try:
            text = (await self._objects.get_bytes(golden.digest, GOLDEN_LIMIT_BYTES)).decode()
        except UnicodeDecodeError as error:
            raise InvalidMessage("golden prompts are not UTF-8 text", where=golden.path) from error
        if not parse_golden(text):
            raise InvalidMessage(f"{GOLDEN_FILE} holds no prompt", where=golden.path, fix="Write at least one.")


def routes(bus: Bus, handlers: Handlers) -> None:
    naming = [kind for kind in RULES if kind not in OWN]
    heard: list[type[Event]] = [VariantStarted, VariantProgressed, *naming, *WITHDRAWALS]
    for kind in heard:
        bus.on(kind, handlers.on_lineage)
    bus.serve(BeginUpload, handlers.begin_upload)
    bus.serve(RegisterVersion, handlers.register_version)
    bus.serve(SetAlias, handlers.set_alias)
    bus.serve(RetireVersion, handlers.retire_version)
    bus.serve(ListVersions, handlers.list_versions)
    bus.serve(CollectGarbage, handlers.collect_garbage)

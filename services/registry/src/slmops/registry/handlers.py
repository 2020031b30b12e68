"""Handles events, commands and queries of the registry."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from slmops.contracts.commands import (
    BeginUpload,
    ListVersions,
    RegisterVersion,
    RetireVersion,
    SetAlias,
    UploadTicket,
    VersionList,
    VersionView,
)
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.events import Event, VariantProgressed
from slmops.contracts.model import ModelFile
from slmops.contracts.prompts.evaluation_data import EvaluationData, check_data, check_sizes
from slmops.contracts.prompts.golden import GOLDEN_FILE, check_golden
from slmops.kit.bus.pages import cursor, fitting, position
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.clock import Clock
from slmops.kit.journal import Journal, UnitOfWork
from slmops.kit.objects.store import Objects
from slmops.registry import store
from slmops.registry.domain.lifecycle import State
from slmops.registry.domain.live_blobs import OWN, RULES, WITHDRAWALS
from slmops.registry.domain.versions import Model, check_files, holds, register, retire, set_alias

C = TypeVar("C", RegisterVersion, SetAlias, RetireVersion)
UPLOAD_ID = re.compile(r"[0-9a-f]{32}")
GOLDEN_LIMIT_BYTES = 1 << 20
_VERSIONS = "versions"


class Handlers:
    """The registry's handlers. `new_upload` returns an unguessable id, so nobody can write into another upload."""

    def __init__(
        self,
        journal: Journal,
        objects: Objects,
        clock: Clock,
        new_upload: Callable[[], str],
    ) -> None:
        self._journal = journal
        self._objects = objects
        self._clock = clock
        self._new_upload = new_upload

    # ---- events -------------------------------------------------------------------------------------------

    async def on_lineage(self, event: Event, delivered: MessageContext) -> None:
        """Records an event of a variant or package. The order of arrival does not matter."""

        def work(unit: UnitOfWork) -> None:
            if unit.first_time("registry", delivered.id):
                store.project(unit.connection, event)
                store.name(unit.connection, event)

        await self._journal.transact(work)

    # ---- commands -----------------------------------------------------------------------------------------

    async def begin_upload(self, command: BeginUpload) -> UploadTicket:
        """Returns upload URLs for missing and corrupt files, also if the version is registered. Raises `AlreadyExists`
        if the version has other files."""
        check_files(command.files)
        upload, model = self._new_upload(), await self._model(command.model)
        if holds(model, command.version, command.files) and model.state_of(command.version) is State.RETIRED:
            return UploadTicket(upload=upload, urls={})  # its files may be garbage
        sizes = {file.digest: file.size_bytes for file in command.files}
        missing = [
            digest
            for digest, size_bytes in sizes.items()
            if not await self._objects.keep(digest, size_bytes, command.md5.get(digest))
        ]
        urls = {digest: await self._objects.presigned_upload(upload, digest) for digest in missing}
        return UploadTicket(upload=upload, urls=urls)

    async def register_version(self, command: RegisterVersion) -> VersionView:
        """Verifies and registers uploaded files; of a registered version, takes only files that the store lost.
        Registers nothing if it raises `DigestMismatch`, `NotFound`, `AlreadyExists` or `InvalidMessage`."""
        # A first decision rejects bad commands before gigabytes are hashed; the transaction below decides again.
        model = await self._model(command.model)
        if register(model, command, self._clock()):
            await self._adopt(command)
        elif model.state_of(command.version) is not State.RETIRED:
            await self._heal(command)
        return await self._decide(command, register)

    async def set_alias(self, command: SetAlias) -> VersionView:
        return await self._decide(command, set_alias)

    async def retire_version(self, command: RetireVersion) -> VersionView:
        return await self._decide(command, retire)

    async def list_versions(self, query: ListVersions) -> VersionList:
        """Raises `InvalidCursor`. Growth: the rows of `limit` versions."""
        before = int(position(_VERSIONS, query.cursor, float)[0]) if query.cursor else None
        model, version, limit = query.model, query.version, query.limit
        found = await self._journal.read(lambda c: store.newest_views(c, model, version, before, limit + 1))
        views = fitting(view for _, view in found[:limit])
        more = cursor(_VERSIONS, float(found[len(views) - 1][0])) if len(found) > len(views) else None
        return VersionList(versions=tuple(reversed(views)), cursor=more)

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
        """Verifies all files of the command and makes them blobs."""
        _check_upload(command.upload)
        for file in command.files:
            await self._adopt_file(command.upload, file)
        if command.golden:
            await self._adopt_file(command.upload, command.golden)
            await self._check_golden(command.golden)
        if command.data:
            await self._adopt_data(command.upload, command.data)

    async def _adopt_data(self, upload: str, data: EvaluationData) -> None:
        """Verifies own texts and tasks. Raises `InvalidMessage` for those with which no variant can be measured."""
        check_sizes(data)
        for file in data.files:
            await self._adopt_file(upload, file)
        contents = {file.path: await self._objects.get_bytes(file.digest, file.size_bytes) for file in data.files}
        await asyncio.to_thread(check_data, data, contents)

    async def _heal(self, command: RegisterVersion) -> None:
        """Takes the uploads of files that are missing or corrupt in the store."""
        own = command.data.files if command.data else ()
        for file in (*command.files, *([command.golden] if command.golden else []), *own):
            if not await self._objects.keep(file.digest, file.size_bytes):
                _check_upload(command.upload)
                await self._adopt_file(command.upload, file)

    async def _adopt_file(self, upload: str, file: ModelFile) -> None:
        try:
            await self._objects.adopt(upload, file.digest, file.size_bytes)
        except NotFound as error:
            # If the command is repeated while the first one is still running, the upload may already be moved.
            if not await self._objects.keep(file.digest):
                raise NotFound(
                    f"the file {file.path} was not uploaded",
                    where=file.digest,
                    fix="Begin a new upload and push again.",
                ) from error

    async def _check_golden(self, golden: ModelFile) -> None:
        """Checks that gateways can read the golden prompts. Raises `InvalidMessage`."""
        if golden.size_bytes > GOLDEN_LIMIT_BYTES:
            raise InvalidMessage(f"golden prompts are larger than {GOLDEN_LIMIT_BYTES} bytes", where=golden.path)
        try:
            text = (await self._objects.get_bytes(golden.digest, GOLDEN_LIMIT_BYTES)).decode()
        except UnicodeDecodeError as error:
            raise InvalidMessage("golden prompts are not UTF-8 text", where=golden.path) from error
        if not check_golden(text):
            raise InvalidMessage(f"{GOLDEN_FILE} contains no prompt", where=golden.path, fix="Write at least one.")


def _check_upload(upload: str) -> None:
    if not UPLOAD_ID.fullmatch(upload):
        raise InvalidMessage("the upload id is not valid", where="upload", fix="Begin an upload first and use its id.")


def routes(bus: Bus, handlers: Handlers) -> None:
    naming = [kind for kind in RULES if kind not in OWN]
    kinds: list[type[Event]] = [VariantProgressed, *naming, *WITHDRAWALS]
    for kind in kinds:
        bus.on(kind, handlers.on_lineage)
    bus.serve(BeginUpload, handlers.begin_upload)
    bus.serve(RegisterVersion, handlers.register_version, at_once=2)  # each reads gigabytes from the store
    bus.serve(SetAlias, handlers.set_alias)
    bus.serve(RetireVersion, handlers.retire_version)
    bus.serve(ListVersions, handlers.list_versions)

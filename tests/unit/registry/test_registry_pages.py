"""The list of versions is answered by pages, the newest first, with everything that belongs to each version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from unit.registry.registry_examples import pushed, with_versions
from unit.registry.test_registry_store import JOB, PACKAGE, STARTED

from slmops.contracts.commands import ListVersions, VersionView
from slmops.contracts.errors import InvalidCursor
from slmops.contracts.events import ModelAliasMoved
from slmops.kit.journal import Journal, UnitOfWork
from slmops.registry import store
from slmops.registry.handlers import Handlers

VERSIONS = [f"1.0.{number}" for number in range(7)]


async def test_versions_are_listed_by_pages(tmp_path: Path) -> None:
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db",
        service="registry",
        metadata=store.schema(),
        migrations=None,
        project=store.project,
    )
    await journal.open()
    registered = [with_versions(pushed(version)).versions[version].event for version in VERSIONS]

    def fill(unit: UnitOfWork) -> None:
        for event in registered:
            store.project(unit.connection, event)
            # Another model has the same versions.
            store.project(unit.connection, event.model_copy(update={"model": "other"}))
        alias = ModelAliasMoved(model="smollm2", alias="stable", version="1.0.0", previous=None, at=PACKAGE.at)
        for event in (alias, STARTED, PACKAGE):
            store.project(unit.connection, event)

    await journal.transact(fill)
    handlers = Handlers(journal, cast(Any, None), cast(Any, None), cast(Any, None))

    async def listed(**asked: Any) -> list[VersionView]:
        """Returns the versions of all pages, the newest first."""
        found: list[VersionView] = []
        cursor = None
        while True:
            page = await handlers.list_versions(ListVersions(**asked, limit=3, cursor=cursor))
            assert len(page.versions) <= 3
            found += reversed(page.versions)
            if (cursor := page.cursor) is None:
                return found

    newest = VERSIONS[::-1]
    assert [one.version for one in await listed(model="smollm2")] == newest
    assert [(one.model, one.version) for one in await listed()] == [
        (model, version) for version in newest for model in ("other", "smollm2")
    ]
    [only] = await listed(model="smollm2", version="1.0.0")
    assert (only.aliases, len(only.packages), only.stage) == (("stable",), 1, "packaged")
    assert (await listed(model="other"))[-1].packages == ()
    assert only == (await listed(model="smollm2"))[-1]
    with pytest.raises(InvalidCursor):
        await handlers.list_versions(ListVersions(cursor=JOB["job"]))
    await journal.close()

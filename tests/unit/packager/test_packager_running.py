"""A gateway runs what its report with the highest sequence names, whatever its clock and the order of delivery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from slmops.contracts.descriptor import digest_of
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.kit.journal import Journal
from slmops.packager import store
from slmops.packager.handlers import Handlers

OLD, NEW = digest_of(b"old"), digest_of(b"new")
T0 = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db",
        service="packager",
        metadata=store.schema(),
        migrations=store.MIGRATIONS,
        project=store.project,
    )
    await journal.open()
    yield journal
    await journal.close()


@pytest.fixture
def handlers(journal: Journal) -> Handlers:
    nothing: Any = None
    return Handlers(nothing, journal, nothing, nothing, nothing, nothing, lambda: T0)


def report(sequence: int, running: str, at: datetime = T0) -> GatewayReported:
    fields = {"gateway_id": "gw-1", "blueprint": "edge-chat", "phase": UpdatePhase.COMMITTED}
    return GatewayReported.model_validate({**fields, "sequence": sequence, "running": running, "at": at})


async def running_after(journal: Journal, handlers: Handlers, *reports: GatewayReported) -> dict[str, int]:
    for event in reports:
        await handlers.on_gateway_reported(event, cast(Any, None))
    return cast(dict[str, int], await journal.read(store.running))


async def test_a_clock_that_was_set_back_hides_no_report(journal: Journal, handlers: Handlers) -> None:
    ahead = report(1, OLD, at=T0 + timedelta(days=3))
    assert await running_after(journal, handlers, ahead, report(2, NEW)) == {NEW: 1}


async def test_a_report_that_is_delivered_late_changes_nothing(journal: Journal, handlers: Handlers) -> None:
    late = report(2, OLD)
    assert await running_after(journal, handlers, report(1, NEW), report(3, NEW), late) == {NEW: 1}


async def test_a_late_report_after_a_restart_changes_nothing(journal: Journal, handlers: Handlers) -> None:
    await running_after(journal, handlers, report(5, NEW))
    restarted = Handlers(*[None] * 1, journal, *[None] * 4, lambda: T0)  # type: ignore[arg-type]
    assert await running_after(journal, restarted, report(4, OLD)) == {NEW: 1}

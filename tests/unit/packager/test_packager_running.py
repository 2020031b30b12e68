"""A gateway runs what its newest report names, whatever its clock, order of delivery and lost counters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy
from sqlalchemy.engine import Engine

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import CredentialRevoked
from slmops.contracts.events import GatewayEnrolled, GatewayRemoved, GatewayReported, GatewayRevoked, UpdatePhase
from slmops.kit.bus.batches import Received
from slmops.kit.bus.service_bus import MessageContext
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


def report(sequence: int, running: str, at: datetime = T0, boot: str = "") -> GatewayReported:
    fields = {"gateway_id": "gw-1", "blueprint": "edge-chat", "phase": UpdatePhase.COMMITTED}
    return GatewayReported.model_validate({**fields, "sequence": sequence, "running": running, "at": at, "boot": boot})


async def running_after(journal: Journal, handlers: Handlers, *reports: GatewayReported) -> dict[str, int]:
    """Returns the number of gateways by package after each report was a batch of its own."""
    for event in reports:
        context = MessageContext("id", event.subject, None, cast(Any, None))
        assert await handlers.on_gateway_reports([Received(event, context)]) == {}
    return cast(dict[str, int], await journal.read(store.running))


async def test_a_clock_that_was_set_back_hides_no_report(journal: Journal, handlers: Handlers) -> None:
    ahead = report(1, OLD, at=T0 + timedelta(days=3))
    assert await running_after(journal, handlers, ahead, report(2, NEW)) == {NEW: 1}


async def test_the_first_report_after_a_lost_counter_counts(journal: Journal, handlers: Handlers) -> None:
    past = T0 - timedelta(days=2000)
    before = report(500, OLD, past, "a")
    assert await running_after(journal, handlers, before, report(1, NEW, past + timedelta(1), "b")) == {NEW: 1}
    late = report(1, OLD, past, "b0")
    assert await running_after(journal, handlers, late) == {NEW: 1}, "a report of an earlier boot that arrives late"
    handlers._running.clear()  # as after a restart of the packager
    assert await running_after(journal, handlers, report(2, OLD, past + timedelta(2), "b")) == {OLD: 1}


async def test_a_report_that_is_delivered_late_changes_nothing(journal: Journal, handlers: Handlers) -> None:
    late = report(2, OLD)
    assert await running_after(journal, handlers, report(1, NEW), report(3, NEW), late) == {NEW: 1}


async def test_a_late_report_after_a_restart_changes_nothing(journal: Journal, handlers: Handlers) -> None:
    await running_after(journal, handlers, report(5, NEW))
    restarted = Handlers(*[None] * 1, journal, *[None] * 4, lambda: T0)  # type: ignore[arg-type]
    assert await running_after(journal, restarted, report(4, OLD)) == {NEW: 1}


async def test_reports_of_one_batch_count_in_their_order_with_few_statements(
    journal: Journal, handlers: Handlers
) -> None:
    await running_after(journal, handlers, report(1, OLD))
    events = [report(2, NEW), report(4, OLD), report(3, NEW)]
    others = [report(1, NEW).model_copy(update={"gateway_id": f"gw-{number}"}) for number in range(2, 202)]
    statements: list[str] = []
    listener = lambda *found: statements.append(found[2])  # noqa: E731
    sqlalchemy.event.listen(Engine, "before_cursor_execute", listener)
    batch = [
        Received(event, MessageContext("id", event.subject, None, cast(Any, None))) for event in (*events, *others)
    ]
    assert await handlers.on_gateway_reports(batch) == {}
    sqlalchemy.event.remove(Engine, "before_cursor_execute", listener)
    assert await journal.read(store.running) == {OLD: 1, NEW: 200}
    assert len(statements) <= 5


# ---- who belongs to the fleet -----------------------------------------------------------------------------

KEY, OTHER = "U" + "A" * 55, "U" + "B" * 55


def enrolled(key: str, number: int, seconds: float) -> GatewayEnrolled:
    at = T0 + timedelta(seconds=seconds)
    return GatewayEnrolled(gateway_id="gw-1", blueprint="edge-chat", public_key=key, enrolment=number, at=at)


REVOKED = GatewayRevoked(gateway_id="gw-1", public_key=KEY, revoked_at=T0 + timedelta(seconds=5))
REMOVED = GatewayRemoved(gateway_id="gw-1", blueprint="edge-chat", at=T0 + timedelta(seconds=6))


async def hear(handlers: Handlers, *events: GatewayEnrolled | GatewayRevoked | GatewayRemoved) -> None:
    for event in events:
        if isinstance(event, GatewayEnrolled):
            await handlers.on_enrolments([Received(event, cast(Any, None))])
        else:
            await handlers.on_membership(event, cast(Any, None))


async def test_a_revoked_gateway_runs_nothing_that_counts(journal: Journal, handlers: Handlers) -> None:
    await hear(handlers, enrolled(KEY, 1, 0))
    await running_after(journal, handlers, report(1, OLD))
    await hear(handlers, REVOKED)
    assert await running_after(journal, handlers, report(2, NEW)) == {}
    with pytest.raises(CredentialRevoked):
        await handlers._plan("gw-1")


async def test_a_removed_gateway_runs_nothing_even_if_it_still_reports(journal: Journal, handlers: Handlers) -> None:
    await hear(handlers, enrolled(KEY, 1, 0))
    await running_after(journal, handlers, report(1, OLD))
    await hear(handlers, REMOVED, REVOKED)
    assert await running_after(journal, handlers, report(2, NEW)) == {}
    await hear(handlers, enrolled(OTHER, 2, 9), REMOVED)
    assert await running_after(journal, handlers, report(1, NEW)) == {NEW: 1}


@pytest.mark.parametrize("first", ["the report", "the enrolment"])
async def test_the_order_of_a_device_that_was_set_up_again_starts_anew(
    journal: Journal, handlers: Handlers, first: str
) -> None:
    await hear(handlers, enrolled(KEY, 1, 0))
    await running_after(journal, handlers, report(500, OLD).model_copy(update={"enrolment": 1}))
    new = report(1, NEW).model_copy(update={"enrolment": 2})
    if first == "the report":
        await running_after(journal, handlers, new)
    await hear(handlers, enrolled(OTHER, 2, 9), REVOKED)
    late = report(501, OLD).model_copy(update={"enrolment": 1})
    assert await running_after(journal, handlers, new, late) == {NEW: 1}
    after = report(2, OLD).model_copy(update={"enrolment": 2})
    assert await running_after(journal, handlers, after) == {OLD: 1}, "the late report's sequence is another device's"

"""The inventory and the tables on a database in a file."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from unit.rollout.rollout_examples import NAME, T0, at, digest, failure, package, report, window

from slmops.contracts.errors import Denied
from slmops.contracts.events import CohortMeasured, GatewayEnrolled, GatewayReported, PackageWithdrawn, UpdatePhase
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import store
from slmops.rollout.domain.fleet import Member, Sighting
from slmops.rollout.domain.views import gateway_view

COMMITTED, SOAKING, IDLE = UpdatePhase.COMMITTED, UpdatePhase.SOAKING, UpdatePhase.IDLE


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db",
        service="rollout",
        metadata=store.schema(),
        migrations=store.MIGRATIONS,
        project=store.project,
    )
    await journal.open()
    yield journal
    await journal.close()


ENROLLED = GatewayEnrolled(gateway_id="gw-1", blueprint=NAME, public_key="U", at=T0)


SEEN = Sighting(at(60))


async def heard(journal: Journal, *reports: GatewayReported, seen: Sighting = SEEN) -> Member:
    await journal.transact(lambda unit: store.project(unit.connection, ENROLLED))
    for event in reports:
        await journal.transact(lambda unit, event=event: store.record_report(unit.connection, event, seen))
    [member] = await journal.read(store.members)
    return member


async def test_an_older_report_does_not_replace_a_newer_one(journal: Journal) -> None:
    new, old = report("gw-1", COMMITTED, "1.0.0", 1, sequence=7), report("gw-1", SOAKING, "1.0.0", 1, sequence=6)
    assert (await heard(journal, new, old, old)).report == new


async def test_a_failure_is_kept_if_a_later_report_arrived_first(journal: Journal) -> None:
    failed = failure("gw-1", "1.0.0", 1)
    idle = report("gw-1", IDLE, "1.0.0", 1, sequence=2)
    member = await heard(journal, idle, failed)
    assert (member.report, member.failure) == (idle, failed)


async def test_a_gateway_was_last_seen_when_its_newest_report_arrived(journal: Journal) -> None:
    """By its own clock, a dead gateway that was three days ahead was seen 0 s ago for three days."""
    ahead = timedelta(days=3)
    future = report("gw-1", IDLE, "1.0.0", 1, sequence=2).model_copy(update={"at": at(60) + ahead})
    member = await heard(journal, future, seen=Sighting.of(future, at(60), None))
    assert member.seen == Sighting(at(60), ahead)
    old = report("gw-1", IDLE, "1.0.0", 1, sequence=1)
    member = await heard(journal, old, seen=Sighting.of(old, at(999), None))
    assert member.seen == Sighting(at(60), ahead), "a report that is delivered late is no sign of life"
    view = gateway_view(member, None)
    assert (view.last_seen, view.clock_ahead_s) == (at(60), ahead.total_seconds())


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(days=-400), timedelta(days=3)])
def test_the_time_of_publication_says_how_wrong_a_clock_is(ahead: timedelta) -> None:
    waited = report("gw-1", IDLE, "1.0.0", 1)
    assert Sighting.of(waited, at(9000), ahead).clock_ahead == ahead
    assert Sighting.of(waited, at(9000), None).clock_ahead is None, "it may only have waited for a network"


async def test_the_newest_reported_labels_count(journal: Journal) -> None:
    first = report("gw-1", IDLE, "1.0.0", 1, labels={"ring": "fleet"})
    second = report("gw-1", IDLE, "1.0.0", 1, labels={"ring": "canary"}, sequence=2)
    assert (await heard(journal, first, second)).identity.labels == {"ring": "canary"}


async def test_a_report_for_another_blueprint_is_denied(journal: Journal) -> None:
    first = report("gw-1", IDLE, "1.0.0", 1)
    with pytest.raises(Denied, match="enrolled under edge-chat"):
        await heard(journal, first, report("gw-1", IDLE, "1.0.0", 1, blueprint="kiosk", sequence=2))
    assert (await heard(journal)).report == first


async def test_a_report_of_a_gateway_that_is_not_enrolled_is_not_recorded(journal: Journal) -> None:
    stranger = report("gw-1", COMMITTED, "1.0.0", 1)
    assert not await journal.transact(lambda unit: store.record_report(unit.connection, stranger, SEEN))
    assert await journal.read(store.members) == []


async def test_nan_figures_do_not_make_the_inventory_unreadable(journal: Journal) -> None:
    odd = report("gw-1", IDLE, "1.0.0", 1, measured={"tokens_per_s": math.nan, "ttft_s": math.inf, "share": 1.0})
    member = await heard(journal, odd)
    assert member.report is not None
    assert member.report.measured == {"share": 1.0}


async def test_packages_are_listed_by_publication_time_and_the_newest_of_a_version_counts(
    journal: Journal,
) -> None:
    rebuilt = package("1.0.0", 5).model_copy(update={"recipe": "int8"})
    for event in (package("2.0.0", 2), rebuilt, package("1.0.0", 1), package("1.0.0", 9, model="other")):
        await journal.transact(lambda unit, event=event: store.record_package(unit.connection, event))
    found = await journal.read(lambda connection: store.packages(connection, "smollm2"))
    assert [(p.version, p.recipe) for p in found] == [("2.0.0", "int4"), ("1.0.0", "int8")]


@pytest.mark.parametrize("first", ["the package", "its withdrawal"])
async def test_a_withdrawn_package_is_not_listed(journal: Journal, first: str) -> None:
    kept, gone = package("1.0.0", 1), package("1.0.1", 2)
    withdrawal = PackageWithdrawn(
        **gone.model_dump(include={"model", "version", "profile", "at"}),
        manifest=gone.manifest.digest,
        signature=gone.signature.digest,
    )

    def hear(unit: UnitOfWork) -> None:
        for event in [kept, gone] if first == "the package" else [kept]:
            store.record_package(unit.connection, event)
        store.record_withdrawal(unit.connection, withdrawal)
        store.record_withdrawal(unit.connection, withdrawal)
        store.record_package(unit.connection, gone)

    await journal.transact(hear)
    assert await journal.read(lambda connection: store.packages(connection, "smollm2")) == [kept]


async def test_the_same_window_is_stored_once(journal: Journal) -> None:
    event = CohortMeasured(blueprint=NAME, window=window("1.0.0", 5), at=T0)
    for identity in ("a", "a", "b"):
        await journal.transact(lambda unit, identity=identity: store.record_window(unit.connection, identity, event))
    assert len(await journal.read(lambda connection: store.windows(connection, NAME, at(9.9)))) == 2
    assert await journal.read(lambda connection: store.windows(connection, NAME, at(10))) == []


async def test_old_windows_are_deleted(journal: Journal) -> None:
    week = store.WINDOWS_KEPT.total_seconds()
    for identity, seconds in (("old", 0), ("new", week + 1)):
        event = CohortMeasured(blueprint=NAME, window=window("1.0.0", seconds), at=T0)
        await journal.transact(lambda unit, i=identity, e=event: store.record_window(unit.connection, i, e))
    [kept] = await journal.read(lambda connection: store.windows(connection, NAME, at(0)))
    assert (kept.started_at, kept.release) == (at(week + 1), digest("1.0.0"))

"""The inventory and the tables on a database in a file."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from unit.rollout.rollout_examples import NAME, T0, at, digest, failure, package, report, window

from slmops.contracts.commands import Standing
from slmops.contracts.errors import CredentialRevoked, Denied
from slmops.contracts.events import (
    CohortMeasured,
    Event,
    GatewayEnrolled,
    GatewayMoved,
    GatewayRemoved,
    GatewayReported,
    GatewayRevoked,
    PackageWithdrawn,
    UpdatePhase,
)
from slmops.kit.journal import Journal, UnitOfWork
from slmops.rollout import inventory_rows, membership_rows, store
from slmops.rollout.domain.fleet import Member, Sighting
from slmops.rollout.domain.views import gateway_view
from slmops.rollout.report_rows import Report, record_reports

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


async def record(journal: Journal, event: GatewayReported, seen: Sighting = SEEN) -> bool:
    """Records a report; returns whether its gateway is known. Raises the error for which it was refused."""
    reports = {0: Report(event, seen)}
    recorded = await journal.transact(lambda unit: record_reports(unit.connection, reports))
    for error in recorded.refused.values():
        raise error
    return not recorded.unknown


async def heard(journal: Journal, *reports: GatewayReported, seen: Sighting = SEEN) -> Member:
    await journal.transact(lambda unit: store.project(unit.connection, ENROLLED))
    for event in reports:
        await record(journal, event, seen)
    [member] = await journal.read(inventory_rows.members)
    return member


async def test_an_older_report_does_not_replace_a_newer_one(journal: Journal) -> None:
    new, old = report("gw-1", COMMITTED, "1.0.0", 1, sequence=7), report("gw-1", SOAKING, "1.0.0", 1, sequence=6)
    assert (await heard(journal, new, old, old)).report == new


async def test_a_failure_is_kept_if_a_later_report_arrived_first(journal: Journal) -> None:
    failed = failure("gw-1", "1.0.0", 1)
    idle = report("gw-1", IDLE, "1.0.0", 1, sequence=2)
    member = await heard(journal, idle, failed)
    assert (member.report, member.failure) == (idle, failed)


async def test_the_first_report_after_a_lost_counter_counts_and_late_ones_do_not(journal: Journal) -> None:
    """Without this rule a gateway that lost its counter is ignored until it has sent as many reports as before."""

    def made(version: str, sequence: int, boot: str, seconds: float) -> GatewayReported:
        event = report("gw-1", COMMITTED, version, 1, sequence=sequence)
        return event.model_copy(update={"boot": boot, "at": at(seconds)})

    before, after = made("1.0.0", 500, "a", 1), made("1.0.1", 1, "b", 2)
    assert (await heard(journal, before, after)).report == after
    for late in (made("1.0.0", 1, "c", 1.5), made("1.0.0", 1, "b", 3), made("1.0.0", 1, "", 3)):
        assert (await heard(journal, late)).report == after, "of an earlier boot, twice, of an earlier release"
    following = made("1.0.0", 2, "b", 4)
    assert (await heard(journal, following)).report == following


async def test_the_time_of_a_wrong_clock_is_corrected_before_it_is_compared(journal: Journal) -> None:
    ahead, first = timedelta(days=400), report("gw-1", COMMITTED, "1.0.0", 1, sequence=500)
    first = first.model_copy(update={"boot": "a", "at": at(1) + ahead})
    await heard(journal, first, seen=Sighting(at(1), ahead))
    second = first.model_copy(update={"boot": "b", "at": at(2), "sequence": 1})
    assert (await heard(journal, second, seen=Sighting(at(2), timedelta(0)))).report == second
    odd = second.model_copy(update={"boot": "c", "at": datetime.min.replace(tzinfo=UTC)})
    assert (await heard(journal, odd, seen=Sighting(at(3), ahead))).report == second


async def test_a_failure_after_a_lost_counter_is_kept(journal: Journal) -> None:
    before = failure("gw-1", "1.0.0", 1).model_copy(update={"sequence": 500, "boot": "a", "at": at(1)})
    after = failure("gw-1", "1.0.1", 1).model_copy(update={"sequence": 1, "boot": "b", "at": at(2)})
    assert (await heard(journal, before, after)).failure == after


async def test_a_gateway_was_last_seen_when_its_newest_report_arrived(journal: Journal) -> None:
    """By its own clock, a dead gateway that was three days ahead was seen 0 s ago for three days."""
    ahead = timedelta(days=3)
    future = report("gw-1", IDLE, "1.0.0", 1, sequence=2).model_copy(update={"at": at(60) + ahead})
    member = await heard(journal, future, seen=Sighting.of(future, at(60), None))
    assert member.seen == Sighting(at(60), ahead)
    old = report("gw-1", IDLE, "1.0.0", 1, sequence=1)
    member = await heard(journal, old, seen=Sighting.of(old, at(999), None))
    assert member.seen == Sighting(at(60), ahead), "a report that is delivered late is no sign of life"
    view = gateway_view(member, None, at(90))
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
    assert not await record(journal, stranger)
    assert await journal.read(inventory_rows.members) == []


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


# ---- who counts -------------------------------------------------------------------------------------------

KEYS = ("U" + "A" * 55, "U" + "B" * 55)


def enrolled_as(key: str, number: int, blueprint: str = NAME, moved_from: str | None = None) -> GatewayEnrolled:
    return GatewayEnrolled(
        gateway_id="gw-1",
        blueprint=blueprint,
        public_key=key,
        enrolment=number,
        moved_from=moved_from,
        expires_at=at(1000),
        at=at(number),
    )


async def told(journal: Journal, *events: Event) -> None:
    for event in events:
        await journal.transact(lambda unit, event=event: store.project(unit.connection, event))


async def reported(journal: Journal, **changes: Any) -> bool:
    return await record(journal, report("gw-1", COMMITTED, "1.0.0", 1, **changes))


async def member(journal: Journal) -> Member:
    [found] = await journal.read(lambda connection: list(inventory_rows.load(connection, ["gw-1"])))
    return found


async def test_a_revoked_gateway_counts_nowhere_and_its_reports_are_refused(journal: Journal) -> None:
    await told(journal, enrolled_as(KEYS[0], 1))
    await reported(journal)
    await told(journal, GatewayRevoked(gateway_id="gw-1", public_key=KEYS[0], revoked_at=at(9), reason="stolen"))
    with pytest.raises(CredentialRevoked, match="gw-1 was revoked"):
        await reported(journal, sequence=2)
    assert await journal.read(inventory_rows.members) == []
    found = await member(journal)
    assert (found.standing, found.revoked_because) == (Standing.REVOKED, "stolen")
    assert found.report is not None, "it stays listed with what it ran"


async def test_a_gateway_that_is_being_moved_counts_for_neither_blueprint(journal: Journal) -> None:
    await told(journal, enrolled_as(KEYS[0], 1))
    await told(journal, GatewayMoved(gateway_id="gw-1", previous=NAME, blueprint="kiosk", at=at(5)))
    assert await reported(journal), "it still works by its old credential"
    assert await journal.read(lambda c: inventory_rows.members(c, NAME)) == []
    assert await journal.read(lambda c: inventory_rows.members(c, "kiosk")) == []
    assert (await member(journal)).standing is Standing.MOVING
    await told(journal, enrolled_as(KEYS[0], 2, "kiosk", NAME))
    [counted] = await journal.read(lambda c: inventory_rows.members(c, "kiosk"))
    assert counted.identity.blueprint == "kiosk"
    assert await journal.read(lambda c: inventory_rows.members(c, NAME)) == []


async def test_a_move_that_was_taken_back_changes_nothing(journal: Journal) -> None:
    await told(journal, enrolled_as(KEYS[0], 1))
    await told(journal, GatewayMoved(gateway_id="gw-1", previous=NAME, blueprint="kiosk", at=at(5)))
    await told(journal, GatewayMoved(gateway_id="gw-1", previous="kiosk", blueprint=NAME, at=at(6)))
    assert len(await journal.read(lambda c: inventory_rows.members(c, NAME))) == 1


@pytest.mark.parametrize("number", [0, 1])
async def test_reports_that_waited_since_before_the_move_change_nothing(journal: Journal, number: int) -> None:
    await told(journal, enrolled_as(KEYS[0], 1), enrolled_as(KEYS[0], 2, "kiosk", NAME))
    assert await reported(journal, sequence=9, enrolment=number), "not a dead letter: it did nothing wrong"
    assert (await member(journal)).report is None
    with pytest.raises(Denied, match="enrolled under kiosk"):
        await reported(journal, sequence=9, enrolment=2, blueprint="lobby")


async def test_the_sequence_starts_anew_with_another_key(journal: Journal) -> None:
    await told(journal, enrolled_as(KEYS[0], 1))
    await reported(journal, sequence=500, enrolment=1)
    await told(journal, enrolled_as(KEYS[1], 2))
    assert (await member(journal)).report is None
    await reported(journal, sequence=501, enrolment=1)  # the device before, delivered late
    await reported(journal, sequence=1, enrolment=2)
    found = await member(journal)
    assert found.report is not None
    assert (found.report.sequence, found.report.enrolment) == (1, 2)


async def test_with_the_same_key_the_sequence_goes_on(journal: Journal) -> None:
    await told(journal, enrolled_as(KEYS[0], 1))
    await reported(journal, sequence=500, enrolment=1)
    await told(journal, enrolled_as(KEYS[0], 2, "kiosk", NAME))
    await reported(journal, sequence=9, enrolment=2, blueprint="kiosk")
    found = await member(journal)
    assert found.report is not None
    assert found.report.sequence == 500


async def test_a_removed_gateway_is_forgotten_and_the_bus_is_told(journal: Journal) -> None:
    await told(journal, enrolled_as(KEYS[0], 1))
    await reported(journal)
    await told(journal, GatewayRemoved(gateway_id="gw-1", blueprint=NAME, at=at(9)))
    assert await journal.read(lambda c: inventory_rows.one(c, "gw-1")) is None
    forgotten = lambda c: membership_rows.forgotten(c, journal.events, 10)  # noqa: E731
    assert await journal.read(forgotten) == ["gw-1"]
    assert await journal.read(lambda c: membership_rows.overlay_write(c, "gw-1")) == (None,)
    await told(journal, enrolled_as(KEYS[1], 2))
    assert await journal.read(forgotten) == [], "another device enrolled first"


async def test_an_enrolment_is_not_deleted_before_it_was_published(journal: Journal) -> None:
    await journal.transact(lambda unit: unit.append("gateway:gw-1", 0, [enrolled_as(KEYS[0], 1)]))
    await told(journal, GatewayRemoved(gateway_id="gw-1", blueprint=NAME, at=at(9)))
    forgotten = lambda c: membership_rows.forgotten(c, journal.events, 10)  # noqa: E731
    assert await journal.read(forgotten) == []
    await journal.published([recorded.position for recorded in await journal.outbox()])
    assert await journal.read(forgotten) == ["gw-1"]

"""When gateways were last seen, by arrival and in batches; who is offline, and whose report is missing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import event as sqlalchemy_events
from unit.rollout.rollout_examples import NAME, T0, at, report

from slmops.contracts import freshness
from slmops.contracts.errors import CredentialRevoked, Denied, Unreachable
from slmops.contracts.events import GatewayEnrolled, GatewayMoved, GatewayRemoved, GatewayReported, GatewayRevoked
from slmops.contracts.events import UpdatePhase as Phase
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.subjects import presence
from slmops.kit.bus.batches import Received, Refused
from slmops.kit.bus.service_bus import Batch, MessageContext
from slmops.kit.journal import Journal
from slmops.rollout import inventory_rows, presence_rows, store
from slmops.rollout.domain.clocks import WrongClock, clock_remark, with_clocks
from slmops.rollout.domain.fleet import Member, Sighting
from slmops.rollout.domain.gate import GateDecision, Verdict
from slmops.rollout.presence import PresenceHandlers
from slmops.rollout.presence import Report as Reported
from slmops.rollout.report_rows import Report, record_reports

KEY = "U" + "A" * 55


async def _nothing() -> None: ...


def message(
    gateway_id: str,
    arrived_at: datetime,
    sequence: int = 0,
    enrolment: int = 1,
    ahead: timedelta | None = timedelta(),
) -> Received[GatewayPresence, MessageContext]:
    sent_at = arrived_at + ahead if ahead is not None else None
    context = MessageContext("PRESENCE:1", presence(gateway_id), None, _nothing, 1, arrived_at, sent_at)
    return Received(GatewayPresence(enrolment=enrolment, sequence=sequence), context)


def stored(event: GatewayReported, arrived_at: datetime = T0) -> Reported:
    return Received(event, MessageContext("r", event.subject, None, _nothing, 1, arrived_at))


def enrolled(gateway_id: str = "gw-1", number: int = 1, blueprint: str = NAME, key: str = KEY) -> GatewayEnrolled:
    return GatewayEnrolled(gateway_id=gateway_id, blueprint=blueprint, public_key=key, enrolment=number, at=T0)


@dataclass
class Service:
    """The handlers on a database. The bus is what the test put on it."""

    journal: Journal
    enrolments: dict[str, GatewayEnrolled] = field(default_factory=dict)
    reports: dict[str, Reported] = field(default_factory=dict)
    recorded: list[GatewayReported] = field(default_factory=list)
    reads: int = 0
    down: bool = False

    async def heard(self, *batch: Received[GatewayPresence, MessageContext]) -> Refused:
        async def enrolment_of(gateway_id: str) -> GatewayEnrolled | None:
            return self.enrolments.get(gateway_id)

        async def report_of(gateway_id: str) -> Reported | None:
            self.reads += 1
            if self.down:
                raise Unreachable("no bus")
            return self.reports.get(gateway_id)

        return await PresenceHandlers(self.journal, enrolment_of, report_of, self.record).on_presence(batch)

    async def record(self, reports: Batch[GatewayReported]) -> Refused:
        for event, context in reports:
            self.recorded.append(event)
            reports = {1: Report(event, Sighting.of(event, context.arrived_at, context.clock_ahead))}
            await self.journal.transact(lambda unit, reports=reports: record_reports(unit.connection, reports))  # type: ignore[misc]
        return {}

    async def told(self, *events: GatewayEnrolled | GatewayRevoked | GatewayMoved | GatewayRemoved) -> None:
        for event in events:
            await self.journal.transact(lambda unit, event=event: store.project(unit.connection, event))  # type: ignore[misc]

    async def reported(self, event: GatewayReported, arrived_at: datetime) -> None:
        await self.record([stored(event, arrived_at)])
        self.recorded.clear()

    async def member(self, gateway_id: str = "gw-1") -> Member:
        found = await self.journal.read(lambda connection: inventory_rows.one(connection, gateway_id))
        assert found is not None
        return found

    async def last_seen(self) -> datetime | None:
        seen = (await self.member()).seen
        return seen.at if seen else None


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    journal = Journal(
        f"sqlite:///{tmp_path}/j.db",
        service="rollout",
        metadata=store.schema(),
        migrations=store.MIGRATIONS,
        project=store.project,
    )
    await journal.open()
    yield Service(journal)
    await journal.close()


async def test_a_presence_message_says_when_a_gateway_was_last_seen_and_how_wrong_its_clock_is(
    service: Service,
) -> None:
    await service.told(enrolled())
    assert await service.last_seen() == T0, "it was there to enrol"
    assert await service.heard(message("gw-1", at(600), ahead=timedelta(hours=3))) == {}
    assert (await service.member()).seen == Sighting(at(600), timedelta(hours=3))
    await service.heard(message("gw-1", at(1200), ahead=None))
    assert (await service.member()).seen == Sighting(at(1200), timedelta(hours=3)), "unknown is not right"


async def test_no_late_message_moves_the_last_sign_of_life_back(service: Service) -> None:
    await service.told(enrolled())
    await service.heard(message("gw-1", at(1200)), message("gw-1", at(600), ahead=timedelta(days=1)))
    await service.reported(report("gw-1", Phase.IDLE, "1.0.0", 1), at(900))
    assert (await service.member()).seen == Sighting(at(1200), timedelta())
    await service.reported(report("gw-1", Phase.IDLE, "1.0.0", 1, sequence=2), at(1300))
    assert await service.last_seen() == at(1300), "a report is a sign of life too"


async def test_a_batch_takes_the_same_number_of_statements_whatever_its_size(service: Service) -> None:
    counts: list[int] = []
    for size in (1, 100):
        names = [f"gw-{number}" for number in range(size)]
        await service.told(*map(enrolled, names))
        statements: list[str] = []
        engine = service.journal._engine

        def note(*call: object, found: list[str] = statements) -> None:
            found.append(str(call[2]))

        sqlalchemy_events.listen(engine, "before_cursor_execute", note)
        await service.heard(*(message(name, at(600)) for name in names))
        sqlalchemy_events.remove(engine, "before_cursor_execute", note)
        counts.append(len([one for one in statements if not one.startswith("BEGIN")]))
    assert counts == [2, 2]
    assert (await service.member("gw-99")).seen == Sighting(at(600), timedelta())


async def test_the_presence_of_a_revoked_gateway_is_refused_and_that_of_the_device_before_changes_nothing(
    service: Service,
) -> None:
    await service.told(enrolled("gw-1"), enrolled("gw-2", number=2))
    await service.told(GatewayRevoked(gateway_id="gw-1", public_key=KEY, revoked_at=at(9)))
    refused = await service.heard(message("gw-1", at(600)), message("gw-2", at(600), enrolment=1))
    assert [(index, type(error)) for index, error in refused.items()] == [(0, CredentialRevoked)]
    assert [(await service.member(name)).seen for name in ("gw-1", "gw-2")] == [Sighting(T0), Sighting(T0)]


async def test_a_gateway_that_was_never_enrolled_is_denied_and_holds_up_no_other(service: Service) -> None:
    await service.told(enrolled("gw-1"))
    refused = await service.heard(message("gw-9", at(600)), message("gw-1", at(600)))
    assert [(index, type(error)) for index, error in refused.items()] == [(0, Denied)]
    assert await service.last_seen() == at(600)


# ---- missing reports --------------------------------------------------------------------------------------


async def test_a_lost_database_learns_a_gateway_and_its_report_from_its_first_presence_message(
    service: Service,
) -> None:
    service.enrolments["gw-1"] = enrolled(number=3)
    newest = report("gw-1", Phase.COMMITTED, "1.0.0", 1, sequence=40, enrolment=3)
    service.reports["gw-1"] = stored(newest, at(-3600))
    assert await service.heard(message("gw-1", at(600), sequence=40, enrolment=3)) == {}
    member = await service.member()
    assert (member.enrolment, member.report, member.seen) == (3, newest, Sighting(at(600), timedelta()))


async def test_a_report_that_is_still_missing_at_the_next_presence_message_is_read_from_its_stream(
    service: Service,
) -> None:
    await service.told(enrolled())
    await service.reported(report("gw-1", Phase.IDLE, "1.0.0", 1, sequence=4), T0)
    service.reports["gw-1"] = stored(report("gw-1", Phase.COMMITTED, "1.0.0", 1, sequence=5))
    await service.heard(message("gw-1", at(600), sequence=5))
    assert service.reads == 0, "the report may be on its way"
    await service.heard(message("gw-1", at(1200), sequence=5))
    assert [event.sequence for event in service.recorded] == [5]
    await service.heard(message("gw-1", at(1800), sequence=5))
    assert service.reads == 1


async def test_a_report_that_is_on_no_stream_or_cannot_be_read_refuses_nothing(service: Service) -> None:
    await service.told(enrolled())
    for minute in (10, 20):
        await service.heard(message("gw-1", at(60 * minute), sequence=5))
    service.down = True
    assert await service.heard(message("gw-1", at(1800), sequence=5)) == {}
    assert (service.reads, service.recorded, await service.last_seen()) == (2, [], at(1800))


async def test_a_revoked_gateway_does_not_return_by_an_enrolment_that_the_bus_still_has(service: Service) -> None:
    first = enrolled()
    gone = GatewayRevoked(gateway_id="gw-1", public_key=KEY, revoked_at=at(9))
    removed = GatewayRemoved(gateway_id="gw-1", blueprint=NAME, at=at(9))
    await service.journal.transact(lambda unit: unit.append("gateway:gw-1", 0, [first, gone, removed]))
    service.enrolments["gw-1"] = first
    refused = await service.heard(message("gw-1", at(600)))
    assert [type(error) for error in refused.values()] == [CredentialRevoked]
    assert await service.journal.read(lambda c: inventory_rows.one(c, "gw-1")) is None


# ---- offline, and clocks ----------------------------------------------------------------------------------


def test_three_missing_presence_messages_are_offline() -> None:
    now = at(0)
    assert not freshness.is_offline(now - 3 * freshness.PRESENCE, now)
    assert freshness.is_offline(now - 3 * freshness.PRESENCE - timedelta(seconds=1), now)


async def test_wrong_clocks_of_gateways_that_count_are_found(service: Service) -> None:
    hours = timedelta(hours=5)
    names = [f"gw-{number}" for number in range(9)]
    await service.told(*map(enrolled, names), enrolled("other", blueprint="kiosk"))
    await service.told(GatewayRevoked(gateway_id="gw-0", public_key=KEY, revoked_at=at(9)))
    await service.told(GatewayMoved(gateway_id="gw-1", previous=NAME, blueprint="kiosk", at=at(9)))
    for name, ahead in (("gw-2", hours), ("gw-3", -hours), ("gw-4", timedelta(seconds=59)), ("other", hours)):
        await service.heard(message(name, at(600), ahead=ahead))
    for name in ("gw-0", "gw-1"):
        await service.heard(message(name, at(600), ahead=hours))
    found = await service.journal.read(lambda c: presence_rows.wrong_clocks(c, at(600), NAME))
    assert found == [WrongClock("gw-2", hours), WrongClock("gw-3", -hours)]
    everywhere = await service.journal.read(lambda c: presence_rows.wrong_clocks(c, at(600), limit=2))
    assert len(everywhere) == 2
    offline = at(601) + freshness.OFFLINE_AFTER
    assert await service.journal.read(lambda c: presence_rows.wrong_clocks(c, offline, NAME)) == []


@pytest.mark.parametrize("verdict", Verdict)
def test_a_gate_that_waits_names_wrong_clocks(verdict: Verdict) -> None:
    found = [WrongClock("gw-3", timedelta(hours=-3))]
    reason = with_clocks(GateDecision(verdict, "0 of 5 requests"), found).reason
    waits = verdict in (Verdict.WAITING, Verdict.OVERDUE)
    assert reason == "0 of 5 requests" + f"; {clock_remark(found)}" * waits
    assert with_clocks(GateDecision(verdict, "0 of 5 requests"), []).reason == "0 of 5 requests"


def test_a_remark_names_five_wrong_clocks_at_most() -> None:
    assert clock_remark([]) == ""
    assert clock_remark([WrongClock("gw-3", timedelta(hours=-3))]) == (
        "the clock of gw-3 is 3:00:00 behind the services' clock: correct it"
    )
    many = [WrongClock(f"gw-{number}", timedelta(hours=1)) for number in range(6)]
    assert clock_remark(many).endswith(
        "gw-4 is 1:00:00 ahead of the services' clock, and more clocks are wrong: correct them"
    )
    assert "gw-5" not in clock_remark(many)

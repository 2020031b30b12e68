"""A gateway reports what changed, everything once a day, and otherwise only that it is connected."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import DiskFull, PermanentError, Problem
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.freshness import OFFLINE_AFTER, GatewayPresence
from slmops.contracts.plan import Identity
from slmops.gateway import handlers
from slmops.gateway.handlers import Agent
from slmops.gateway.report.presence import Presence
from slmops.gateway.report.reporter import Reporter, Status
from slmops.gateway.report.spool import Kind, Spool
from slmops.gateway.settings import Settings
from slmops.gateway.twin import Twin
from slmops.kit.bus.client import BusClient
from slmops.kit.cancellation import cancel_and_wait

T0 = datetime(2030, 1, 1, tzinfo=UTC)
WHO = Identity(gateway_id="gw-1", blueprint="edge-chat", labels={"ring": "fleet"})
STATUS = Status(UpdatePhase.COMMITTED, digest_of(b"1"), "1.0.0", digest_of(b"1"), measured={"tokens_per_s": 30.0})


class Device:
    """The reporting half of a gateway without a network."""

    def __init__(self, home: Path, max_rows: int = 1000) -> None:
        self.now = T0
        self.spool = Spool(home / "spool.db", max_rows=max_rows)
        self.reporter = Reporter(WHO, self.spool, home / "report.sequence", lambda: self.now)

    async def reports(self) -> list[GatewayReported]:
        await self.reporter.flush()
        found = [one for one in self.spool.pending(1000) if "reported" in one.subject]
        return [GatewayReported.model_validate_json(one.payload) for one in found]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


async def test_a_status_that_did_not_change_is_not_reported_again(device: Device) -> None:
    for _ in range(5):
        device.now += timedelta(minutes=1)
        device.reporter.report_changes(STATUS)
    assert [report.sequence for report in await device.reports()] == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": UpdatePhase.SOAKING},
        {"running": None, "running_version": None},
        {"target": digest_of(b"2")},
        {"problem": Problem(code="disk_full", what="no space")},
        {"plan_generation": 2},
        {"measured": {"tokens_per_s": 31.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_every_change_is_reported_once(device: Device, changes: dict[str, Any]) -> None:
    changed = Status(**(vars(STATUS) | changes))
    for status in (STATUS, changed, changed, STATUS):
        device.reporter.report_changes(status)
    assert [report.sequence for report in await device.reports()] == [1, 2, 3]


async def test_another_enrolment_is_reported_although_the_status_is_the_same(device: Device) -> None:
    """A gateway that returned after its revocation is counted again by its next report."""
    device.reporter.report_changes(STATUS)
    device.reporter.report_as(WHO, 2)
    device.reporter.report_changes(STATUS)
    assert [report.enrolment for report in await device.reports()] == [0, 2]


async def test_dropped_messages_are_reported_when_the_network_is_back_and_not_again_and_again_before(
    tmp_path: Path,
) -> None:
    device = Device(tmp_path, max_rows=2)
    device.reporter.report_changes(STATUS)
    for number in range(3):
        await device.reporter.flush()
        device.spool.put("measure.gw-1", {}, b"{}", f"batch {number}", Kind.MEASUREMENT)
        device.reporter.report_changes(STATUS)
    assert [report.sequence for report in await device.reports()] == [1]
    assert device.spool.dropped(Kind.MEASUREMENT) == 2
    device.spool.done(device.spool.newest)
    device.reporter.report_changes(STATUS)
    device.reporter.report_changes(STATUS)
    assert [(report.sequence, report.dropped_measurements) for report in await device.reports()] == [(2, 2)]


async def test_a_report_that_was_lost_on_a_full_disk_is_made_again(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_sequence: int) -> None:
        raise DiskFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(device.reporter, "_store_sequence", full)
        device.reporter.report_changes(STATUS)
        assert await device.reports() == []
    device.reporter.report_changes(STATUS)
    assert [report.sequence for report in await device.reports()] == [2]


async def test_a_full_report_follows_after_the_interval_although_nothing_changed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "_LOOK_EVERY_S", 0.001)
    agent: Any = Agent.__new__(Agent)
    agent._reporter, agent._started = device.reporter, asyncio.Event()
    agent._started.set()
    agent._status = lambda: STATUS
    agent.report()
    reporting = asyncio.create_task(agent.report_periodically(timedelta(seconds=0.02)))
    async with asyncio.timeout(20):
        while len(await device.reports()) < 3:  # noqa: ASYNC110 (the reporting task makes them)
            await asyncio.sleep(0)
    await cancel_and_wait([reporting])
    assert {report.phase for report in await device.reports()} == {UpdatePhase.COMMITTED}


# ---- presence ---------------------------------------------------------------------------------------------


class Bus(BusClient):
    """A connection that records published messages, and that the test disconnects."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any], Mapping[str, str]]] = []
        self.reconnected: Callable[[], None] = lambda: None

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self.reconnected = callback

    async def tell(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> bool:
        self.told.append((subject, json.loads(payload), headers))
        return True


class Sending:
    """A task that sends presence messages. Pauses are noted and take no time, until `held` is cleared."""

    def __init__(self, bus: Bus) -> None:
        self.pauses: list[tuple[float, float]] = []
        self.held = asyncio.Event()

        def uniform(low: float, high: float) -> float:
            self.pauses.append((low, high))
            return 3600.0 if self.held.is_set() else 0.0

        content = GatewayPresence(enrolment=2, sequence=17)
        presence = Presence("gw-1", lambda: content, timedelta(minutes=10), lambda: T0, uniform)
        self.task = asyncio.create_task(presence.send(bus))


@pytest.fixture
async def bus() -> Bus:
    return Bus()


@pytest.fixture
async def sending(bus: Bus) -> AsyncIterator[Sending]:
    sending = Sending(bus)
    yield sending
    await cancel_and_wait([sending.task])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (the sending task changes it)
            await asyncio.sleep(0)


async def test_a_presence_message_is_small_and_says_what_the_gateway_reported_last(sending: Sending, bus: Bus) -> None:
    await until(lambda: len(bus.told) > 2)
    subject, content, headers = bus.told[0]
    assert (subject, content) == ("presence.gw-1", {"enrolment": 2, "sequence": 17})
    assert headers == {"slmops-sent-at": "2030-01-01T00:00:00.000+00:00"}
    assert len(json.dumps(content)) < 100


async def test_messages_are_five_to_ten_minutes_apart_and_the_first_one_within_a_minute(
    sending: Sending, bus: Bus
) -> None:
    await until(lambda: len(bus.told) > 2)
    assert sending.pauses[:3] == [(0, 60.0), (300.0, 600.0), (300.0, 600.0)]
    assert 3 * timedelta(seconds=sending.pauses[1][1]) <= OFFLINE_AFTER


async def test_after_a_reconnection_the_first_message_is_again_at_a_random_time(sending: Sending, bus: Bus) -> None:
    sending.held.set()
    await until(lambda: bool(sending.pauses) and sending.pauses[-1][1] == 600.0)
    told, pauses = len(bus.told), len(sending.pauses)
    bus.reconnected()
    await until(lambda: len(sending.pauses) > pauses)
    assert sending.pauses[-1] == (0, 60.0), "and not at once: the whole fleet may have reconnected"
    assert len(bus.told) == told


async def test_no_presence_message_is_kept_for_later() -> None:
    """nats-py would buffer it while it reconnects."""
    connection: Any = type("Connection", (), {"is_connected": False})()
    client: Any = BusClient.__new__(BusClient)
    client.connection = connection
    assert not await client.tell("presence.gw-1", b"{}", {})


def test_an_interval_by_which_a_connected_gateway_would_be_shown_as_offline_is_refused() -> None:
    field = Settings.model_fields["presence_every"]
    assert field.default <= OFFLINE_AFTER / 3
    with pytest.raises(ValueError, match="less than or equal"):
        Settings.__pydantic_validator__.validate_assignment(
            Settings.model_construct(), "presence_every", timedelta(minutes=11)
        )


# ---- the plan ---------------------------------------------------------------------------------------------


class Follower:
    def desired_changed(self, *_: Any) -> None: ...

    def plan_refused(self, error: Exception) -> None: ...


async def test_a_refused_plan_is_read_again_within_minutes_and_a_followed_one_seldom() -> None:
    refused = True

    async def open_plan(_data: bytes) -> Any:
        if refused:
            raise PermanentError("not trusted")
        raise AssertionError

    twin = Twin(WHO, open_plan, Follower(), timedelta(minutes=15))
    assert twin._pause() == timedelta(minutes=15)
    pauses = []
    for sequence in range(4):
        await twin._apply("blueprint.edge-chat", b"{}", sequence + 1)
        pauses.append(twin._pause().total_seconds() / 60)
    assert pauses == [1, 2, 4, 4]
    twin.move_to(WHO)
    assert twin._pause() == timedelta(minutes=15)

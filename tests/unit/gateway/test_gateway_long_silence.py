"""A gateway without a network for months keeps its newest state, counts what it drops, and writes readable files."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from disk_calls import DAMAGES, DiskCalls, changes

from slmops.contracts.descriptor import digest_of
from slmops.contracts.errors import MessageTooLarge, Problem
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.plan import Identity
from slmops.contracts.results import LINE_LIMIT_BYTES, RESULTS_LIMIT_BYTES
from slmops.gateway.report.reporter import Reporter, Status
from slmops.gateway.report.sealed import Results
from slmops.gateway.report.spool import Kind, Spool
from slmops.gateway.serving.measurements import ReleaseMeasurement
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import new_user_seed
from slmops.kit.sealed_results import ResultsFile

WHO = Identity(gateway_id="gw-1", blueprint="edge-chat")
HEARTBEAT = Status(UpdatePhase.COMMITTED)
FAILURE = Status(
    UpdatePhase.FAILED, target=digest_of(b"bad"), problem=Problem(code="inference_failed", what="wrong answers")
)
RELEASE = digest_of(b"release")


class Gateway:
    """The reporting half of a gateway without a network. Its clock is moved by the test."""

    def __init__(self, home: Path, max_rows: int) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.home = home
        self.spool = Spool(home / "spool.db", max_rows=max_rows)
        self.reporter = Reporter(WHO, self.spool, home / "report.sequence", lambda: self.now)

    async def beat(self, times: int) -> None:
        """Sends this many heartbeats, and a measurement for every tenth."""
        for number in range(times):
            self.now += timedelta(seconds=30)
            self.reporter.report(HEARTBEAT)
            if number % 10 == 0:
                self.reporter.measure({RELEASE: ReleaseMeasurement(RELEASE)}, {RELEASE: "1.0.0"}, {})
        await self.reporter.flush()

    def reports(self) -> list[GatewayReported]:
        found = [message for message in self.spool.pending(1000) if "reported" in message.subject]
        return [GatewayReported.model_validate_json(message.payload) for message in found]


async def test_measurements_are_numbered_since_the_start_of_the_agent(tmp_path: Path) -> None:
    """So the telemetry service recognizes repetitions without an id for each."""
    for start in range(2):
        gateway = Gateway(tmp_path, max_rows=100)
        gateway.now += timedelta(days=start)
        await gateway.beat(30)
        await gateway.reporter.close()
    found = [message for message in gateway.spool.pending(1000) if message.subject == "measure.gw-1"]
    batches = [MeasurementBatch.model_validate_json(message.payload) for message in found]
    assert [batch.sequence for batch in batches] == [1, 2, 3, 1, 2, 3]
    assert len({(batch.boot, batch.sequence) for batch in batches}) == 6
    assert len({batch.boot for batch in batches}) == 2


async def test_a_gateway_without_a_network_for_months_keeps_its_newest_report_and_failure(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, max_rows=20)
    gateway.reporter.report(FAILURE)
    await gateway.beat(200)
    assert len(gateway.spool) == 20
    reports = gateway.reports()
    assert [(report.sequence, report.phase) for report in reports] == [(1, "failed"), (201, "committed")]
    assert len(gateway.spool.pending(1000)) - len(reports) == 18, "measurements get the room of outdated reports"


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_power_loss_during_a_report_never_makes_later_reports_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What matters is the highest sequence, so a lower one after the restart would silence the gateway."""
    home = tmp_path / "home"
    home.mkdir()
    calls, disks = DiskCalls(monkeypatch, home), list[Path]()

    def copy(name: str, path: Path) -> None:
        if changes(name) and path.name == "report.sequence":
            disks.append(tmp_path / f"disk-{len(disks)}")
            calls.copy_after_power_loss(home, disks[-1], DAMAGES[damage])

    gateway = Gateway(home, max_rows=100)
    calls.before = copy
    await gateway.beat(3)
    calls.before = lambda name, path: None
    assert len(disks) >= 9
    for disk in disks:
        before = max((report.sequence for report in Gateway(disk, max_rows=100).reports()), default=0)
        again = Gateway(disk, max_rows=100)
        await again.beat(1)
        assert again.reports()[-1].sequence > before, disk.name


def test_the_number_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "report.sequence").write_text("123")
    assert Gateway(tmp_path, max_rows=10).reporter._sequence == 123


async def test_a_report_says_how_many_messages_were_dropped_before_it(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, max_rows=20)
    await gateway.beat(400)
    await gateway.beat(1)
    last = gateway.reports()[-1]
    assert (last.dropped_reports, last.dropped_measurements) == (399, 21)
    assert gateway.spool.dropped(*Kind) == 399 + 1 + 22


async def test_the_file_of_results_of_a_full_spool_is_one_that_is_read(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, max_rows=20)
    await gateway.beat(200)
    gateway.spool.put("s", {}, b"x" * LINE_LIMIT_BYTES, "longer than a line may be", Kind.MEASUREMENT)
    gateway.reporter.report(HEARTBEAT)
    await gateway.reporter.flush()
    Results(tmp_path, WHO, new_user_seed(), gateway.spool, timedelta(), lambda: gateway.now).export()
    file = ResultsFile(tmp_path / "gw-1.slmops-results")
    assert len(list(file.messages())) == len(gateway.spool) - 1


def test_the_largest_spool_fits_into_a_file_of_results(tmp_path: Path) -> None:
    """A payload is JSON, so escaping it again at most doubles it."""
    limit: int = Spool.__init__.__kwdefaults__["max_bytes"]
    rows: int = Spool.__init__.__kwdefaults__["max_rows"]
    assert 2 * limit + 100 * rows < RESULTS_LIMIT_BYTES


class Bus(BusClient):
    def __init__(self) -> None:
        self.stored: list[str] = []

    async def store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        if len(payload) > 1 << 20:
            raise MessageTooLarge("too large")
        self.stored.append(subject)


async def test_a_message_that_the_bus_does_not_take_holds_up_no_other(tmp_path: Path) -> None:
    gateway, bus = Gateway(tmp_path, max_rows=20), Bus()
    gateway.spool.put("huge", {}, b"x" * (2 << 20), "huge", Kind.MEASUREMENT)
    huge = Status(UpdatePhase.FAILED, problem=Problem(code="internal", what="x" * (3 << 20)))
    gateway.reporter.report(huge)
    sending = asyncio.create_task(gateway.reporter.send(bus))
    await until(lambda: bool(bus.stored) and len(gateway.spool) == 0)
    sending.cancel()
    assert bus.stored == ["slmops.gateway.reported.v1.gw-1"]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that wrote to a SQLite database, by commit."""
    found: list[str] = []
    connect = sqlite3.connect

    class Recording(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                found.append(threading.current_thread().name)
            return super().execute(sql, *rest)

    def opened(*args: Any, **options: Any) -> sqlite3.Connection:
        return connect(*args, **options, factory=Recording)

    monkeypatch.setattr(sqlite3, "connect", opened)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (another thread fills it)
            await asyncio.sleep(0)


async def test_the_event_loop_never_waits_for_the_spool_and_a_batch_of_acknowledgements_is_one_write(
    tmp_path: Path, writes: list[str]
) -> None:
    gateway = Gateway(tmp_path, max_rows=1000)
    await gateway.beat(50)
    assert len(gateway.spool) == 55
    before = len(writes)
    bus = Bus()
    sending = asyncio.create_task(gateway.reporter.send(bus))
    await until(lambda: len(gateway.spool) == 0)
    sending.cancel()
    assert len(bus.stored) == 55
    assert len(writes) == before + 1
    here = threading.current_thread().name
    assert here not in writes[2:], "opening a spool, at the start, is the only write on the loop's thread"

"""A gateway with a full disk still sends reports: from memory, with sequence numbers that need no disk space."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from slmops.contracts.errors import DiskFull, Problem
from slmops.contracts.events import GatewayReported, UpdatePhase
from slmops.contracts.plan import Identity
from slmops.gateway.app import Gateway
from slmops.gateway.disk_full import raise_disk_full
from slmops.gateway.report.reporter import Reporter, Status
from slmops.gateway.report.spool import Spool
from slmops.gateway.settings import Settings
from slmops.kit.bus.client import BusClient
from slmops.kit.disk import DiskWatch

STATUS = Status(UpdatePhase.IDLE, problem=Problem(code="disk_full", what="x" * 100_000))


class Bus(BusClient):
    """Records published reports."""

    def __init__(self) -> None:
        self.stored: list[GatewayReported] = []

    async def store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        self.stored.append(GatewayReported.model_validate_json(payload))


def reporter(home: Path, *, full: bool = False) -> tuple[Reporter, Spool]:
    spool = Spool(home / "spool.db")
    if full:  # SQLite then fails as on a full disk
        spool._db.execute("PRAGMA max_page_count = 1")
    identity = Identity(gateway_id="gw-1", blueprint="edge-chat")
    return Reporter(identity, spool, home / "report.sequence", lambda: datetime.now(UTC)), spool


async def sent(reporter: Reporter, count: int) -> list[GatewayReported]:
    bus = Bus()
    sending = asyncio.create_task(reporter.send(bus))
    async with asyncio.timeout(5):
        while len(bus.stored) < count:  # noqa: ASYNC110 (the sending task fills it)
            await asyncio.sleep(0)
    sending.cancel()
    return bus.stored


async def test_reports_are_sent_from_memory_when_the_disk_is_full(tmp_path: Path) -> None:
    reports, spool = reporter(tmp_path, full=True)
    reports.report(STATUS)
    reports.report(STATUS)
    await reports.flush()
    assert len(spool) == 0
    found = await sent(reports, 2)
    assert [(report.sequence, report.problem) for report in found] == [(1, STATUS.problem), (2, STATUS.problem)]


async def test_sequence_numbers_are_stored_in_place_and_never_reused(tmp_path: Path) -> None:
    first, _ = reporter(tmp_path)
    first.report(STATUS)
    await first.flush()
    file = (tmp_path / "report.sequence").stat().st_ino
    first.report(STATUS)
    await first.flush()
    assert (tmp_path / "report.sequence").stat().st_ino == file, "a new file would need disk space"
    second, _ = reporter(tmp_path)
    second.report(STATUS)
    assert [report.sequence for report in await sent(second, 3)] == [1, 2, 3]


async def test_after_an_empty_sequence_file_the_next_report_is_still_the_newest(tmp_path: Path) -> None:
    (tmp_path / "report.sequence").touch()  # as after a crash on a full disk
    began = int(datetime.now(UTC).timestamp())
    reports, _ = reporter(tmp_path)
    reports.report(STATUS)
    await reports.flush()
    assert int((tmp_path / "report.sequence").read_text()) > began


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_raises_a_temporary_error_with_the_path(number: int) -> None:
    with (
        pytest.raises(DiskFull, match="not enough disk space to store it") as error,
        raise_disk_full("to store it", Path("/here")),
    ):
        raise OSError(number, "")
    assert error.value.where == "/here"


def test_another_error_is_not_converted() -> None:
    with pytest.raises(PermissionError), raise_disk_full("to store it", Path("/here")):
        raise PermissionError(errno.EACCES, "")


async def test_health_says_that_the_disk_is_full_and_asks_for_no_restart(tmp_path: Path) -> None:
    part: Any = SimpleNamespace(started=True, release=None, ready=False)
    disks = DiskWatch([tmp_path], floor_bytes=1 << 60)
    gateway = Gateway(Settings.model_construct(), part, part, part, part, part, part, disks)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway._health()), base_url="http://gw") as http:
        answer = await http.get("/health")
    assert answer.status_code == 200
    [disk] = answer.json()["degraded"]
    assert (disk["path"], disk["floor_bytes"]) == (str(tmp_path), 1 << 60)


async def test_a_lost_or_damaged_counter_starts_anew_with_other_message_ids(tmp_path: Path) -> None:
    """The bus and the spool would take a report with an id that was used before for a repetition, and drop it."""
    first, spool = reporter(tmp_path)
    first.report(STATUS)
    await first.flush()
    await first.close()
    for number, damage in enumerate((b"\0" * 20, None), start=2):
        file = tmp_path / "report.sequence"
        file.unlink() if damage is None else file.write_bytes(damage)
        again, _ = reporter(tmp_path)
        again.report(STATUS)
        await again.flush()
        await again.close()
        assert len(spool.pending()) == number
    found = [GatewayReported.model_validate_json(message.payload) for message in spool.pending()]
    first_number, after_damage, after_loss = (report.sequence for report in found)
    assert (first_number, after_loss) == (1, 1)
    assert after_damage > 1_000_000_000, "a damaged file may have been higher than any number of reports"
    assert len({report.boot for report in found}) == 3

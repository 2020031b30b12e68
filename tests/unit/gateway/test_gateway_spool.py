"""The spool: order, bounds, and its content after kill -9 and on a full disk."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.contracts.errors import DiskFull
from slmops.gateway.report.spool import Spool


def test_messages_stay_pending_in_order_until_they_are_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put("a.report", {"ce-id": "1", "é": "ü"}, b"\x00\xff", "1")
    spool.put("a.report", {}, b"two", "2")
    first, second = spool.pending()
    assert (first.subject, first.headers, first.payload, first.message_id) == (
        "a.report",
        {"ce-id": "1", "é": "ü"},
        b"\x00\xff",
        "1",
    )
    spool.done([first.id, first.id, 999])
    assert [message.message_id for message in spool.pending()] == ["2"]
    assert len(spool) == 1
    spool.done([second.id])
    assert spool.pending() == []


def test_a_message_put_twice_is_stored_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put("a", {}, b"1", "same")
    spool.put("a", {}, b"1", "same")
    assert len(spool) == len(spool.pending()) == 1


@pytest.mark.parametrize("bounds", [{"max_rows": 3}, {"max_bytes": 3 * 103}])
def test_the_oldest_measurements_are_dropped_and_counted_and_reports_are_kept(
    tmp_path: Path, bounds: dict[str, int]
) -> None:
    spool = Spool(tmp_path / "spool.db", **bounds)
    for number in range(6):
        spool.put("m", {}, b"x" * 100, f"measurement {number}", droppable=True)
    assert [message.message_id for message in spool.pending()] == [f"measurement {n}" for n in (3, 4, 5)]
    for number in range(4):
        spool.put("r", {}, b"x" * 100, f"report {number}")
    assert [message.message_id for message in spool.pending()] == [f"report {n}" for n in range(4)]
    spool.put("m", {}, b"x", "no room", droppable=True)
    assert len(spool) == 4
    assert spool.dropped == 7
    spool.close()
    again = Spool(tmp_path / "spool.db", **bounds)
    assert (again.dropped, len(again)) == (7, 4)


def test_a_stored_message_survives_kill_9(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from slmops.gateway.report.spool import Spool
spool = Spool(Path(sys.argv[1]))
for n in range(10**6):
    spool.put("s", {}, b"x" * 1000, str(n))
    print(n, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "spool.db"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if int(line) == 20:
                os.kill(process.pid, signal.SIGKILL)
                break
        seen = max([20, *(int(line) for line in process.stdout)])
    kept = [int(message.message_id) for message in Spool(tmp_path / "spool.db").pending(10**6)]
    assert kept[: seen + 1] == list(range(seen + 1))
    assert len(kept) <= seen + 2


def test_a_full_disk_raises_an_error_and_keeps_stored_messages(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put("a", {}, b"first", "first")
    spool._db.execute("PRAGMA max_page_count = 16")
    with pytest.raises(DiskFull):
        spool.put("a", {}, b"x" * 10**6, "large")
    assert [message.message_id for message in spool.pending()] == ["first"]
    assert len(spool) == 1
    spool.put("a", {}, b"small", "small")
    assert len(spool) == 2


def test_a_stored_message_survives_power_loss(tmp_path: Path) -> None:
    """With synchronous=FULL in WAL mode, SQLite fsyncs every commit (sqlite.org/pragma.html#pragma_synchronous)."""
    spool = Spool(tmp_path / "spool.db")
    assert spool._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert sqlite3.connect(tmp_path / "spool.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)

"""The spool: order, bounds, and its content after kill -9 and on a full disk."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.contracts.errors import DiskFull
from slmops.gateway.report.spool import Kind, Spool


def test_messages_stay_pending_in_order_until_they_are_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put("a.report", {"ce-id": "1", "é": "ü"}, b"\x00\xff", "1", Kind.REPORT)
    spool.put("a.report", {}, b"two", "2", Kind.REPORT)
    first, second = spool.pending()
    assert (first.subject, first.headers, first.payload, first.message_id) == (
        "a.report",
        {"ce-id": "1", "é": "ü"},
        b"\x00\xff",
        "1",
    )
    spool.done(first.id)
    spool.done(first.id)
    assert [message.message_id for message in spool.pending()] == ["2"]
    assert len(spool) == 1
    spool.done(second.id)
    assert spool.pending() == []


def test_a_message_put_twice_is_stored_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put("a", {}, b"1", "same", Kind.REPORT)
    spool.put("a", {}, b"1", "same", Kind.REPORT)
    assert len(spool) == len(spool.pending()) == 1


def held(spool: Spool) -> list[str]:
    return [message.message_id for message in spool.pending(1000)]


@pytest.mark.parametrize("bounds", [{"max_rows": 3}, {"max_bytes": 3 * 103}])
def test_a_full_spool_drops_old_reports_before_measurements_and_keeps_the_newest_report_and_failure(
    tmp_path: Path, bounds: dict[str, int]
) -> None:
    spool = Spool(tmp_path / "spool.db", **bounds)

    def put(kind: Kind, *names: str) -> None:
        for name in names:
            spool.put("s", {}, b"x" * 100, name, kind)

    put(Kind.REPORT, "r0", "r1")
    put(Kind.MEASUREMENT, "m0", "m1")
    assert held(spool) == ["r1", "m0", "m1"], "the older report goes first"
    put(Kind.FAILURE, "f0", "f1")
    assert held(spool) == ["r1", "m1", "f1"], "the newest of each kind of report stays"
    put(Kind.REPORT, "r2", "r3")
    assert held(spool) == ["m1", "f1", "r3"]
    put(Kind.MEASUREMENT, "m2", "m3")
    assert held(spool) == ["f1", "r3", "m3"]
    found = [spool.dropped(kind) for kind in (Kind.REPORT, Kind.FAILURE, Kind.MEASUREMENT)]
    assert (found, spool.dropped(*Kind), len(spool)) == ([3, 1, 3], 7, 3)
    spool.close()
    again = Spool(tmp_path / "spool.db", **bounds)
    assert (again.dropped(*Kind), len(again)) == (7, 3)


def test_a_spool_of_an_older_release_is_opened_and_bounded(tmp_path: Path) -> None:
    """The older release never dropped reports, so they may exceed the bounds."""
    old = sqlite3.connect(tmp_path / "spool.db", isolation_level=None)
    old.executescript("""
        CREATE TABLE message (
            id INTEGER PRIMARY KEY AUTOINCREMENT, message_id TEXT NOT NULL UNIQUE, subject TEXT NOT NULL,
            headers TEXT NOT NULL, payload BLOB NOT NULL, droppable INTEGER NOT NULL, size_bytes INTEGER NOT NULL
        ) STRICT;
        CREATE TABLE dropped (only INTEGER PRIMARY KEY CHECK (only = 1), messages INTEGER NOT NULL) STRICT;
        INSERT INTO dropped VALUES (1, 4);
    """)
    for number in range(6):
        row = (f"r{number}", "s", "{}", b"", 0, 3)
        old.execute("INSERT INTO message VALUES (NULL, ?, ?, ?, ?, ?, ?)", row)
    old.close()
    spool = Spool(tmp_path / "spool.db", max_rows=2)
    assert held(spool) == ["r4", "r5"]
    assert (spool.dropped(Kind.REPORT), spool.dropped(Kind.MEASUREMENT)) == (4, 4)


def test_a_stored_message_survives_kill_9(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from slmops.gateway.report.spool import Kind, Spool
spool = Spool(Path(sys.argv[1]))
for n in range(10**6):
    spool.put("s", {}, b"x" * 1000, str(n), Kind.REPORT)
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
    spool.put("a", {}, b"first", "first", Kind.REPORT)
    spool._db.execute("PRAGMA max_page_count = 16")
    with pytest.raises(DiskFull):
        spool.put("a", {}, b"x" * 10**6, "large", Kind.REPORT)
    assert [message.message_id for message in spool.pending()] == ["first"]
    assert len(spool) == 1
    spool.put("a", {}, b"small", "small", Kind.REPORT)
    assert len(spool) == 2


def test_acknowledged_messages_that_a_full_disk_keeps_are_not_pending_and_go_later(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    for name in ("first", "second", "third"):
        spool.put("a", {}, b"x", name, Kind.REPORT)
    first, second, _ = spool.pending()
    spool._db.execute("PRAGMA query_only = ON")  # no write works any more
    with pytest.raises(sqlite3.OperationalError):
        spool.done(first.id)
    assert held(spool) == ["second", "third"]
    spool._db.execute("PRAGMA query_only = OFF")
    spool.done(second.id)
    assert (held(spool), len(spool)) == (["third"], 1)


def test_a_stored_message_survives_power_loss(tmp_path: Path) -> None:
    """With synchronous=FULL in WAL mode, SQLite fsyncs every commit (sqlite.org/pragma.html#pragma_synchronous)."""
    spool = Spool(tmp_path / "spool.db")
    assert spool._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert sqlite3.connect(tmp_path / "spool.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)

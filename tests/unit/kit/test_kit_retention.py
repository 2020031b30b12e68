"""What would grow for ever or hold up everything else is bounded, and a database of the release before is read."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import MetaData

from slmops.contracts.errors import MessageTooLarge
from slmops.contracts.events import ModelVersionRetired
from slmops.kit.journal import Journal
from slmops.kit.rotating_file import RotatingFile
from slmops.local.process import bound_log
from slmops.telemetry import store

RELEASES = Path(__file__).parents[2] / "migrations"
T0 = datetime(2030, 1, 1, tzinfo=UTC)


def test_a_trace_file_and_its_predecessor_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "service.jsonl"
    file = RotatingFile(path, limit_bytes=100)
    for number in range(1000):
        file.write(f"{number:04}\n")
    file.flush()
    assert path.read_text().endswith("0999\n")
    assert [one.stat().st_size <= 100 for one in sorted(path.parent.iterdir())] == [True, True]
    kept = (path.with_name("service.jsonl.1").read_text() + path.read_text()).split()
    assert kept == [f"{number:04}" for number in range(1000 - len(kept), 1000)]


def test_a_trace_file_is_continued_after_a_restart(tmp_path: Path) -> None:
    RotatingFile(tmp_path / "t", limit_bytes=10).write("12345678\n")
    RotatingFile(tmp_path / "t", limit_bytes=10).write("next\n")
    assert ((tmp_path / "t.1").read_text(), (tmp_path / "t").read_text()) == ("12345678\n", "next\n")


def test_a_log_is_emptied_while_its_process_writes_it(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    code = "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)"
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=out, text=True)
    assert process.stdin
    process.stdin.write("x" * 100 + "\n")
    process.stdin.flush()
    while log.stat().st_size < 101:
        pass
    bound_log(log, limit_bytes=1000)
    assert log.stat().st_size == 101
    bound_log(log, limit_bytes=100)
    process.stdin.write("next\n")
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert (log.read_text(), (tmp_path / "service.log.1").read_text()) == ("next\n", "x" * 100 + "\n")


def opened(path: Path, now: datetime) -> Journal:
    metadata = MetaData()
    return Journal(
        f"sqlite:///{path}", service="t", metadata=metadata, migrations=None, project=lambda *_: None, clock=lambda: now
    )


async def test_an_event_that_the_bus_does_not_take_is_refused_before_it_holds_up_the_others(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j.db", T0)
    await journal.open()
    huge = ModelVersionRetired(model="m", version="1.0.0", reason="x" * (1 << 20), at=T0)
    with pytest.raises(MessageTooLarge):
        await journal.transact(lambda unit: unit.append("s", 0, [huge]))
    assert await journal.outbox() == []
    await journal.close()


async def test_consumed_ids_are_forgotten_after_their_time(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j.db", T0)
    await journal.open()
    assert await journal.transact(lambda unit: unit.first_time("c", "1"))
    assert await journal.forget_consumed(T0) == 0
    assert not await journal.transact(lambda unit: unit.first_time("c", "1"))
    assert await journal.forget_consumed(T0 + timedelta(seconds=1)) == 1
    assert await journal.transact(lambda unit: unit.first_time("c", "1"))
    await journal.close()


@pytest.mark.parametrize("times", [1, 2])
async def test_ids_that_an_older_release_consumed_count_from_the_upgrade(tmp_path: Path, times: int) -> None:
    with sqlite3.connect(tmp_path / "j.db") as old:
        old.executescript((RELEASES / "0.1" / "telemetry.sql").read_text())
        old.execute("INSERT INTO consumed (id) VALUES ('c/1')")
    for turn in range(times):
        journal = Journal(
            f"sqlite:///{tmp_path}/j.db",
            service="telemetry",
            metadata=store.schema(),
            migrations=store.MIGRATIONS,
            project=store.project,
            clock=lambda: T0,
        )
        await journal.open()
        assert not await journal.transact(lambda unit: unit.first_time("c", "1"))
        assert await journal.transact(lambda unit: unit.first_time("c", "2")) == (turn == 0)
        assert await journal.forget_consumed(datetime.now(UTC) - timedelta(minutes=1)) == 0
        await journal.close()

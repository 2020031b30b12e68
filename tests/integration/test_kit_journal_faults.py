"""A database that is missing, full, read-only or disconnected: typed errors with a fix, and no partial state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest
from integration.kit_counter import Counter
from integration.kit_small_disk import PASSED, run_on_a_small_disk
from sqlalchemy import create_engine, text

from slmops.contracts.errors import Unreachable


@pytest.fixture
def database(postgres: str) -> str:
    """Returns the URL of an empty database for this test."""
    name = f"test_{uuid4().hex}"
    with create_engine(postgres, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return postgres.rpartition("/")[0] + f"/{name}"


async def test_the_error_for_an_unreachable_database_has_its_address_but_no_password() -> None:
    counter = Counter("postgresql+psycopg://slmops:hunter2@127.0.0.1:1/journal")
    async with asyncio.timeout(10):
        with pytest.raises(Unreachable) as caught:
            await counter.journal.open()
    assert "127.0.0.1:1/journal" in str(caught.value.where)
    assert "hunter2" not in str(caught.value)
    assert "SLMOPS_DATABASE_URL" in str(caught.value.fix)
    await counter.journal.close()


@pytest.mark.parametrize(
    "path", ["{tmp}", "{tmp}/file/journal.db", "{tmp}/file"], ids=["folder", "below a file", "text"]
)
async def test_the_error_for_an_unusable_database_path_names_the_path(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("this is a text file and not a database" * 100)
    where = path.format(tmp=tmp_path)
    counter = Counter(f"sqlite:///{where}")
    with pytest.raises(Unreachable) as caught:
        await counter.journal.open()
    assert where in str(caught.value.where)
    await counter.journal.close()


async def test_a_missing_folder_is_created(tmp_path: Path) -> None:
    counter = Counter(f"sqlite:///{tmp_path}/new/folder/journal.db")
    await counter.journal.open()
    assert await counter.step() == 1
    await counter.journal.close()


async def test_several_processes_can_open_a_new_database_at_the_same_time(database: str) -> None:
    counters = [Counter(database) for _ in range(4)]
    await asyncio.gather(*(counter.journal.open() for counter in counters))
    assert sorted(await asyncio.gather(*(counter.step() for counter in counters))) == [1, 2, 3, 4]
    for counter in counters:
        await counter.journal.close()


async def test_connections_closed_by_the_database_are_reopened(database: str) -> None:
    counter = Counter(database)
    await counter.journal.open()
    await counter.step()
    with create_engine(database, isolation_level="AUTOCOMMIT").connect() as connection:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = :name"
        connection.execute(text(cut), {"name": database.rpartition("/")[2]})
    assert await counter.step() == 2
    await counter.journal.close()


def test_a_full_or_read_only_disk_is_an_error_and_stored_events_are_kept(tmp_path: Path) -> None:
    assert run_on_a_small_disk(tmp_path / "disk", "journal").strip() == PASSED


def test_a_full_disk_makes_a_process_degraded_until_there_is_space(tmp_path: Path) -> None:
    assert run_on_a_small_disk(tmp_path / "disk", "health").strip() == PASSED


def test_a_command_on_a_full_disk_prints_its_answer_and_one_warning(tmp_path: Path) -> None:
    assert run_on_a_small_disk(tmp_path / "disk", "command").strip() == PASSED

"""The revisions of every journal, on SQLite and on PostgreSQL, on empty databases and on those of earlier releases.

A revision is missing? Write it: cd tests && python -m migrations.new_revision SERVICE "What changes".
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from contract.wire_examples import EVENTS
from migrations.journals import JOURNALS, fill, state
from sqlalchemy import Connection, MetaData, create_engine, inspect, select, text

from slmops.contracts.errors import IncompatibleDatabase
from slmops.contracts.events import CohortMeasured
from slmops.kit.journal import Journal
from slmops.kit.migrations import newest_revision
from slmops.rollout import inventory_rows
from slmops.rollout import store as rollout
from slmops.rollout.progress_rows import progress_of

RELEASES = Path(__file__).parents[1] / "migrations"
HOW_TO = 'write the missing revision: cd tests && python -m migrations.new_revision {} "What changes"'
MEASURED = next(event for event in EVENTS if isinstance(event, CohortMeasured))  # no journal projects it

every_service = pytest.mark.parametrize("service", JOURNALS)
every_release = pytest.mark.parametrize(  # a service may be younger than a release
    ("release", "service"), sorted((path.parent.name, path.stem) for path in RELEASES.glob("[0-9]*/*.json"))
)


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A connection of another program, whose changes are committed at the end."""
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def contents(url: str) -> dict[str, list[Any]]:
    """Returns every row of a database by table."""
    with connected(url) as connection:
        metadata = MetaData()
        metadata.reflect(connection)
        return {
            name: [tuple(row) for row in connection.execute(select(t))] for name, t in sorted(metadata.tables.items())
        }


def structure(connection: Connection) -> dict[str, Any]:
    """Returns the structure of all tables, including what `compare_metadata` ignores: keys, defaults, autoincrement."""
    found = inspect(connection)
    return {
        table: {
            "columns": {c["name"]: {**c, "type": str(c["type"])} for c in found.get_columns(table)},
            "key": found.get_pk_constraint(table),
            "indexes": sorted(map(_index, found.get_indexes(table)), key=repr),
            "unique": sorted(found.get_unique_constraints(table), key=repr),
        }
        for table in found.get_table_names()
        if table != "alembic_version"
    }


def _index(found: Any) -> dict[str, Any]:
    options = {name: str(value) for name, value in found.get("dialect_options", {}).items()}
    return {**found, "dialect_options": options}


def load_release(release: str, service: str, url: str) -> None:
    """Makes the database of a release: its SQLite dump, or on PostgreSQL its tables with the rows of the dump."""
    dump = (RELEASES / release / f"{service}.sql").read_text()
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
            database.executescript(dump)
        return
    file = sqlite3.connect(":memory:")
    file.row_factory = sqlite3.Row
    file.executescript(dump)
    with connected(url) as connection:
        connection.exec_driver_sql((RELEASES / release / f"{service}.postgres.sql").read_text())
        metadata = MetaData()
        metadata.reflect(connection)
        for table in metadata.tables.values():
            booleans = {c.name for c in table.columns if c.type.python_type is bool}
            for row in file.execute(f'SELECT * FROM "{table.name}"'):
                values = {name: bool(row[name]) if name in booleans else row[name] for name in row.keys()}  # noqa: SIM118
                connection.execute(table.insert(), values)
            for column in (c for c in table.columns if c.autoincrement is True):
                sequence = f"pg_get_serial_sequence('{table.name}', '{column.name}')"
                connection.execute(text(f"SELECT setval({sequence}, (SELECT max({column.name}) FROM {table.name}))"))


def includes(now: Any, before: Any) -> bool:
    """Returns whether everything that a release read is read today. Later releases may read more fields."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(key in now and includes(now[key], before[key]) for key in before)
    if isinstance(before, list):
        return isinstance(now, list) and len(now) == len(before) and all(map(includes, now, before))
    return bool(now == before)


@every_service
async def test_the_revisions_create_the_current_tables(service: str, database_url: str) -> None:
    journal = JOURNALS[service].journal(service, database_url)
    await journal.open()
    await journal.close()
    with connected(database_url) as connection:
        differences = compare_metadata(MigrationContext.configure(connection), journal.metadata)
        assert differences == [], HOW_TO.format(service)
        migrated = structure(connection)
        journal.metadata.drop_all(connection)
        journal.metadata.create_all(connection)
        assert migrated == structure(connection)


@every_release
async def test_a_database_of_an_earlier_release_is_migrated_and_read_completely(
    release: str, service: str, database_url: str
) -> None:
    load_release(release, service, database_url)
    journal = JOURNALS[service].journal(service, database_url)
    await journal.open()
    before = json.loads((RELEASES / release / f"{service}.json").read_text())
    now = await state(service, journal)
    assert includes(now, before), f"was {before}\nis {now}"
    await journal.transact(lambda unit: unit.emit("later", [MEASURED]))
    assert len(await journal.history()) == len(before["history"]) + 1
    with connected(database_url) as connection:
        assert compare_metadata(MigrationContext.configure(connection), journal.metadata) == []
    await journal.close()


@every_release
async def test_the_database_of_a_release_has_rows_in_every_table(release: str, service: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/j.db"
    load_release(release, service, url)
    assert [table for table, rows in contents(url).items() if not rows] == []


async def test_a_rollout_that_an_earlier_release_started_gets_its_places(database_url: str) -> None:
    load_release("0.1", "rollout", database_url)
    journal = JOURNALS["rollout"].journal("rollout", database_url)
    await journal.open()
    await journal.transact(rollout.count_places)
    [plan] = await journal.read(rollout.plans)
    state = await journal.transact(lambda unit: rollout.load(unit, plan.name))
    assert state.under_way is not None
    found = await journal.read(partial(progress_of, rollout=state.under_way.id, stage=9, limit=9))
    [member] = await journal.read(inventory_rows.members)
    assert [target.gateway_id for target in found.first_waiting] == [member.identity.gateway_id]
    assert (plan.generation, plan.filled) == (state.under_way.generation, True)
    await journal.close()


@every_service
async def test_the_state_is_the_same_after_a_restart(service: str, tmp_path: Path) -> None:
    """The rows of the current release are read unchanged after another start."""
    url = f"sqlite:///{tmp_path}/j.db"
    journal = JOURNALS[service].journal(service, url)
    await journal.open()
    await fill(service, journal)
    before = await state(service, journal)
    await journal.close()
    again = JOURNALS[service].journal(service, url)
    await again.open()
    assert await state(service, again) == before
    await again.close()


# ---- refused ----------------------------------------------------------------------------------------------


async def refusal(service: str, url: str) -> IncompatibleDatabase:
    """Returns the error, and checks that nothing was written."""
    before = contents(url)
    journal = JOURNALS[service].journal(service, url)
    with pytest.raises(IncompatibleDatabase) as caught:
        await journal.open()
    await journal.close()
    assert contents(url) == before
    assert caught.value.where is not None
    assert url.rpartition("/")[2] in caught.value.where
    assert "SLMOPS_DATABASE_URL" in str(caught.value.fix)
    return caught.value


@every_service
async def test_a_database_of_a_newer_release_is_refused_and_not_changed(service: str, database_url: str) -> None:
    journal = JOURNALS[service].journal(service, database_url)
    await journal.open()
    await journal.close()
    with connected(database_url) as connection:
        connection.execute(text(f"UPDATE alembic_version SET version_num = '{service}_9999'"))
    error = await refusal(service, database_url)
    assert f"{service}_9999" in error.what
    assert "newer release" in str(error.fix)


async def test_the_database_of_another_service_is_refused_and_not_changed(database_url: str) -> None:
    """Packager and rollout both have tables named `packages`, `withdrawn` and `gateways`."""
    packager = JOURNALS["packager"].journal("packager", database_url)
    await packager.open()
    await packager.close()
    assert "revision packager_" in (await refusal("rollout", database_url)).what


async def test_the_database_of_another_service_without_a_revision_is_refused_and_not_changed(database_url: str) -> None:
    load_release("0.1", "packager", database_url)
    assert "lacks" in (await refusal("rollout", database_url)).what


# ---- starts -----------------------------------------------------------------------------------------------

OPEN = """
import asyncio, sys
from migrations.journals import JOURNALS
journal = JOURNALS["registry"].journal("registry", sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(journal.open())
"""


@pytest.mark.parametrize("before", ["nothing", "0.1"])
async def test_processes_that_start_at_the_same_time_migrate_once(database_url: str, before: str) -> None:
    if before != "nothing":
        load_release(before, "registry", database_url)
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", OPEN, database_url),
            cwd=RELEASES.parent,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout
        assert await process.stdout.readline() == b"ready\n"
    ends = await asyncio.gather(*(process.communicate(b"\n") for process in processes))
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert len(contents(database_url)["alembic_version"]) == 1


async def test_several_journals_of_one_process_can_be_opened_at_the_same_time(tmp_path: Path) -> None:
    """Tests open several journals in one process, and Alembic's `op` is one global of the process."""
    journals = [kept.journal(name, f"sqlite:///{tmp_path}/{name}.db") for name, kept in JOURNALS.items()]
    await asyncio.gather(*(journal.open() for journal in journals))
    for journal in journals:
        await journal.close()
    for name in JOURNALS:
        [revision] = contents(f"sqlite:///{tmp_path}/{name}.db")["alembic_version"]
        assert f"{name}_" in str(revision)


async def test_a_start_without_a_new_revision_changes_nothing(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "slmops.kit.revisions")
    for expected in (1, 1):
        journal = JOURNALS["registry"].journal("registry", database_url)
        await journal.open()
        await journal.close()
        assert caplog.text.count("migrated from nothing to registry_") == expected
    assert caplog.text.count("migrated") == 1


OPEN_AND_TELL = """
import asyncio, sys
from migrations.journals import JOURNALS
journal = JOURNALS["registry"].journal("registry", sys.argv[1])
asyncio.run(journal.open())
print("alembic" in sys.modules)
"""


async def test_only_a_start_with_something_to_do_imports_alembic(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", OPEN_AND_TELL, f"sqlite:///{tmp_path}/j.db"),
            cwd=RELEASES.parent,
            stdout=asyncio.subprocess.PIPE,
        )
        said.append((await process.communicate())[0].strip())
    assert said == [b"True", b"False"]


@every_service
def test_the_newest_revision_is_read_from_the_headers(service: str) -> None:
    folder = JOURNALS[service].store.MIGRATIONS
    assert newest_revision(folder) == ScriptDirectory(folder).get_current_head()


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["revision, down_revision = 'r1', None"],
        ["revision = 'r1'"],
        ["revision = 'r1'\ndown_revision = None", "revision = 'r2'\ndown_revision = None"],
        ["revision = 'r1'\ndown_revision = None", "import r2"],
    ],
    ids=["none", "in one line", "no predecessor", "two newest", "no header"],
)
def test_headers_that_do_not_tell_the_newest_revision_are_left_to_alembic(headers: list[str], tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    for number, header in enumerate(headers):
        (tmp_path / "versions" / f"{number}.py").write_text(header)
    assert newest_revision(tmp_path) is None


REVISION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = {revision!r}, {before!r}
def upgrade():
    op.create_table({revision!r}, sa.Column("id", sa.Integer, primary_key=True))
    op.execute({then!r})
"""


async def test_a_start_whose_revision_fails_changes_nothing_and_can_be_repeated(
    database_url: str, tmp_path: Path
) -> None:
    versions = tmp_path / "folder" / "versions"
    versions.mkdir(parents=True)

    def write(number: int, then: str) -> None:
        names = {"revision": f"r{number}", "before": f"r{number - 1}" if number > 1 else None}
        (versions / f"{number}.py").write_text(REVISION.format(**names, then=then))

    def journal() -> Journal:
        return Journal(
            database_url, service="x", metadata=MetaData(), migrations=versions.parent, project=lambda *_: None
        )

    write(1, "INSERT INTO r1 VALUES (1)")
    await (first := journal()).open()
    await first.close()
    before = contents(database_url)
    write(2, "UPDATE r1 SET id = 2")
    write(3, "INSERT INTO nothing VALUES (1)")
    with pytest.raises(Exception, match="nothing"):
        await (failing := journal()).open()
    await failing.close()
    assert contents(database_url) == before
    write(3, "UPDATE r1 SET id = id + 1")
    await (fixed := journal()).open()
    await fixed.close()
    assert contents(database_url) == {"alembic_version": [("r3",)], "r1": [(3,)], "r2": [], "r3": []}

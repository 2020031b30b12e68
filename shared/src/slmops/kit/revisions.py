"""Runs the revisions that a database lacks, with Alembic and without files beside the revisions.

Invariants
1. All revisions of a start run in one transaction, in which no other process writes: a start that fails or is killed
   changes nothing, and a second process that starts at the same time finds the work done.
2. A database with a revision that this release does not have is refused before anything is written to it. Revisions
   carry the name of their service, so a database of another service is refused too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect

from slmops.contracts.errors import IncompatibleDatabase

log = logging.getLogger(__name__)
_alembic_op = Lock()  # `alembic.op`, which revisions import, is one global of the process


def run_revisions(connection: Connection, folder: Path, where: str) -> None:
    """Runs the revisions in `folder/versions` that the database lacks, in the transaction of `connection`.

    Called by `slmops.kit.migrations.migrate`, whose conditions apply. A database without a revision that holds the
    tables of the first one was made before there were revisions, and continues from there. `where` names the database
    in errors. Raises `IncompatibleDatabase`.
    """
    scripts, context = ScriptDirectory(folder), MigrationContext.configure(connection)
    current = _current(context, scripts, where)
    newest = scripts.get_current_head()
    if current is None and _is_unversioned(connection, scripts, where):
        current = scripts.get_base()
        assert current is not None
        context.stamp(scripts, current)
        log.info("the database was made without a revision; it has the tables of %s", current)
    if current != newest:
        _run(context, scripts, current, newest)
        log.info("the database was migrated from %s to %s", current or "nothing", newest)


def _current(context: MigrationContext, scripts: ScriptDirectory, where: str) -> str | None:
    """Returns the revision of a database; None if it has none."""
    known = {script.revision for script in scripts.walk_revisions()}
    heads = context.get_current_heads()
    if not known.issuperset(heads):
        raise IncompatibleDatabase(
            f"the database has revision {', '.join(heads)}, and this release knows {', '.join(sorted(known))}",
            where=where,
            fix="A newer release or another service made it: start that release, restore a backup from before the "
            "upgrade, or set SLMOPS_DATABASE_URL to this service's own database.",
        )
    return heads[0] if heads else None


def _is_unversioned(connection: Connection, scripts: ScriptDirectory, where: str) -> bool:
    """Returns True for the tables of the first revision, and False for an empty database."""
    expected, found = _columns_of_first(scripts), _columns(connection)
    if not expected.keys() & found.keys():
        return False
    missing = [table for table in expected if table not in found]
    missing += [f"{t}.{c}" for t, columns in expected.items() if t in found for c in sorted(columns - found[t])]
    if missing:
        raise IncompatibleDatabase(
            f"the database has no revision and lacks {', '.join(missing)} of {scripts.get_base()}",
            where=where,
            fix="Another service or an old development version made it: set SLMOPS_DATABASE_URL to this service's own "
            "database, or restore a backup.",
        )
    return True


def _columns_of_first(scripts: ScriptDirectory) -> dict[str, set[str]]:
    """Returns the tables of the first revision, by running it on an empty database in memory."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        _run(context := MigrationContext.configure(connection), scripts, None, scripts.get_base())
        tables = _columns(connection)
    engine.dispose()
    del tables[context.version_table]
    return tables


def _columns(connection: Connection) -> dict[str, set[str]]:
    found = inspect(connection)
    return {table: {column["name"] for column in found.get_columns(table)} for table in found.get_table_names()}


def _run(context: MigrationContext, scripts: ScriptDirectory, after: str | None, until: str | None) -> None:
    with _alembic_op, Operations.context(context):
        for script in reversed(list(scripts.iterate_revisions(until, after or "base"))):
            script.module.upgrade()
            context.stamp(scripts, script.revision)

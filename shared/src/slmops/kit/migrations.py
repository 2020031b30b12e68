"""Brings the database of a journal to the tables of this release; imports Alembic only if there is something to do.

Nearly every start finds the newest revision in the database. Importing Alembic takes longer than everything else that
such a start does with its database, so the newest revision is read from the headers of the files first.
"""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import Connection, inspect, text

_NAMED = re.compile(r"""^(revision|down_revision)\b[^=\n]*=\s*(?:["']([^"'\n]+)["']|None)\s*(?:#.*)?$""", re.MULTILINE)


def migrate(connection: Connection, folder: Path, where: str) -> None:
    """Runs the revisions in `folder/versions` that the database lacks, in the transaction of `connection`.

    The caller's transaction must exclude all other writers. `where` names the database in errors. Raises
    `IncompatibleDatabase` for a database with a revision that this release does not have, before anything is written.
    """
    newest = newest_revision(folder)
    if newest is not None and _stored(connection) == [newest]:
        return
    from slmops.kit.revisions import run_revisions  # imports Alembic

    run_revisions(connection, folder, where)


def newest_revision(folder: Path) -> str | None:
    """Returns the only revision on which no other follows; None if the headers of the files do not tell it.

    A header is a plain assignment at the beginning of a line, as `new_revision` writes it: `revision = "x_0002"`.
    """
    headers = [
        {name: value or None for name, value in _NAMED.findall(path.read_text(encoding="utf-8"))}
        for path in (folder / "versions").glob("*.py")
    ]
    if not all(header.get("revision") and "down_revision" in header for header in headers):
        return None
    newest = {header["revision"] for header in headers} - {header["down_revision"] for header in headers}
    return newest.pop() if len(newest) == 1 else None


def _stored(connection: Connection) -> list[str]:
    """Returns the revisions in the database, none if it has no table of them."""
    if not inspect(connection).has_table("alembic_version"):
        return []
    return [str(row[0]) for row in connection.execute(text("SELECT version_num FROM alembic_version"))]

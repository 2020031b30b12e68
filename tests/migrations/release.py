"""Writes what a release leaves in a database, for the tests of the releases after it.

`cd tests && python -m migrations.release migrations/0.2`, run with the code of that release, writes for every service a
SQL dump of its SQLite database and the state that its queries read from it. Files of a release are never written again.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
from pathlib import Path

from migrations.journals import JOURNALS, fill, state


async def write(folder: Path) -> None:
    folder.mkdir()
    for service, kept in JOURNALS.items():
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "journal.db"
            journal = kept.journal(service, f"sqlite:///{file}")
            await journal.open()
            await fill(service, journal)
            found = await state(service, journal)
            await journal.close()
            with sqlite3.connect(file) as database:
                dump = "\n".join(database.iterdump()) + "\n"
        (folder / f"{service}.sql").write_text(dump)
        (folder / f"{service}.json").write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1])))

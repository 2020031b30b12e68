"""The spool: keeps messages on disk until the bus has acknowledged them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.errors import DiskFull

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id TEXT NOT NULL UNIQUE,
    subject TEXT NOT NULL,
    headers TEXT NOT NULL,
    payload BLOB NOT NULL,
    droppable INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS dropped (only INTEGER PRIMARY KEY CHECK (only = 1), messages INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO dropped VALUES (1, 0);
"""


@dataclass(frozen=True, slots=True)
class Spooled:
    id: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    message_id: str


class Spool:
    """A queue in SQLite, in order of arrival. A message survives kill -9 and power loss once `put` has returned.

    Bounded: above `max_bytes` or `max_rows`, the oldest droppable messages (measurements) are dropped and counted.
    Others (reports) are never dropped; they are few, and may exceed the bounds. One process owns the file.
    """

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, max_rows: int = 100_000) -> None:
        self._max_bytes, self._max_rows = max_bytes, max_rows
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._rows: int
        self._bytes: int
        totals = "SELECT count(*), ifnull(sum(size_bytes), 0) FROM message"
        self._rows, self._bytes = self._db.execute(totals).fetchone()

    def put(
        self, subject: str, headers: dict[str, str], payload: bytes, message_id: str, *, droppable: bool = False
    ) -> None:
        """Stores a message on disk; ignores a `message_id` that is already stored. Raises `DiskFull`."""
        head = json.dumps(headers)
        size_bytes = len(subject) + len(head) + len(payload)
        row = (message_id, subject, head, payload, droppable, size_bytes)
        with self._transaction():
            added = self._db.execute(
                "INSERT OR IGNORE INTO message (message_id, subject, headers, payload, droppable, size_bytes)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                row,
            ).rowcount
            rows, size = self._make_room(self._rows + added, self._bytes + added * size_bytes)
        self._rows, self._bytes = rows, size

    def pending(self, limit: int = 100, after: int = 0) -> list[Spooled]:
        """Returns up to `limit` messages with an id above `after`, oldest first."""
        rows = self._db.execute(
            "SELECT id, subject, headers, payload, message_id FROM message WHERE id > ? ORDER BY id LIMIT ?",
            (after, limit),
        )
        return [Spooled(id, subject, json.loads(headers), payload, mid) for id, subject, headers, payload, mid in rows]

    def done(self, ids: Iterable[int]) -> None:
        """Deletes acknowledged messages; ignores unknown ids. Raises `DiskFull`."""
        with self._transaction():
            rows, size = self._delete(ids)
        self._rows, self._bytes = self._rows - rows, self._bytes - size

    @property
    def newest(self) -> int:
        """The id of the newest message; 0 if the spool is empty."""
        found: int = self._db.execute("SELECT ifnull(max(id), 0) FROM message").fetchone()[0]
        return found

    def __len__(self) -> int:
        return self._rows

    @property
    def dropped(self) -> int:
        """How many messages were dropped in total because of the bounds; survives restarts."""
        messages: int = self._db.execute("SELECT messages FROM dropped").fetchone()[0]
        return messages

    def close(self) -> None:
        self._db.close()

    def _make_room(self, rows: int, size: int) -> tuple[int, int]:
        """Drops the oldest droppable messages until the bounds hold. Returns the remaining rows and bytes."""
        victims: list[int] = []
        cursor = self._db.execute("SELECT id, size_bytes FROM message WHERE droppable ORDER BY id")
        while (rows > self._max_rows or size > self._max_bytes) and (oldest := cursor.fetchone()):
            victims.append(oldest[0])
            rows, size = rows - 1, size - oldest[1]
        if victims:
            self._delete(victims)
            self._db.execute("UPDATE dropped SET messages = messages + ?", (len(victims),))
        return rows, size

    def _delete(self, ids: Iterable[int]) -> tuple[int, int]:
        freed = [
            self._db.execute("DELETE FROM message WHERE id = ? RETURNING size_bytes", (id,)).fetchone() for id in ids
        ]
        sizes = [row[0] for row in freed if row]
        return len(sizes), sum(sizes)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Runs the block in one transaction. Raises `DiskFull`."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise DiskFull("not enough disk space to spool a message", fix="Free disk space on the gateway.") from error
        finally:
            # SQLite may already have rolled back, as it does on a full disk.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

"""The spool: keeps messages on disk until the bus has acknowledged them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from threading import Lock

from slmops.contracts.errors import DiskFull


class Kind(IntEnum):
    """What a message is. The values are stored. Decides what is dropped when the spool is full (`Spool`)."""

    REPORT = 0
    MEASUREMENT = 1
    FAILURE = 2
    """A report of a release that failed on this gateway."""


_DROPPED_FIRST = (Kind.REPORT, Kind.FAILURE, Kind.MEASUREMENT)
"""Nobody needs a report after a newer one has arrived, but every measurement counts."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id TEXT NOT NULL UNIQUE,
    subject TEXT NOT NULL,
    headers TEXT NOT NULL,
    payload BLOB NOT NULL,
    kind INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS message_kind ON message (kind);
CREATE TABLE IF NOT EXISTS loss (kind INTEGER PRIMARY KEY, messages INTEGER NOT NULL) STRICT;
"""
_MIGRATION = """
BEGIN IMMEDIATE;
ALTER TABLE message RENAME COLUMN droppable TO kind;
CREATE TABLE loss (kind INTEGER PRIMARY KEY, messages INTEGER NOT NULL) STRICT;
INSERT INTO loss SELECT 1, messages FROM dropped;
DROP TABLE dropped;
COMMIT;
"""
"""From the schema without kinds: it had measurements (droppable = 1) and reports (0), and dropped only measurements."""


@dataclass(frozen=True, slots=True)
class Spooled:
    id: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    message_id: str


class Spool:
    """A queue in SQLite, in order of arrival. A message survives kill -9 and power loss once `put` has returned.

    Bounded: above `max_bytes` or `max_rows`, messages are dropped and counted, the oldest first: reports, then
    failures, then measurements. The newest report and the newest failure are never dropped, so the gateway's state
    arrives however long there was no network. Only one process may open the file. Methods wait for the disk and may be
    called from any thread; `len` and `dropped` do not wait.
    """

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, max_rows: int = 100_000) -> None:
        self._max_bytes, self._max_rows = max_bytes, max_rows
        self._lock = Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if self._db.execute("SELECT 1 FROM pragma_table_info('message') WHERE name = 'droppable'").fetchone():
            self._db.executescript(_MIGRATION)
        self._db.executescript(_SCHEMA)
        self._rows: int
        self._bytes: int
        totals = "SELECT count(*), ifnull(sum(size_bytes), 0) FROM message"
        self._rows, self._bytes = self._db.execute(totals).fetchone()
        self._done = 0
        """Messages up to this id are acknowledged. On a full disk they may still be in the file."""
        self._dropped = dict.fromkeys(Kind, 0) | {
            Kind(kind): messages for kind, messages in self._db.execute("SELECT kind, messages FROM loss")
        }
        with suppress(DiskFull):  # the next message makes room
            self._bound()

    def put(self, subject: str, headers: dict[str, str], payload: bytes, message_id: str, kind: Kind) -> None:
        """Stores a message on disk; ignores a `message_id` that is already stored. Raises `DiskFull`."""
        head = json.dumps(headers)
        size_bytes = len(subject) + len(head) + len(payload)
        row = (message_id, subject, head, payload, kind, size_bytes)
        with self._transaction():
            added = self._db.execute(
                "INSERT OR IGNORE INTO message (message_id, subject, headers, payload, kind, size_bytes)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                row,
            ).rowcount
            rows, size, dropped = self._make_room(self._rows + added, self._bytes + added * size_bytes)
        self._rows, self._bytes, self._dropped = rows, size, dropped

    def pending(self, limit: int = 100, after: int = 0) -> list[Spooled]:
        """Returns up to `limit` unacknowledged messages with an id above `after`, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id, subject, headers, payload, message_id FROM message WHERE id > ? ORDER BY id LIMIT ?",
                (max(after, self._done), limit),
            ).fetchall()
        return [Spooled(id, subject, json.loads(headers), payload, mid) for id, subject, headers, payload, mid in rows]

    def done(self, last: int) -> None:
        """Deletes the messages up to id `last`, which the bus has acknowledged, in one write.

        Raises `DiskFull` if they cannot be deleted now. They are not pending, and the next call deletes them.
        """
        self._done = max(self._done, last)
        with self._transaction():
            sizes = self._db.execute("DELETE FROM message WHERE id <= ? RETURNING size_bytes", (last,)).fetchall()
        self._rows, self._bytes = self._rows - len(sizes), self._bytes - sum(size for (size,) in sizes)

    @property
    def newest(self) -> int:
        """The id of the newest message; 0 if the spool is empty."""
        with self._lock:
            found: int = self._db.execute("SELECT ifnull(max(id), 0) FROM message").fetchone()[0]
        return found

    def __len__(self) -> int:
        return self._rows

    def dropped(self, *kinds: Kind) -> int:
        """Returns how many messages of these kinds were ever dropped because of the bounds; survives restarts."""
        return sum(self._dropped[kind] for kind in kinds)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _bound(self) -> None:
        with self._transaction():
            rows, size, dropped = self._make_room(self._rows, self._bytes)
        self._rows, self._bytes, self._dropped = rows, size, dropped

    def _make_room(self, rows: int, size: int) -> tuple[int, int, dict[Kind, int]]:
        """Drops messages until the bounds hold. Returns the remaining rows and bytes, and what was ever dropped."""
        dropped = dict(self._dropped)
        for kind in _DROPPED_FIRST:
            victims: list[tuple[int]] = []
            # Only the oldest are read: the index on `kind` is ordered by id.
            cursor = self._db.execute(
                "SELECT id, size_bytes FROM message WHERE kind = ? AND id < ? ORDER BY id", (kind, self._kept(kind))
            )
            while (rows > self._max_rows or size > self._max_bytes) and (oldest := cursor.fetchone()):
                victims.append((oldest[0],))
                rows, size, dropped[kind] = rows - 1, size - oldest[1], dropped[kind] + 1
            if victims:
                self._db.executemany("DELETE FROM message WHERE id = ?", victims)
                self._db.execute("INSERT OR REPLACE INTO loss VALUES (?, ?)", (kind, dropped[kind]))
        return rows, size, dropped

    def _kept(self, kind: Kind) -> int:
        """Returns the id from which messages of this kind are not dropped."""
        if kind is Kind.MEASUREMENT:
            return 1 << 62
        newest: int = self._db.execute("SELECT ifnull(max(id), 0) FROM message WHERE kind = ?", (kind,)).fetchone()[0]
        return newest

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Runs the block in one transaction. Raises `DiskFull`."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    raise
                fix = "Free disk space on the gateway."
                raise DiskFull("not enough disk space to spool a message", fix=fix) from error
            finally:
                # SQLite may already have rolled back, as it does on a full disk.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

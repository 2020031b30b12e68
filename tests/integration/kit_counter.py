"""The smallest service on a journal: it counts the versions of an alias and keeps a read table.

As a process (`python kit_counter.py URL`) it writes as fast as it can and prints each acknowledged write.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, delete, insert, select

from slmops.contracts.events import Event, ModelAliasMoved
from slmops.kit.journal import Journal, UnitOfWork

AT = datetime(2026, 1, 2, tzinfo=UTC)


class Counter:
    """`stream` holds one `ModelAliasMoved` per step; its version number is the count."""

    def __init__(self, url: str) -> None:
        metadata = MetaData()
        self.now = Table("now", metadata, Column("model", String(63), primary_key=True), Column("count", Integer))
        self.journal = Journal(url, service="counter", metadata=metadata, migrations=None, project=self._project)

    def _project(self, connection: Connection, event: Event) -> None:
        assert isinstance(event, ModelAliasMoved)
        if event.alias == "unprojectable":
            raise RuntimeError("the read table cannot hold this")
        connection.execute(delete(self.now).where(self.now.c.model == event.model))
        connection.execute(insert(self.now).values(model=event.model, count=int(event.version.split(".")[0])))

    async def step(self, model: str = "m", alias: str = "stable", *, fail: bool = False) -> int:
        """Reads, decides and appends one event. Returns the new count."""

        def work(unit: UnitOfWork) -> int:
            events, version = unit.load(model)
            assert len(events) == version
            count = version + 1
            unit.append(model, version, [moved(model, alias, count)])
            if fail:
                raise ValueError("decided otherwise")
            return count

        return await self.journal.transact(work)

    async def count(self, model: str = "m") -> int:
        """Returns the count in the read table."""

        def query(connection: Connection) -> int:
            return connection.execute(select(self.now.c.count).where(self.now.c.model == model)).scalar() or 0

        return await self.journal.read(query)


def moved(model: str, alias: str, count: int) -> ModelAliasMoved:
    return ModelAliasMoved(model=model, alias=alias, version=f"{count}.0.0", at=AT)


async def write_for_ever(url: str) -> None:
    counter = Counter(url)
    await counter.journal.open()
    while True:
        print(await counter.step(), flush=True)


if __name__ == "__main__":
    asyncio.run(write_for_ever(sys.argv[1]))

"""A small service as a process of its own, for tests that kill it. Its arguments select what it does.

python kit_service_double.py LOG [die-at-work] [broken-task]
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from slmops.contracts.commands import ListVersions, VersionList
from slmops.contracts.errors import Denied
from slmops.contracts.measurement import MeasurementBatch
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.service import Service
from slmops.kit.settings import BusSettings, load

LOG = Path(sys.argv[1])


def note(line: str) -> None:
    with LOG.open("a") as log:
        log.write(line + "\n")


async def on_batch(batch: MeasurementBatch, _: MessageContext) -> None:
    note(f"begin {batch.batch_id}")
    if "die-at-work" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    note(f"done {batch.batch_id}")


async def list_versions(_: ListVersions) -> VersionList:
    return VersionList(versions=())


async def async_note(line: str) -> None:
    note(line)


async def task() -> None:
    if "broken-task" in sys.argv:
        await asyncio.sleep(0.2)
        raise Denied("the task may not go on")
    await asyncio.Event().wait()


def main() -> None:
    settings = load(BusSettings)
    bus = Bus("registry", settings)
    bus.consume("measure.*", MeasurementBatch, on_batch, ack_wait_s=1)
    bus.serve(ListVersions, list_versions)
    opening, closing = [lambda: async_note("open")], [lambda: async_note("close")]
    Service("registry", settings, bus, opening=opening, tasks=[task], closing=closing).run()


if __name__ == "__main__":
    main()

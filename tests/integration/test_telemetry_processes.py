"""Three processes of telemetry share the work, and one is killed in the middle: every batch counts exactly once."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import forked
import pytest
from integration.rollout_world import eventually
from integration.test_telemetry import ON_BOTH, Measured, batch, measured_on

from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.subjects import durable_name
from slmops.local.ports import choose_ports

PROCESSES = ("telemetry", "telemetry-2", "telemetry-3")
BATCHES, WINDOWS, PART = 3000, 5, 250
DURABLE = durable_name("telemetry", "measure.*")


@ON_BOTH
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Measured]:
    async with AsyncExitStack() as stack:
        measured = await measured_on(request, tmp_path, stack, killable=True)
        for name in PROCESSES[1:]:
            start_another(measured, name, tmp_path)
        yield measured


def start_another(measured: Measured, name: str, folder: Path) -> None:
    system = measured.system
    port = choose_ports(folder / f"{name}.json", [name])[name]
    settings = system.settings("telemetry") | {"http_port": str(port)}
    env = os.environ | {f"SLMOPS_{key.upper()}": value for key, value in settings.items()}
    with system.layout.log(name).open("ab") as log:
        system.processes[name] = forked.start("slmops.telemetry.app", env=env, stdout=log, stderr=log)


ENDED = datetime.now(UTC) - timedelta(seconds=60)


def part(first: int) -> list[MeasurementBatch]:
    return [
        batch(str(n), f"gw-{n % 4 + 1}", requests=n, ended_at=ENDED + timedelta(seconds=n % WINDOWS))
        for n in range(first, first + PART)
    ]


async def send(measured: Measured, batches: list[MeasurementBatch]) -> None:
    js = measured.client.js
    await asyncio.gather(
        *[
            await js.publish_async(
                f"measure.{one.gateway_id}",
                one.model_dump_json().encode(),
                headers={MESSAGE_ID_HEADER: str(uuid.uuid4())},
            )
            for one in batches
        ]
    )


async def test_a_process_is_killed_in_the_middle_of_shared_work_and_every_batch_counts_once(shared: Measured) -> None:
    """The server delivers the batches that the killed process was handling again, to other processes."""
    parts = [part(first) for first in range(0, BATCHES, PART)]
    for number, batches in enumerate(parts):
        await send(shared, batches)
        if number == len(parts) // 2:
            await eventually(lambda: in_hand(shared), bool, "a batch in work")
            shared.system.kill("telemetry")
            await send(shared, [one for repeated in parts[number - 1 : number + 1] for one in repeated])
    expected: Counter[datetime] = Counter()
    for one in (one for batches in parts for one in batches):
        expected[one.ended_at] += one.requests
    total = sum(expected.values())
    await eventually(shared.requests, lambda n: n >= total, "every request")
    await eventually(lambda: shared.unsettled("measure.*"), lambda n: n == 0, "every acknowledgement")
    found: Counter[datetime] = Counter()
    for window in await shared.windows():
        [at] = [at for at in expected if window.started_at <= at < window.ended_at]
        found[at] += window.requests
    assert found == expected
    assert await shared.dead_letters() == {}


async def in_hand(measured: Measured) -> int:
    """Returns how many messages a process has received and not acknowledged."""
    return int((await measured.client.js.consumer_info("MEASUREMENTS", DURABLE)).num_ack_pending or 0)

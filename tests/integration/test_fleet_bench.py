"""The benchmark of a fleet, small: simulated gateways through the real services, and what it counts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import forked
import pytest_asyncio
from bench.fleet_backlog import drain
from bench.fleet_deployment import REPORTS, deployment
from bench.fleet_gateway import UPDATE
from bench.fleet_rollout import Fleet, assemble, measure, not_recorded, seen_since

from slmops.local.process import ProcessSpec, spawn

GATEWAYS = 50
QUICK = {"WINDOW_S": "0.5", "GRACE_S": "0.3", "TICK_EVERY": "PT0.2S"}


class ForkedProcess:
    """A forked program with the methods of asyncio's processes that the benchmark uses."""

    def __init__(self, process: forked.Forked) -> None:
        self._process = process
        self.pid, self.terminate, self.kill = process.pid, process.terminate, process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    async def wait(self) -> int:
        return await asyncio.to_thread(self._process.wait, 30)


async def launch(spec: ProcessSpec) -> Any:
    if "-m" not in spec.argv:
        return await spawn(spec)
    with spec.log_path.open("ab") as log:
        return ForkedProcess(forked.start(spec.argv[-1], env=os.environ | dict(spec.env), stdout=log, stderr=log))


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with deployment(tmp_path, None, QUICK, launch) as deployed:
        found = await assemble(deployed, GATEWAYS, lambda _: None, by_command=GATEWAYS // 2)
        yield found
        await found.simulator.stop()


async def test_a_small_fleet_through_a_rollout_and_a_backlog(fleet: Fleet) -> None:
    figures = await measure(fleet, "2.0.0")
    assert figures["writes_per_stage"] == 1
    assert figures["reports_lost"] == 0, figures["reports_lost_by"]
    assert figures["reports_sent"] >= GATEWAYS * len(UPDATE)
    assert figures["raw_fanout_p99_s"] > 0
    assert figures["judgements"] > 0
    assert {gateway.running.version for gateway in fleet.simulator.gateways if gateway.running} == {"2.0.0"}

    fleet.simulator.updates = False
    await fleet.deployed.stop("rollout")
    await fleet.simulator.go_through_updates(fleet.simulator.gateways[:10])
    assert await not_recorded(fleet.deployed, fleet.simulator.gateways) == 10
    assert (await drain(fleet, "rollout", REPORTS)).cpu_s >= 0
    assert await not_recorded(fleet.deployed, fleet.simulator.gateways) == 0
    assert await seen_since(fleet.deployed, 0) == GATEWAYS

"""Any one service dies with SIGKILL at any step and comes back: the loop completes, nothing happens twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleet import MODEL, Operator, write_golden
from tiny_model import make_tiny_llama

from slmops.contracts.commands import ListRollouts, ListVersions
from slmops.kit.client import BusClient
from slmops.local.environment import default_gateways
from slmops.local.system import System

SERVICES = ("registry", "optimizer", "packager", "rollout", "telemetry")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    # One gateway, the canary: its rollout passes through every service.
    async with System(tmp_path / "data", gateways=default_gateways(1)) as system:
        yield system


async def events(client: BusClient, stream: str = "EVENTS") -> Counter[str]:
    """How often each event id was stored."""
    info = await client.js.stream_info(stream)
    found: Counter[str] = Counter()
    for sequence in range(1, info.state.last_seq + 1):
        message = await client.js.get_msg(stream, sequence, direct=True)
        found[f"{message.subject} {(message.headers or {})['ce-id']}"] += 1
    return found


@pytest.mark.parametrize("service", [*SERVICES, "gw-1", "nats", "s3"])
async def test_the_loop_survives_the_death_of(service: str, system: System, tiny: Path, tmp_path: Path) -> None:
    operator = await Operator.of(system)

    async def killer() -> None:
        """Again and again, so that every step of the loop meets it; less and less often, so that long steps end."""
        pause = 3.0
        while True:
            await asyncio.sleep(2)
            await system.kill(service)
            await asyncio.sleep(pause)
            pause *= 1.5

    killing = asyncio.create_task(killer())
    try:
        await operator.push(tiny, "1.0.0", write_golden(tmp_path / "golden.jsonl"))
        packaged = await operator.packaged("1.0.0")
        await operator.apply_blueprint()
        started = await operator.start_rollout("1.0.0")
        ended = await operator.ended(started.rollout)
    finally:
        killing.cancel()
    assert ended.state == "completed", ended
    await operator.fleet_on("1.0.0")

    rollouts = (await operator.retried(lambda: operator.client.request(ListRollouts()))).rollouts
    assert len(rollouts) == 1
    versions = (await operator.retried(lambda: operator.client.request(ListVersions(model=MODEL)))).versions
    assert [v.version for v in versions] == ["1.0.0"]
    assert len(versions[0].packages) == len(packaged.packages) == 1
    stored = await operator.retried(lambda: events(operator.client))
    assert [event for event, count in stored.items() if count > 1] == []
    subjects = Counter(event.split()[0] for event in stored)
    assert subjects["slmops.package.published.v1"] == 1
    assert subjects["slmops.rollout.started.v1"] == 1
    assert subjects["slmops.rollout.completed.v1"] == 1
    await operator.client.close()

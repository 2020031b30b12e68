"""Any process may be killed with SIGKILL at any step: the loop completes, and no step takes effect twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from fleet import MODEL, Operator, connect_to_all_subjects, write_golden
from servers import QUICK
from tiny_model import make_tiny_llama

from slmops.contracts.commands import ListRollouts, ListVersions
from slmops.contracts.errors import NotFound
from slmops.contracts.events import (
    CohortMeasured,
    ModelVersionRegistered,
    PackagePublished,
    RolloutStageAdvanced,
    RolloutStarted,
    VariantOptimized,
    VariantProgressed,
    VariantStarted,
)
from slmops.kit.bus.client import BusClient
from slmops.local.environment import default_gateways
from slmops.local.system import System

KILLED_AT = {
    ModelVersionRegistered.type: "s3",
    VariantStarted.type: "nats",
    VariantProgressed.type: "optimizer",
    VariantOptimized.type: "packager",
    PackagePublished.type: "registry",
    RolloutStarted.type: "gw-1",
    CohortMeasured.type: "rollout",
    RolloutStageAdvanced.type: "telemetry",
}
"""Event type -> process that is killed when the first event of this type is published: it is busy then."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
async def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Operator]:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    # One gateway, the canary: its rollout passes through every service.
    async with System(tmp_path / "data", gateways=default_gateways(1)) as system:
        operator = await Operator.connect(system)
        yield operator
        await operator.client.close()


async def kill_each_while_busy(system: System) -> None:
    """Kills each process of `KILLED_AT` once and returns."""
    remaining = dict(KILLED_AT)
    connection = await connect_to_all_subjects(system)
    subscription = await connection.subscribe("slmops.>")
    async for message in subscription.messages:
        kind = next((kind for kind in remaining if message.subject.startswith(kind)), None)
        if kind:
            await system.kill(remaining.pop(kind))
        if not remaining:
            await connection.close()
            return


async def kill_repeatedly(system: System, service: str) -> None:
    """Kills a service at every step of the loop; the pause doubles each time, so that long steps can end."""
    pause = 3.0
    while True:
        await asyncio.sleep(2)
        with suppress(NotFound):  # it has not been restarted yet
            await system.kill(service)
        await asyncio.sleep(pause)
        pause *= 2


async def events(client: BusClient, stream: str = "EVENTS") -> Counter[str]:
    """Returns how often each event id is in the stream."""
    info = await client.js.stream_info(stream)
    found: Counter[str] = Counter()
    for sequence in range(1, info.state.last_seq + 1):
        message = await client.js.get_msg(stream, sequence, direct=True)
        found[f"{message.subject} {(message.headers or {})['ce-id']}"] += 1
    return found


async def complete_the_loop(operator: Operator, tiny: Path, golden: Path) -> None:
    await operator.push(tiny, "1.0.0", golden)
    packaged = await operator.wait_until_packaged("1.0.0")
    assert len(packaged.packages) == 1
    await operator.apply_blueprint()
    started = await operator.start_rollout("1.0.0")
    ended = await operator.wait_until_ended(started.rollout)
    assert ended.state == "completed", ended
    await operator.wait_until_fleet_runs("1.0.0")


async def assert_no_duplicates(operator: Operator) -> None:
    rollouts = (await operator.retry(lambda: operator.client.request(ListRollouts()))).rollouts
    assert len(rollouts) == 1
    versions = (await operator.retry(lambda: operator.client.request(ListVersions(model=MODEL)))).versions
    assert [v.version for v in versions] == ["1.0.0"]
    assert len(versions[0].packages) == 1
    stored = await operator.retry(lambda: events(operator.client))
    assert [event for event, count in stored.items() if count > 1] == []
    subjects = Counter(event.split()[0] for event in stored)
    assert subjects["slmops.package.published.v1"] == 1
    assert subjects["slmops.rollout.started.v1"] == 1
    assert subjects["slmops.rollout.completed.v1"] == 1


@asynccontextmanager
async def in_background(kills: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    killing = asyncio.create_task(kills)
    try:
        yield killing
    finally:
        killing.cancel()


@pytest.mark.slow
async def test_the_loop_completes_when_each_process_is_killed_once_while_it_is_busy(
    operator: Operator, tiny: Path, tmp_path: Path
) -> None:
    async with in_background(kill_each_while_busy(operator.system)) as killing:
        await complete_the_loop(operator, tiny, write_golden(tmp_path / "golden.jsonl"))
        await asyncio.wait_for(killing, 10)
    assert [state.name for state in operator.system.states() if not state.restarts] == []
    await assert_no_duplicates(operator)


@pytest.mark.slow
@pytest.mark.parametrize("service", KILLED_AT.values())
async def test_the_loop_completes_when_one_process_is_killed_repeatedly(
    service: str, operator: Operator, tiny: Path, tmp_path: Path
) -> None:
    async with in_background(kill_repeatedly(operator.system, service)) as killing:
        await complete_the_loop(operator, tiny, write_golden(tmp_path / "golden.jsonl"))
        assert not killing.done()
    await assert_no_duplicates(operator)

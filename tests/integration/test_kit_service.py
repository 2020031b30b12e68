"""A service as a process: health and metrics, stop, SIGKILL, and a nats-server that restarts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from integration.kit_world import AT, World, unrestricted, until, world_on

from slmops.contracts.commands import ListVersions, VersionList
from slmops.contracts.errors import Denied, Unreachable
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus import provisioner
from slmops.kit.bus.roll_call import call_roll
from slmops.kit.bus.service_bus import Bus, MessageContext
from slmops.kit.settings import BusSettings
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.process import spawn
from slmops.local.servers import nats_answers, nats_spec

DOUBLE = Path(__file__).with_name("kit_service_double.py")
NONE = VersionList(versions=())


@dataclass
class Nats:
    """A nats-server that only these tests use, because they kill it."""

    layout: Layout
    port: int
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    async def start(self) -> None:
        self.process = await spawn(nats_spec(self.layout, self.port))
        for _ in range(500):
            if await nats_answers(self.port):
                return
            await asyncio.sleep(0.02)
        pytest.fail("nats-server does not start")

    async def kill(self) -> None:
        if self.process:
            self.process.kill()
            await self.process.wait()


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[Nats]:
    layout = Layout(tmp_path / "data")
    layout.prepare()
    server = Nats(layout, choose_ports(layout.ports_file, ["nats"])["nats"])
    await server.start()
    await provisioner.run(BusSettings(nats_url=server.url, nats_creds=layout.creds(PROVISIONER)))
    yield server
    await server.kill()


@pytest.fixture
async def world(nats: Nats) -> AsyncIterator[World]:
    creds = {path.stem: path for path in nats.layout.keys.glob("*.creds")}
    async with world_on(nats.url, creds) as world:
        yield world


@dataclass
class Process:
    popen: subprocess.Popen[str]
    http: str
    log: Path

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    async def ready(self) -> None:
        while self.health() != 200:
            assert self.popen.poll() is None, self.popen.communicate()[1]
            await asyncio.sleep(0.05)

    def health(self) -> int:
        try:
            return httpx.get(f"{self.http}/health", timeout=5).status_code
        except httpx.TransportError:
            return 0

    def get(self, path: str) -> str:
        return httpx.get(self.http + path, timeout=5, follow_redirects=True).text

    async def wait_for_exit(self) -> tuple[int, str]:
        """Waits for the exit. Returns the exit code and standard error."""
        stderr = (await asyncio.to_thread(self.popen.communicate, timeout=20))[1]
        return self.popen.returncode, stderr


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path, nats: Nats) -> Iterator[Start]:
    started: list[Process] = []

    def run(*arguments: str, **environment: str) -> Process:
        port = choose_ports(tmp_path / f"http-{len(started)}.json", ["http"])["http"]
        settings = {
            "SLMOPS_NATS_URL": nats.url,
            "SLMOPS_NATS_CREDS": str(unrestricted(nats.layout.keys, "registry")),
            "SLMOPS_HTTP_PORT": str(port),
        }
        log = tmp_path / "double.log"
        popen = subprocess.Popen(
            [sys.executable, str(DOUBLE), str(log), *arguments],
            env={**os.environ, **settings, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        process = Process(popen, f"http://{HOST}:{port}", log)
        started.append(process)
        return process

    yield run
    for process in started:
        process.popen.kill()
        process.popen.communicate()


def batch(name: str) -> MeasurementBatch:
    zero: dict[str, Any] = dict.fromkeys(
        ("requests", "failed_requests", "prompt_tokens", "completion_tokens", "decode_seconds", "ttft_seconds"), 0
    )
    about: dict[str, Any] = {"gateway_id": "gw-1", "blueprint": "edge", "release": "sha256:" + "a" * 64}
    return MeasurementBatch(batch_id=name, version="1.0.0", started_at=AT, ended_at=AT, **about, **zero)


async def measure(world: World, name: str) -> None:
    payload = batch(name).model_dump_json().encode()
    await world.client.store("measure.gw-1", payload, {"Nats-Msg-Id": name})


async def test_a_service_without_disk_space_is_degraded_and_not_restarted(
    world: World, start: Start, tmp_path: Path
) -> None:
    service = start(SLMOPS_DATA_DIR=str(tmp_path), SLMOPS_DISK_FLOOR_BYTES=str(1 << 60))
    await service.ready()
    health = json.loads(service.get("/health"))
    assert health["healthy"]
    [disk] = health["degraded"]
    assert (disk["path"], disk["floor_bytes"]) == (str(tmp_path), 1 << 60)
    assert f'slmops_disk_free_bytes{{folder="{tmp_path}"}}' in service.get("/metrics")


async def test_a_service_shows_its_health_and_metrics_and_stops_cleanly(world: World, start: Start) -> None:
    service = start()
    await service.ready()
    await measure(world, "b-1")
    await until(lambda: "done b-1" in service.lines())
    health = json.loads(service.get("/health"))
    assert (health["service"], health["healthy"], health["degraded"]) == ("registry", True, [])
    (process,) = await call_roll(world.client, ["registry"], timedelta(seconds=15))
    assert (process.service, process.pid) == ("registry", service.popen.pid)
    assert (process.version, process.revision) == (health["version"], health["revision"])
    metrics = service.get("/metrics")
    assert 'slmops_messages_total{outcome="done",service="registry",subject="measure.{gateway_id}"} 1.0' in metrics
    await until(lambda: 'slmops_stream_fill_ratio{stream="EVENTS"}' in service.get("/metrics"))
    service.popen.send_signal(signal.SIGTERM)
    code, stderr = await service.wait_for_exit()
    assert code == 0, stderr
    assert service.lines() == ["open", "begin b-1", "done b-1", "close"]
    assert all(json.loads(line)["service"] == "registry" for line in stderr.splitlines())


async def test_the_message_of_a_killed_process_is_handled_by_the_next_one(world: World, start: Start) -> None:
    first = start("die-at-work")
    await first.ready()
    await measure(world, "b-1")
    assert (await first.wait_for_exit())[0] == -signal.SIGKILL
    second = start()
    await until(lambda: "done b-1" in second.lines())
    assert second.lines() == ["open", "begin b-1", "open", "begin b-1", "done b-1"]


async def test_a_slow_handler_with_keepalives_is_not_redelivered(world: World) -> None:
    started_batches: list[str] = []
    done: list[str] = []

    async def work(found: MeasurementBatch, delivered: MessageContext) -> None:
        started_batches.append(found.batch_id)
        for _ in range(6):
            await asyncio.sleep(0.3)
            await delivered.keepalive()
        done.append(found.batch_id)

    def declare(bus: Bus) -> None:
        bus.consume("measure.*", MeasurementBatch, work, ack_wait_s=1)

    for _ in range(2):
        await world.service("telemetry", declare)
    await measure(world, "b-1")
    await until(lambda: bool(done))
    await asyncio.sleep(0.2)
    assert started_batches == done == ["b-1"]


async def test_a_service_continues_after_a_restart_of_nats_and_loses_no_message(
    world: World, nats: Nats, start: Start
) -> None:
    service = start()
    await service.ready()
    await measure(world, "before")
    await until(lambda: "done before" in service.lines())
    await nats.kill()
    assert await asyncio.to_thread(service.health) == 503
    await nats.start()
    await service.ready()
    await measure(world, "after")
    await until(lambda: "done after" in service.lines())
    assert await world.client.request(ListVersions()) == NONE
    assert service.popen.poll() is None
    # A message may be handled twice: a killed server loses acknowledgements that it has not written yet.
    assert {line for line in service.lines() if line.startswith("done")} == {"done before", "done after"}


async def test_without_a_bus_a_service_exits_with_the_code_for_a_temporary_failure(start: Start) -> None:
    service = start(SLMOPS_NATS_URL="nats://127.0.0.1:1")
    code, stderr = await service.wait_for_exit()
    assert code == Unreachable.exit_code == 75
    assert "SLMOPS_NATS_URL" in stderr.splitlines()[-1]


async def test_the_error_for_a_taken_port_names_the_port(start: Start) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        service = start(SLMOPS_HTTP_PORT=str(port))
        code, stderr = await service.wait_for_exit()
    assert code not in (0, 75)
    assert f"{HOST}:{port}" in json.loads(stderr.splitlines()[-1])["message"]
    assert service.lines() == ["open", "close"]


async def test_a_failed_background_task_stops_the_service(start: Start) -> None:
    service = start("broken-task")
    code, stderr = await service.wait_for_exit()
    assert code == Denied.exit_code
    assert "the task may not go on" in json.loads(stderr.splitlines()[-1])["message"]
    assert service.lines() == ["open", "close"]

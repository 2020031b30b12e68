"""A bus and the rollout and telemetry services as processes, for simulated fleets. Without TLS and object store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import httpx
import psutil
import psycopg
from bench.fleet_wire import Wire
from integration.kit_world import Everything
from integration.rollout_world import Operator
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.engine import make_url

from slmops.contracts.events import GatewayReported
from slmops.contracts.permissions import PROVISIONER, Permissions
from slmops.contracts.subjects import durable_name, stream_of
from slmops.contracts.tuf_names import RolloutKeys
from slmops.kit.bus import provisioner
from slmops.kit.bus.accounts import user_claims
from slmops.kit.bus.nats_auth import _new_user
from slmops.kit.settings import BusSettings
from slmops.kit.trust.keys import read_key, trusted
from slmops.local.environment import service_spec
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.process import ProcessSpec, log_tail, spawn
from slmops.local.servers import nats_spec

SERVICES = ("rollout", "telemetry")
REPORTS = f"{GatewayReported.type}.*"
_READY_WITHIN_S, _STOPPED_WITHIN_S = 120, 60
_WIRES = 32

Launch = Callable[[ProcessSpec], Awaitable[asyncio.subprocess.Process]]


@dataclass
class Deployment:
    """`settings`: environment variables of both services, without the prefix. `databases`: URL by service."""

    layout: Layout
    ports: dict[str, int]
    databases: dict[str, str]
    settings: Mapping[str, str]
    new_database: Callable[[str], str]
    launch: Launch
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    client: Everything = field(init=False)

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.ports['nats']}"

    @property
    def operator(self) -> Operator:
        return Operator(self.client)

    @property
    def keys(self) -> RolloutKeys:
        """The keys with which gateways verify plans."""
        return RolloutKeys(keys=(trusted(read_key(self.layout.plan_signing_key).public_key),))

    async def start(self, *services: str) -> None:
        await asyncio.gather(*map(self._start, services))

    async def _start(self, service: str) -> None:
        spec = service_spec(self.layout, self.ports | {"s3.api": 0}, service, tls=False)
        more = {**self.settings, "DATABASE_URL": self.databases[service]}
        await self.run(replace(spec, env={**spec.env, **{f"SLMOPS_{key}": value for key, value in more.items()}}))

    async def run(self, spec: ProcessSpec) -> None:
        """Starts a process and waits until it is ready."""
        process = self.processes[spec.name] = await self.launch(spec)
        assert spec.ready is not None
        async with asyncio.timeout(_READY_WITHIN_S):
            while not await spec.ready():
                if process.returncode is not None:
                    raise RuntimeError(f"{spec.name} does not start:\n{log_tail(spec.log_path, 30)}")
                await asyncio.sleep(0.1)

    async def stop(self, *names: str) -> None:
        """Stops processes as a supervisor does: SIGTERM, and SIGKILL later."""
        for name in names:
            process = self.processes.pop(name, None)
            if process is None or process.returncode is not None:
                continue
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOPPED_WITHIN_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    def cpu_s(self, name: str) -> float:
        """Returns the processor time that a process has used, in seconds."""
        used = psutil.Process(self.processes[name].pid).cpu_times()
        return float(used.user + used.system)

    def rss_bytes(self, *names: str) -> int:
        return sum(psutil.Process(self.processes[name].pid).memory_info().rss for name in names)

    async def metrics(self, service: str) -> dict[str, float]:
        """Returns the values of a service's metrics, by name and labels as in `name{key=value,…}`."""
        async with httpx.AsyncClient() as http:
            text = (
                await http.get(f"http://{HOST}:{self.ports[f'{service}.http']}/metrics", follow_redirects=True)
            ).text
        return {
            sample.name + "{" + ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items())) + "}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def unhandled(self, service: str, subject: str) -> int:
        """Returns how many messages a consumer of a service has not handled yet."""
        return (await self.consumed(service, subject))[0]

    async def consumed(self, service: str, subject: str) -> tuple[int, int]:
        """Returns how many messages a consumer has not handled yet, and up to which sequence it has handled all."""
        info = await self.client.js.consumer_info(stream_of(subject) or "", durable_name(service, subject))
        floor = info.ack_floor.stream_seq if info.ack_floor else 0
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0), int(floor or 0)

    async def last_sequence(self, subject: str) -> int:
        """Returns the sequence of the newest message in the stream of a subject."""
        return int((await self.client.js.stream_info(stream_of(subject) or "")).state.last_seq)

    async def dead_letters(self) -> int:
        return int((await self.client.js.stream_info("DLQ")).state.messages)

    async def wires(self, count: int = _WIRES) -> list[Wire]:
        """Returns connections of the gateways' account that may speak for every gateway.

        Their messages cross into the services' account as those of real gateways do.
        """
        everything = user_claims(Permissions((">",), (">",)))
        creds = _new_user(self.layout.authority().edge, "bench", everything)
        return [await self.wire(creds, f"_INBOX_bench.{number}") for number in range(count)]

    async def wire(self, creds: str, inbox: str, window: int = 128) -> Wire:
        return await Wire.connect(HOST, self.ports["nats"], creds, inbox, window)


@asynccontextmanager
async def deployment(
    folder: Path, database: str | None = None, settings: Mapping[str, str] | None = None, launch: Launch = spawn
) -> AsyncIterator[Deployment]:
    """Starts the bus and connects. `database`: URL of a PostgreSQL server; None: SQLite files in the folder.

    `launch` starts a process. The services are not started yet. Everything is stopped at the end.
    """
    layout = Layout(folder)
    layout.prepare()
    ports = choose_ports(layout.ports_file, ["nats", *(f"{service}.http" for service in SERVICES)])
    new_database = partial(_database, folder, database)
    deployed = Deployment(layout, ports, {s: new_database(s) for s in SERVICES}, settings or {}, new_database, launch)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(lambda: deployed.stop(*reversed(list(deployed.processes))))
        await deployed.run(nats_spec(layout, ports["nats"]))
        await provisioner.run(BusSettings(nats_url=deployed.url, nats_creds=layout.creds(PROVISIONER)))
        deployed.client = await Everything.open(deployed.url, layout.keys)
        stack.push_async_callback(deployed.client.close)
        yield deployed


def _database(folder: Path, server: str | None, name: str) -> str:
    """Returns the URL of a new database."""
    if server is None:
        (folder / "databases").mkdir(exist_ok=True)
        return f"sqlite:///{folder / 'databases' / f'{name}.db'}"
    url = make_url(server)
    name = f"{name}_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(
        host=url.host, port=url.port, user=url.username, password=url.password, dbname=url.database, autocommit=True
    ) as admin:
        admin.execute(f'CREATE DATABASE "{name}"'.encode())
    return url.set(database=name).render_as_string(hide_password=False)

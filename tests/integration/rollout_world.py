"""Rollout and telemetry on a real nats-server, with gateways that enrol, follow the plan and report.

The services run in the test's own process, or as processes of their own where a test kills them or reads their logs.

The gateways are simulated and the rest is real: credentials, permissions, twin, journal, gate.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import forked
import psycopg
import pytest
from forked import Forked
from integration.artifact_world import running
from integration.kit_world import Everything
from nats.aio.client import RawCredentials
from sqlalchemy.engine import make_url

from slmops.contracts import subjects
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.clocks import SENT_AT_HEADER
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope, event_id
from slmops.contracts.commands import (
    ApplyBlueprint,
    EnrolGateway,
    ListRollouts,
    RolloutView,
    StartRollout,
)
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.errors import NotFound, Problem
from slmops.contracts.events import Event, GatewayReported, PackagePublished, UpdatePhase
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.permissions import PROVISIONER
from slmops.contracts.plan import Identity, Plan, Release, resolve
from slmops.contracts.signed import plan_in
from slmops.kit.bus import provisioner
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import creds_text, new_user_seed, public_key
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.settings import BusSettings
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.process import log_tail, spawn
from slmops.local.servers import http_answers, nats_spec

NAME = "edge-chat"
T = TypeVar("T")
WITHIN_S = 60
TURN_S = 0.1
PRESENCE_EVERY = 3
"""Turns of a gateway between two presence messages."""


async def eventually(look: Callable[[], Awaitable[T]], true: Callable[[T], bool], what: str) -> T:
    deadline = time.monotonic() + WITHIN_S
    while not true(found := await look()):
        assert time.monotonic() < deadline, f"{what}: still {found!r}"
        await asyncio.sleep(0.05)
    return found


@dataclass
class System:
    """A nats-server and the services; `killable` services run as separate processes."""

    layout: Layout
    url: str
    databases: dict[str, str]
    http: dict[str, int]
    stack: AsyncExitStack
    killable: bool
    processes: dict[str, Forked] = field(default_factory=dict)
    nats: asyncio.subprocess.Process | None = None

    async def start_nats(self) -> None:
        """Starts the server, or starts it again with what it stored."""
        spec = nats_spec(self.layout, int(self.url.rpartition(":")[2]))
        self.nats = await spawn(spec)
        assert spec.ready is not None
        await eventually(spec.ready, bool, "nats-server")

    async def stop_nats(self) -> None:
        if self.nats is not None and self.nats.returncode is None:
            self.nats.terminate()
            await self.nats.wait()

    def settings(self, service: str) -> dict[str, str]:
        return {
            "nats_url": self.url,
            "nats_creds": str(self.layout.creds(service)),
            "database_url": self.databases[service],
            "http_port": str(self.http[service]),
            "enrolment_token": str(self.layout.enrolment_token),
            "gateway_signing_seed": str(self.layout.gateway_signing_key),
            "plan_signing_key": str(self.layout.plan_signing_key),
            "tick_every": "PT0.2S",
            "window_s": "0.5",
            "grace_s": "0.3",
        }

    def spawn(self, service: str) -> None:
        env = os.environ | {f"SLMOPS_{key.upper()}": value for key, value in self.settings(service).items()}
        with self.layout.log(service).open("ab") as log:
            self.processes[service] = forked.start(f"slmops.{service}.app", env=env, stdout=log, stderr=log)

    async def start(self, service: str) -> None:
        if self.killable:
            await self.start_process(service)
        else:
            settings = import_module(f"slmops.{service}.settings").Settings(**self.settings(service))
            app = import_module(f"slmops.{service}.app").build(settings)
            await self.stack.enter_async_context(running(app))

    async def start_process(self, service: str) -> None:
        self.spawn(service)
        deadline = time.monotonic() + WITHIN_S
        while not await http_answers(self.http[service]):
            ended = self.processes[service].poll() is not None
            if ended or time.monotonic() > deadline:
                pytest.fail(f"{service} does not start:\n{self.log(service)}")
            await asyncio.sleep(0.05)

    def kill(self, service: str) -> None:
        """Kills the service with SIGKILL, so that it cannot finish or clean up anything."""
        self.processes[service].kill()
        self.processes[service].wait()

    def log(self, service: str) -> str:
        return log_tail(self.layout.log(service), 30)

    async def connect(self, user: str, **options: Any) -> BusClient:
        """Connects as a user. The operator has all rights here, to inspect what the services did."""
        if user == "console":
            return await Everything.open(self.url, self.layout.keys, **options)
        settings = BusSettings(nats_url=self.url, nats_creds=self.layout.creds(user))
        return await BusClient.connect(settings, name=f"test {user}", **options)

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(timeout=20)


async def open_system(
    folder: Path, stack: AsyncExitStack, databases: dict[str, str] | None = None, *, killable: bool = False
) -> System:
    layout = Layout(folder)
    layout.prepare()
    ports = choose_ports(layout.ports_file, ["nats", "rollout", "telemetry"])
    databases = databases or {s: f"sqlite:///{folder}/{s}.db" for s in ("rollout", "telemetry")}
    system = System(layout, f"nats://{HOST}:{ports['nats']}", databases, ports, stack, killable)
    stack.push_async_callback(system.stop_nats)
    await system.start_nats()
    await provisioner.run(BusSettings(nats_url=system.url, nats_creds=layout.creds(PROVISIONER)))
    stack.push_async_callback(asyncio.to_thread, system.stop)
    return system


@dataclass
class Gateway:
    """A simulated gateway: enrols, follows its plan, reports and measures. Versions in `bad` fail its probe.

    When nothing changes it sends only its presence, as the real gateway does.
    """

    identity: Identity
    client: BusClient
    bad: frozenset[str] = frozenset()
    key: str = ""
    running: Release | None = None
    seen: set[str] = field(default_factory=set)
    sequence: int = 0
    boot: str = ""
    generation: int = 0
    silent: bool = False
    last_report: tuple[UpdatePhase, Release, dict[str, Any]] | None = None

    @classmethod
    async def enrol(
        cls, system: System, gateway_id: str, ring: str, bad: frozenset[str] = frozenset(), blueprint: str = NAME
    ) -> Gateway:
        seed = new_user_seed()
        identity = Identity(gateway_id=gateway_id, blueprint=blueprint, labels={"ring": ring})
        command = EnrolGateway(
            gateway_id=gateway_id,
            blueprint=blueprint,
            labels=identity.labels,
            public_key=public_key(seed),
            token=system.layout.enrolment_token.read_text(),
        )
        bootstrap = await system.connect("enrol", inbox_prefix=b"_INBOX_enrol", patient=False)
        answer = await bootstrap.request(command)
        await bootstrap.close()
        client = await BusClient.connect(
            BusSettings(nats_url=system.url),
            name=gateway_id,
            user_credentials=RawCredentials(creds_text(answer.jwt, seed)),
            inbox_prefix=f"_INBOX_{gateway_id}".encode(),
        )
        return cls(identity, client, bad, public_key(seed))

    async def run(self) -> None:
        for turn in itertools.count():
            await self.follow()
            if turn % PRESENCE_EVERY == 0:
                await self.tell_presence()
            if self.running and not self.silent:
                await self.measure(self.running)
            await asyncio.sleep(TURN_S)

    async def follow(self) -> None:
        found = await self.client.read_desired(subjects.blueprint_key(NAME))
        plan = plan_in(found[0]) if found else None
        if plan is None or plan.generation <= self.generation:
            return
        self.generation = plan.generation
        wanted = resolve(plan, (), self.identity).release
        if wanted is None:
            return
        self.seen.add(wanted.version)
        if wanted.version in self.bad:
            problem = Problem(code="inference_failed", what=f"{wanted.version} answers golden prompts wrongly")
            await self.report(UpdatePhase.FAILED, wanted, problem=problem)
            await self.report(UpdatePhase.IDLE, wanted)
            return
        self.running = wanted
        await self.report(UpdatePhase.COMMITTED, wanted)

    async def tell_presence(self, ahead: timedelta = timedelta()) -> None:
        """`ahead`: how far the gateway's clock is ahead of the real time."""
        content = GatewayPresence(sequence=self.sequence)
        sent = {SENT_AT_HEADER: (datetime.now(UTC) + ahead).isoformat()}
        subject = subjects.presence(self.identity.gateway_id)
        await self.client.tell(subject, content.model_dump_json().encode(), sent)

    async def report(self, phase: UpdatePhase, target: Release, **changes: Any) -> None:
        self.sequence += 1
        self.last_report = phase, target, changes
        event = GatewayReported(
            gateway_id=self.identity.gateway_id,
            blueprint=NAME,
            sequence=self.sequence,
            boot=self.boot,
            labels=self.identity.labels,
            phase=phase,
            running=self.running.manifest.digest if self.running else None,
            running_version=self.running.version if self.running else None,
            target=target.manifest.digest,
            plan_generation=self.generation,
            at=datetime.now(UTC),
            **changes,
        )
        await publish_event(self.client, event, event_id(event.gateway_id, self.boot, str(self.sequence)))

    async def measure(self, release: Release, **changes: Any) -> None:
        now = datetime.now(UTC)
        values = {
            "batch_id": str(uuid.uuid4()),
            "gateway_id": self.identity.gateway_id,
            "blueprint": NAME,
            "release": release.manifest.digest,
            "version": release.version,
            "started_at": now - timedelta(seconds=0.1),
            "ended_at": now,
            "requests": 2,
            "failed_requests": 0,
            "golden_passed": 1,
            "prompt_tokens": 20,
            "completion_tokens": 40,
            "decode_seconds": 0.8,
            "ttft_seconds": 0.2,
        }
        batch = MeasurementBatch.model_validate(values | changes)
        subject = subjects.measurements(batch.gateway_id)
        await self.client.store(subject, batch.model_dump_json().encode(), {MESSAGE_ID_HEADER: batch.batch_id})


async def publish_event(client: BusClient, event: Event, identity: str, subject: str | None = None) -> None:
    envelope = Envelope(id=identity, source="slmops/test", type=event.type, time=datetime.now(UTC), subject=event.key)
    await client.store(subject or event.subject, event.model_dump_json().encode(), envelope.headers())


@dataclass
class Operator:
    """Sends the commands and queries of the command line."""

    client: BusClient

    async def publish_package(self, version: str) -> str:
        manifest = Descriptor.of(f"manifest {version}".encode(), "application/vnd.oci.image.manifest.v1+json")
        event = PackagePublished(
            model="smollm2",
            version=version,
            profile="edge-small",
            recipe="int4",
            variant=digest_of(version.encode()),
            manifest=manifest,
            signature=Descriptor.of(f"signature {version}".encode(), "application/json"),
            size_bytes=1,
            at=datetime.now(UTC),
        )
        await publish_event(self.client, event, f"package-{version}")
        return manifest.digest

    async def apply(self, **changes: Any) -> None:
        await self.client.request(ApplyBlueprint(spec=Blueprint(name=NAME, model="smollm2", **changes)))

    async def start(self, version: str) -> RolloutView:
        """Starts a rollout; retries until the rollout service has received the published package."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                return await self.client.request(StartRollout(blueprint=NAME, version=version))
            except NotFound:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    async def rollout(self) -> RolloutView:
        return (await self.client.request(ListRollouts(blueprint=NAME))).rollouts[-1]

    async def reached(self, state: str) -> RolloutView:
        return await eventually(self.rollout, lambda view: view.state == state, f"rollout {state}")

    async def plan(self) -> Plan | None:
        found = await self.client.read_desired(subjects.blueprint_key(NAME))
        return plan_in(found[0]) if found else None

    async def event_counts(self) -> dict[str, int]:
        """Returns the number of stored rollout events by type."""
        info = await self.client.js.stream_info("EVENTS", subjects_filter="slmops.rollout.>")
        return {k.removeprefix("slmops.rollout."): v for k, v in (info.state.subjects or {}).items()}

    async def dead_letters(self) -> dict[str, int]:
        info = await self.client.js.stream_info("DLQ", subjects_filter=">")
        return info.state.subjects or {}


@dataclass
class World:
    system: System
    operator: Operator
    stack: AsyncExitStack
    gateways: dict[str, Gateway] = field(default_factory=dict)

    async def gateway(self, gateway_id: str, ring: str = "fleet", bad: str = "", run: bool = True) -> Gateway:
        gateway = await Gateway.enrol(self.system, gateway_id, ring, frozenset(filter(None, [bad])))
        self.gateways[gateway_id] = gateway
        self.stack.push_async_callback(gateway.client.close)
        if run:
            task = asyncio.create_task(gateway.run())
            self.stack.push_async_callback(cancel_and_wait, [task])
        return gateway

    async def release(self, version: str) -> RolloutView:
        """Publishes a package, starts its rollout and waits until it completes."""
        await self.operator.publish_package(version)
        await self.operator.start(version)
        return await self.operator.reached("completed")


async def _world(
    folder: Path, stack: AsyncExitStack, databases: dict[str, str] | None = None, *, killable: bool = False
) -> World:
    system = await open_system(folder, stack, databases, killable=killable)
    await asyncio.gather(system.start("rollout"), system.start("telemetry"))
    client = await system.connect("console")
    stack.push_async_callback(client.close)
    return World(system, Operator(client), stack)


def _new_databases(server: str) -> dict[str, str]:
    url = make_url(server)
    names = {service: f"{service}_{uuid.uuid4().hex[:8]}" for service in ("rollout", "telemetry")}
    with psycopg.connect(
        host=url.host, port=url.port, user=url.username, dbname=url.database, autocommit=True
    ) as admin:
        for name in names.values():
            admin.execute(f'CREATE DATABASE "{name}"'.encode())
    return {service: url.set(database=name).render_as_string(hide_password=False) for service, name in names.items()}

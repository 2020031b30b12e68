"""Deploys a real gateway with NATS, S3, packager and rollout as processes. The bench acts as optimizer and operator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench.comparison import Place
from integration.kit_world import unrestricted
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError

from slmops.contracts import subjects
from slmops.contracts.blueprint import SoakPolicy
from slmops.contracts.cloudevent import Envelope, event_id
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import GatewayReported, PackagePublished, UpdatePhase, VariantOptimized
from slmops.contracts.model import ModelFile, files_digest
from slmops.contracts.plan import Plan, Release
from slmops.contracts.profile import EDGE_SMALL
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import sign_plan
from slmops.local.demo.run import GOLDEN
from slmops.local.environment import GatewaySpec
from slmops.local.servers import BUCKET
from slmops.local.system import System

MODEL, GATEWAY = "smollm2", GatewaySpec("gw-1")
_WITHIN_S = 120
Phases = dict[UpdatePhase, datetime]


@dataclass
class Deployment:
    """A deployment. `reports` are the gateway's reports in order."""

    system: System
    optimizer: BusClient
    rollout: BusClient
    objects: Objects
    reports: JetStreamContext.PushSubscription
    generation: int = 0

    @property
    def api_url(self) -> str:
        return self.system.api_url(GATEWAY.id)

    async def publish(self, version: str, variant: Path) -> PackagePublished:
        """Returns the signed package that the packager makes from a variant's folder."""
        files = []
        for path in sorted(path for path in variant.rglob("*") if path.is_file()):
            stored = await self.objects.put_file(path, "application/octet-stream")
            name = path.relative_to(variant).as_posix()
            files.append(ModelFile(path=name, digest=stored.digest, size_bytes=stored.size))
        event = VariantOptimized(
            job="bench",
            model=MODEL,
            version=version,
            profile=EDGE_SMALL.name,
            recipe="int4",
            digest=files_digest(files),
            files=tuple(files),
            evaluation=Evaluation(bytes=sum(file.size_bytes for file in files)),
            report=await self.objects.put_bytes(b"{}", "application/json"),
            golden=await self.objects.put_bytes(GOLDEN.read_bytes(), "application/jsonl"),
            chosen=True,
            reason="a bench needs it",
            at=utc_now(),
        )
        envelope = Envelope(id=event_id("bench", version), source="bench", type=event.type, time=event.at)
        await self.optimizer.publish(event, envelope)
        return await self._published(version)

    async def _published(self, version: str) -> PackagePublished:
        async with asyncio.timeout(_WITHIN_S):
            while True:
                try:
                    last = await self.optimizer.js.get_msg("EVENTS", subject=PackagePublished.type, direct=True)
                    package = PackagePublished.model_validate_json(last.data or b"")
                    if package.version == version:
                        return package
                except NotFoundError:
                    pass  # it does not exist yet
                await asyncio.sleep(0.05)

    async def install(self, package: PackagePublished) -> tuple[datetime, Phases]:
        """Writes the plan. Returns the time of the write and the times of the gateway's phases by its own reports."""
        fields = package.model_dump(include={"model", "version", "manifest", "signature", "size_bytes"})
        self.generation += 1
        release = Release(revision=self.generation, soak=SoakPolicy(seconds=0), **fields)
        plan = Plan(blueprint=GATEWAY.blueprint, generation=self.generation, stable=release)
        written = utc_now()
        key = subjects.blueprint_key(GATEWAY.blueprint)
        signed = sign_plan(plan, read_key(self.system.layout.plan_signing_key), written)
        held = await self.rollout.read_desired(key)
        await self.rollout.write_desired(key, signed, held[1] if held else 0)
        return written, await self._phases(package)

    async def _phases(self, package: PackagePublished) -> Phases:
        seen: Phases = {}
        deadline = time.monotonic() + _WITHIN_S
        while UpdatePhase.COMMITTED not in seen:
            message = await self.reports.next_msg(timeout=deadline - time.monotonic())
            report = GatewayReported.model_validate_json(message.data)
            # Before the download a report already has the new target, but still the phase of the old release.
            if report.target != package.manifest.digest or (not seen and report.phase is UpdatePhase.COMMITTED):
                continue
            if report.phase is UpdatePhase.FAILED:
                raise RuntimeError(f"the gateway refused {package.version}: {report.problem}")
            seen.setdefault(report.phase, report.at)
        return seen


@asynccontextmanager
async def deployment(place: Place) -> AsyncIterator[Deployment]:
    """Waits until the gateway is enrolled and listens. It does not serve a model yet."""
    place.step.progress("starting NATS, S3, packager, rollout and a gateway")
    async with AsyncExitStack() as stack:
        system = await stack.enter_async_context(
            System(place.scratch / "system", services=("packager", "rollout"), gateways=[GATEWAY])
        )

        async def connect(user: str) -> BusClient:
            creds = unrestricted(system.layout.keys, user)  # it looks at what the services do
            settings = system.bus_settings(user, nats_creds=creds)
            client = await BusClient.connect(settings, name="bench")
            stack.push_async_callback(client.close)
            return client

        console = await connect("console")
        reports = await console.js.subscribe(f"{GatewayReported.type}.{GATEWAY.id}", ordered_consumer=True)
        yield Deployment(system, await connect("optimizer"), await connect("rollout"), objects_of(system), reports)


def objects_of(system: System) -> Objects:
    keys = system.layout.s3_credentials()
    settings = {"s3_endpoint": system.s3_endpoint, "s3_bucket": BUCKET, "tls_ca": system.certificates.trusted}
    secrets = {"s3_access_key": keys.access_key, "s3_secret_key": keys.secret_key}
    return Objects(ObjectSettings.model_validate(settings | secrets))

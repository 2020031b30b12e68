"""Registry and packager on real servers, in this process or as processes, and the other parties that use them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import forked
import httpx
import pytest
from forked import Forked
from integration.kit_world import World, envelope
from nats.aio.client import RawCredentials

from slmops.contracts import subjects
from slmops.contracts.commands import BeginUpload, PackageFiles, RegisterVersion, UploadTicket, VersionView
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import GatewayEnrolled, PackagePublished, VariantOptimized
from slmops.contracts.model import ModelFile, files_digest
from slmops.contracts.plan import Plan, Release
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import creds_text, gateway_jwt, new_user_seed, public_key
from slmops.kit.cancellation import cancel_and_wait
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.service import Service
from slmops.kit.settings import BusSettings, ObjectSettings
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import sign_plan
from slmops.local.ports import choose_ports
from slmops.local.process import log_tail
from slmops.local.servers import http_answers

if TYPE_CHECKING:
    from servers import S3, NatsServer

T = TypeVar("T")
GOLDEN = b'{"prompt": "What is the capital of France?", "expect": ["Paris"]}\n'
BLUEPRINT = "edge-chat"


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Runs a service as `Service.run` does, but in this process and without its HTTP server."""
    for step in service.opening:
        await step()
    await service.bus.start()
    tasks = [asyncio.create_task(task()) for task in service.tasks]
    try:
        yield
    finally:
        await cancel_and_wait(tasks)
        await service.bus.stop()
        for step in service.closing:
            await step()


def settings_of(world: World, s3: S3, service: str, folder: Path, database_url: str = "") -> dict[str, Any]:
    return {
        "nats_url": world.url,
        "nats_creds": world.creds[service],
        "database_url": database_url or f"sqlite:///{folder}/{service}.db",
        "data_dir": folder,
        "s3_endpoint": s3.endpoint,
        "s3_access_key": s3.access_key,
        "s3_secret_key": s3.secret_key,
        "s3_bucket": s3.bucket,
    }


async def open_store(s3: S3) -> Objects:
    objects = Objects(
        ObjectSettings.model_validate(
            {"s3_endpoint": s3.endpoint, "s3_access_key": s3.access_key, "s3_secret_key": s3.secret_key}
            | {"s3_bucket": s3.bucket}
        )
    )
    await objects.open()
    return objects


@dataclass
class Process:
    """A service as its own process, which a test can kill and start again."""

    service: str
    environment: dict[str, str]
    folder: Path
    running: Forked | None = None
    port: int = field(default=0)

    @classmethod
    def of(cls, service: str, folder: Path, settings: dict[str, Any]) -> Process:
        port = choose_ports(folder / f"{service}-ports.json", [service])[service]
        found = {f"SLMOPS_{key.upper()}": str(value) for key, value in (settings | {"http_port": port}).items()}
        return cls(service, dict(os.environ) | found, folder, port=port)

    def spawn(self) -> Forked:
        with (self.folder / f"{self.service}.log").open("ab") as out:
            self.running = forked.start(f"slmops.{self.service}.app", env=self.environment, stdout=out, stderr=out)
        return self.running

    async def start(self) -> None:
        process, deadline = self.spawn(), time.monotonic() + 60
        while not await http_answers(self.port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.service} does not start:\n{self.log()}")
            await asyncio.sleep(0.05)

    def log(self) -> str:
        return log_tail(self.folder / f"{self.service}.log", 30)

    def kill(self) -> None:
        """Kills the process with SIGKILL, so that it cannot finish or clean up anything."""
        assert self.running
        self.running.kill()
        self.running.wait()

    def stop(self) -> int:
        assert self.running
        self.running.terminate()
        return self.running.wait(timeout=20)


def model_file(path: str, content: bytes) -> ModelFile:
    return ModelFile(path=path, digest=digest_of(content), size_bytes=len(content))


async def put(url: str, data: bytes) -> None:
    async with httpx.AsyncClient() as http:
        (await http.put(url, content=data)).raise_for_status()


@dataclass
class Operator:
    """Pushes models as the command line does, by presigned URL."""

    client: BusClient
    model: str = "smollm2"

    async def begin(self, version: str, content: dict[str, bytes]) -> UploadTicket:
        files = tuple(model_file(path, data) for path, data in content.items())
        return await self.client.request(BeginUpload(model=self.model, version=version, files=files))

    async def upload(self, version: str, content: dict[str, bytes]) -> str:
        """Uploads every missing file. Returns the id of the upload."""
        ticket = await self.begin(version, content)
        by_digest = {digest_of(data): data for data in content.values()}
        for digest, url in ticket.urls.items():
            await put(url, by_digest[digest])
        return ticket.upload

    def registration(
        self, version: str, upload: str, content: dict[str, bytes], golden: bytes | None = None
    ) -> RegisterVersion:
        return RegisterVersion(
            model=self.model,
            version=version,
            upload=upload,
            format="gguf",
            architecture="llama",
            files=tuple(model_file(path, data) for path, data in content.items()),
            golden=model_file("golden.jsonl", golden) if golden is not None else None,
        )

    async def push(self, version: str, content: dict[str, bytes], golden: bytes | None = None) -> VersionView:
        everything = content | ({"golden.jsonl": golden} if golden is not None else {})
        upload = await self.upload(version, everything)
        return await self.client.request(self.registration(version, upload, content, golden))


@dataclass
class Optimizer:
    """Puts a variant into the store and announces it, as the optimizer does."""

    world: World
    objects: Objects

    async def variant(self, content: dict[str, bytes], **changes: Any) -> VariantOptimized:
        for data in content.values():
            await self.objects.put_bytes(data, "application/octet-stream")
        files = tuple(model_file(path, data) for path, data in content.items())
        made = VariantOptimized(
            job="smollm2-1.0.0-edge-small",
            model="smollm2",
            version="1.0.0",
            profile="edge-small",
            recipe="int4",
            digest=files_digest(files),
            files=files,
            evaluation=Evaluation(bytes=sum(map(len, content.values())), kl=0.25, top1=0.8),
            report=await self.objects.put_bytes(b'{"kl": 0.25}', "application/json"),
            golden=await self.objects.put_bytes(GOLDEN, "application/jsonl"),
            chosen=True,
            reason="int4: smallest of 2 that pass",
            at=datetime(2030, 1, 1, tzinfo=UTC),
        )
        return made.model_copy(update=changes)

    async def announce(self, variant: VariantOptimized, **attributes: str) -> None:
        client = await self.world.connect("optimizer")
        await client.publish(variant, envelope(variant, **attributes))


async def published(world: World, count: int = 1, within_s: float = 30) -> list[PackagePublished]:
    """Waits for at least `count` published packages and returns all of them."""

    async def look() -> list[PackagePublished] | None:
        stored = [m for m in await world.stored("EVENTS") if m.subject == PackagePublished.type]
        return [PackagePublished.model_validate_json(m.data) for m in stored] if len(stored) >= count else None

    return await eventually(look, within_s)


async def eventually(look: Callable[[], Awaitable[T | None]], within_s: float = 30) -> T:
    deadline = time.monotonic() + within_s
    while (found := await look()) is None:
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)
    return found


def release(package: PackagePublished) -> Release:
    fields = package.model_dump(include={"model", "version", "manifest", "signature", "size_bytes"})
    return Release(revision=1, **fields)


@dataclass
class Rollout:
    """Enrols gateways and writes plans, as the rollout service does."""

    world: World
    nats_server: NatsServer
    plan_key: Path
    generation: int = 0

    async def enrol(self, gateway_id: str, blueprint: str = BLUEPRINT) -> BusClient:
        """Enrols a gateway. Returns its own connection, with its own permissions."""
        seed = new_user_seed()
        client = await self.world.connect("rollout")
        enrolled = GatewayEnrolled(
            gateway_id=gateway_id, blueprint=blueprint, public_key=public_key(seed), at=datetime.now(UTC)
        )
        await client.publish(enrolled, envelope(enrolled))
        jwt = gateway_jwt(self.nats_server.gateway_signing_key.read_text(), public_key(seed), gateway_id, blueprint)
        gateway = await BusClient.connect(
            BusSettings(nats_url=self.world.url),
            name=gateway_id,
            user_credentials=RawCredentials(creds_text(jwt, seed)),
            inbox_prefix=f"_INBOX_{gateway_id}".encode(),
        )
        self.world.stack.push_async_callback(gateway.close)
        return gateway

    async def plan(self, stable: Release | None, candidate: Release | None = None, blueprint: str = BLUEPRINT) -> None:
        self.generation += 1
        document: dict[str, Any] = {"blueprint": blueprint, "generation": self.generation, "stable": stable}
        if candidate:
            stage = {"name": "fleet"}
            document["candidate"] = {"rollout": "r-1", "release": candidate, "stages": [stage]}
        client = await self.world.connect("rollout")
        plan = Plan.model_validate(document)
        key = subjects.blueprint_key(blueprint)
        held = await client.read_desired(key)
        await client.write_desired(key, sign_plan(plan, read_key(self.plan_key), utc_now()), held[1] if held else 0)


async def download(package: PackageFiles, folder: Path) -> None:
    """Downloads every file of a package to its path, as a gateway does."""
    async with httpx.AsyncClient() as http:
        for file in (package.manifest, package.signature, *package.files):
            answer = (await http.get(file.url)).raise_for_status()
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(answer.content)
            assert Descriptor.of(answer.content, file.descriptor.media_type).digest == file.descriptor.digest

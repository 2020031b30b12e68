"""Compares connections with TLS ("ours") and without ("bare") to the same servers: connects, messages, downloads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench.comparison import Comparison, Measured, Place

from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import Unreachable
from slmops.gateway.install.download import fetch
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.settings import BusSettings, ObjectSettings
from slmops.kit.tls import client_context
from slmops.local.certificates import Certificates
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import BUCKET, NATS_PORTS, S3_PORTS, nats_spec, s3_spec
from slmops.local.supervisor import Supervisor

CLIENTS, AT_ONCE = 1000, 4
MESSAGES, MESSAGE_BYTES = 20_000, 1000
LARGE_BYTES = 100_000_000
_TYPE = "application/octet-stream"
_NOTHING = Descriptor.of(b"", _TYPE)


@dataclass
class _Side:
    """A NATS and an S3 server, both with TLS or both without."""

    layout: Layout
    ports: dict[str, int]
    certificates: Certificates | None
    scratch: Path
    nats_pid: int = 0
    blob: Descriptor = _NOTHING
    rss_per_client_kb: float = 0.0
    downloads: int = 0

    def bus(self, scheme: str) -> BusSettings:
        port = self.ports["nats.websocket" if scheme == "wss" else "nats"]
        trusted = self.certificates.trusted if self.certificates else None
        return BusSettings(
            nats_url=f"{scheme}://{HOST}:{port}", nats_creds=self.layout.creds("console"), tls_ca=trusted
        )

    def objects(self) -> Objects:
        keys = self.layout.s3_credentials()
        given = {"s3_endpoint": f"{HOST}:{self.ports['s3.api']}", "s3_bucket": BUCKET}
        secrets = {"s3_access_key": keys.access_key, "s3_secret_key": keys.secret_key}
        trust = {"tls_ca": self.certificates.trusted} if self.certificates else {}
        return Objects(ObjectSettings.model_validate(given | secrets | trust))

    @property
    def scheme(self) -> str:
        return "tls" if self.certificates else "nats"

    async def connect(self, scheme: str | None = None) -> float:
        """Returns how many clients per second connect and authenticate. All stay connected until the last is."""
        settings, room = self.bus(scheme or self.scheme), asyncio.Semaphore(AT_ONCE)

        async def one() -> BusClient:
            async with room:
                while True:
                    try:
                        return await BusClient.connect(settings, name="bench", patient=False)
                    except Unreachable:  # NATS waits 2 s for a client, which can be too short on a busy machine
                        continue

        before, begun = _rss(self.nats_pid), time.perf_counter()
        clients = await asyncio.gather(*(one() for _ in range(CLIENTS)))
        took = time.perf_counter() - begun
        grown_kb = (_rss(self.nats_pid) - before) / CLIENTS / 1000
        self.rss_per_client_kb = max(self.rss_per_client_kb, grown_kb)  # later rounds use the memory of the first again
        await asyncio.gather(*(client.close() for client in clients))
        return CLIENTS / took

    async def send(self) -> float:
        """Returns how many messages per second the server takes from one client."""
        client = await BusClient.connect(self.bus(self.scheme), name="bench", patient=False)
        payload, begun = os.urandom(MESSAGE_BYTES), time.perf_counter()
        for _ in range(MESSAGES):
            await client.connection.publish("cmd.nobody", payload)
        await client.connection.flush(60)
        took = time.perf_counter() - begun
        await client.close()
        return MESSAGES / took

    async def download(self) -> float:
        """Returns the MB/s of the gateway's verified download of one blob."""
        url = await self.objects().presigned_get(self.blob.digest)
        self.downloads += 1

        async def source() -> str:
            return url

        trust = client_context(self.certificates.trusted) if self.certificates else None
        begun = time.perf_counter()
        path = await fetch(self.blob, source, self.scratch / f"download-{self.downloads}", tls=trust)
        took = time.perf_counter() - begun
        path.unlink()
        return LARGE_BYTES / 1e6 / took


def _rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


@asynccontextmanager
async def _side(folder: Path, *, tls: bool) -> AsyncIterator[_Side]:
    folder.mkdir()
    layout = Layout(folder)
    layout.prepare()
    certificates = layout.certificates if tls else None
    if certificates:
        certificates.renew(utc_now())
    ports = choose_ports(layout.ports_file, [*NATS_PORTS, *S3_PORTS])
    side = _Side(layout, ports, certificates, folder)
    websocket = ports["nats.websocket"] if tls else None
    async with Supervisor(layout.state_file) as supervisor:
        await supervisor.start(nats_spec(layout, ports["nats"], certificates=certificates, websocket_port=websocket))
        await supervisor.start(s3_spec(layout, ports, certificates))
        side.nats_pid = next(state.pid for state in supervisor.states() if state.name == "nats") or 0
        block = os.urandom(1_000_000)
        file = folder / "blob"
        file.write_bytes(block * (LARGE_BYTES // len(block)))
        side.blob = await side.objects().put_file(file, _TYPE)
        file.unlink()
        yield side


async def measure(place: Place) -> Measured:
    place.step.progress("starting two NATS and two S3 servers")
    async with _side(place.scratch / "plain", tls=False) as bare, _side(place.scratch / "tls", tls=True) as ours:
        found = await _compare(place, bare, ours)
        memory = {"nats": f"{bare.rss_per_client_kb:.0f} kB", "tls": f"{ours.rss_per_client_kb:.0f} kB"}
    return Measured(found, {"memory of nats-server per connection": memory})


async def _compare(place: Place, bare: _Side, ours: _Side) -> list[Comparison]:
    compare, connect = place.side_by_side, f"connect, {CLIENTS:,} clients, {AT_ONCE} at once"
    return [
        await compare(f"{connect}, wss", "per s", "nats://", bare.connect, lambda: ours.connect("wss"), rounds=2),
        await compare(f"{connect}, tls", "per s", "nats://", bare.connect, ours.connect, rounds=2),
        await compare(f"publish, {MESSAGE_BYTES:,} bytes", "per s", "nats://", bare.send, ours.send),
        await compare("gateway download, 100 MB", "MB/s", "http://", bare.download, ours.download),
    ]

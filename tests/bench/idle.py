"""Measures what an idle gateway costs at the control plane: bytes per second, averaged over an hour.

`python -m bench.idle` prints the parts. The gateway's own classes talk through a relay that counts bytes to a real
nats-server with TLS, real accounts and real streams. Each thing that a connected gateway does from time to time is
measured once; how often it does it follows from its settings. So an hour is measured in seconds.

The bytes are those of TCP's payload, which include TLS, plus the headers of TCP and IP for every segment and for an
acknowledgement of it. Acknowledgements that travel with data are counted as well, so the figure is an upper bound.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from contract import wire_examples
from nats.aio.client import RawCredentials
from nats.aio.msg import Msg
from tuf.api.metadata import Metadata, Timestamp

from slmops.contracts import freshness, subjects
from slmops.contracts.commands import FetchMetadata
from slmops.contracts.commands.packager import MetadataFile
from slmops.contracts.descriptor import digest_of
from slmops.contracts.events import UpdatePhase
from slmops.contracts.permissions import PROVISIONER
from slmops.contracts.plan import Identity, Plan
from slmops.contracts.signed import plan_in
from slmops.gateway.report import clock_check
from slmops.gateway.report.presence import Presence
from slmops.gateway.report.reporter import Reporter, Status
from slmops.gateway.report.spool import Spool
from slmops.gateway.settings import Settings
from slmops.gateway.twin import Twin
from slmops.kit.bus import provisioner
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.nats_auth import creds_text, gateway_jwt, new_user_seed, public_key
from slmops.kit.clock import utc_now
from slmops.kit.settings import BusSettings
from slmops.kit.trust.keys import read_key
from slmops.kit.trust.plans import sign_plan
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import nats_spec
from slmops.local.supervisor import Supervisor

TARGET_BYTES_PER_S = 250 / 8
_SEGMENT_HEADERS = 20 + 32  # IPv4, and TCP with timestamps
_ROUNDS = 3  # the least is taken: the server's own PING may fall into a round
_SENT_WITHIN_S = 0.02
_SERVER_PINGS_EVERY_S = 120.0  # the server's default; it skips a PING after other traffic
_PLAN: Plan = next(one for one in wire_examples.DOCUMENTS.values() if isinstance(one, Plan))
_WHO = Identity(gateway_id="gw-1", blueprint=_PLAN.blueprint, labels={"ring": "fleet", "site": "berlin-12"})
_STATUS = Status(
    UpdatePhase.COMMITTED,
    digest_of(b"release"),
    "1.0.0",
    digest_of(b"release"),
    plan_generation=12,
    measured=dict.fromkeys(("tokens_per_s", "ttft_s", "peak_rss_bytes", "load_s", "fetched_bytes"), 123.456789),
)
Action = Callable[[], Awaitable[Any]]


@dataclass
class Wire:
    """A relay in front of a server. It counts the bytes and segments of both directions."""

    port: int = 0
    bytes: int = 0
    segments: int = 0

    @property
    def total(self) -> tuple[int, int]:
        """Payload bytes, and the same with headers and acknowledgements."""
        return self.bytes, self.bytes + 2 * self.segments * _SEGMENT_HEADERS

    @asynccontextmanager
    async def to(self, port: int) -> AsyncIterator[None]:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    self.bytes, self.segments = self.bytes + len(data), self.segments + 1
                    writer.write(data)
            writer.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection(HOST, port)
            await asyncio.gather(relay(reader, there[1]), relay(there[0], writer))

        server = await asyncio.start_server(accept, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()


class _Follower:
    def desired_changed(self, *_: Any) -> None: ...

    def plan_refused(self, error: Exception) -> None:
        raise error


class _Gateway:
    """The parts of a gateway that use the network while nothing happens."""

    def __init__(self, client: BusClient, home: Path, wire: Wire) -> None:
        self.client, self.wire = client, wire
        self.spool = Spool(home / "spool.db")
        self.reporter = Reporter(_WHO, self.spool, home / "sequence", utc_now)
        self.twin = Twin(_WHO, self._open, _Follower(), timedelta(days=1))
        every = timedelta(days=1)
        self.presence = Presence("gw-1", self.reporter.presence, every, utc_now)

    async def _open(self, data: bytes) -> Plan:
        plan = plan_in(data)
        assert plan is not None
        return plan

    async def ping(self) -> None:
        await self.client.connection.flush()

    async def read_plan(self) -> None:
        await self.twin._read(self.client)

    async def tell_presence(self) -> None:
        await self.presence._tell(self.client)

    async def compare_clocks(self) -> None:
        await self.client.request(FetchMetadata(gateway_id="gw-1", file="timestamp.json"))

    async def report(self) -> None:
        self.reporter.report(_STATUS)
        await self.reporter.flush()
        await self.reporter._publish(self.client, self.spool, self.spool.pending())

    async def cost(self, action: Action) -> tuple[int, int]:
        """Returns what an action costs: payload bytes, and bytes with headers."""
        found = []
        for _ in range(_ROUNDS):
            before = self.wire.total
            await action()
            if action != self.ping:
                await asyncio.sleep(_SENT_WITHIN_S)  # in a segment of its own
                await self.ping()
            found.append(tuple(now - then for now, then in zip(self.wire.total, before, strict=True)))
        payload, whole = min(found)
        return payload, whole


@asynccontextmanager
async def _world(folder: Path) -> AsyncIterator[tuple[Layout, BusSettings]]:
    """Yields a nats-server with TLS, and the settings of its clients."""
    layout = Layout(folder)
    layout.prepare()
    layout.certificates.renew(utc_now())
    port = choose_ports(layout.ports_file, ["nats"])["nats"]
    settings = BusSettings(nats_url=f"tls://{HOST}:{port}", tls_ca=layout.certificates.trusted)
    async with Supervisor(layout.state_file) as supervisor:
        await supervisor.start(nats_spec(layout, port, certificates=layout.certificates))
        await provisioner.run(settings.model_copy(update={"nats_creds": layout.creds(PROVISIONER)}))
        yield layout, settings


def _credentials(layout: Layout) -> dict[str, Any]:
    """Returns the options of the gateway's connection."""
    seed, now = new_user_seed(), utc_now()
    key = layout.gateway_signing_key.read_text()
    jwt = gateway_jwt(key, public_key(seed), "gw-1", _WHO.blueprint, issued_at=now, expires_at=now + timedelta(days=30))
    return {
        "user_credentials": RawCredentials(creds_text(jwt, seed)),
        "inbox_prefix": subjects.inbox("gw-1").encode(),
    }


async def _answer_metadata(client: BusClient, layout: Layout) -> None:
    """Answers requests for metadata with a timestamp of the size of the packager's."""
    signed = Metadata(Timestamp(expires=utc_now().replace(microsecond=0) + freshness.TIMESTAMP))
    signed.sign(read_key(layout.plan_signing_key))
    content = MetadataFile(file="timestamp.json", content=b64encode(signed.to_bytes()).decode())

    async def answer(message: Msg) -> None:
        headers = {"content-type": "application/json", "slmops-time": utc_now().isoformat(), "slmops-parts": "1"}
        await client.connection.publish(message.reply, content.model_dump_json().encode(), headers=headers)

    await client.connection.subscribe("cmd.packager.fetch_metadata.*", cb=answer)
    await client.connection.flush()


async def _measured(folder: Path) -> dict[str, Any]:
    wire = Wire()
    async with _world(folder) as (layout, settings), wire.to(int(settings.nats_url.rpartition(":")[2])):

        def of(user: str) -> BusSettings:
            return settings.model_copy(update={"nats_creds": layout.creds(user)})

        packager = await BusClient.connect(of("packager-answers"), name="packager", patient=False)
        rollout = await BusClient.connect(of("rollout"), name="rollout", patient=False)
        await _answer_metadata(packager, layout)
        plan = sign_plan(_PLAN, read_key(layout.plan_signing_key), utc_now())
        key = subjects.blueprint_key(_WHO.blueprint)
        revision = await rollout.write_desired(key, plan, 0)
        through = settings.model_copy(update={"nats_url": f"tls://{HOST}:{wire.port}"})
        before = wire.total
        client = await BusClient.connect(through, name="gw-1", patient=False, **_credentials(layout))
        await client.connection.flush()
        connect = tuple(now - then for now, then in zip(wire.total, before, strict=True))
        gateway = _Gateway(client, folder, wire)
        for one in gateway.twin._keys:
            await client.connection.subscribe(subjects.twin(one))

        async def renew_plan() -> None:
            nonlocal revision
            revision = await rollout.write_desired(key, plan, revision)

        await gateway.ping()
        parts = await _parts(gateway, renew_plan)
        stored = {name: await _stored_bytes(rollout, name) for name in ("PRESENCE", "GATEWAYS")}
        for connection in (packager, rollout, client):
            await connection.close()
    return _result(parts, connect[1], stored)


async def _parts(gateway: _Gateway, renew_plan: Action) -> dict[str, tuple[float, int, int]]:
    """Returns for each part how often it happens in an hour, its payload bytes, and its bytes with headers."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    hour = timedelta(hours=1)
    ping_every = gateway.client.connection.options["ping_interval"]
    ping = await gateway.cost(gateway.ping)
    found: dict[str, tuple[float, int, int]] = {"pings": (3600 / ping_every + 3600 / _SERVER_PINGS_EVERY_S, *ping)}
    # Their mean intervals: see `Presence`, `Twin`, `ClockCheck`, `Agent.report_periodically`, and `Reconciler.publish`.
    for name, action, per_hour in (
        ("presence", gateway.tell_presence, hour / (0.75 * defaults["presence_every"])),
        ("reading the plan again", gateway.read_plan, hour / defaults["refresh_every"]),
        ("comparing clocks", gateway.compare_clocks, hour / clock_check._EVERY),
        ("full report", gateway.report, hour / (0.875 * defaults["report_every"])),
        ("renewed plan", renew_plan, hour / (freshness.PLAN / 2)),
    ):
        cost = await gateway.cost(action)
        found[name] = (per_hour, cost[0] - ping[0], cost[1] - ping[1])
    return found


async def _stored_bytes(client: BusClient, stream: str) -> int:
    state = (await client.js.stream_info(stream)).state
    return state.bytes // state.messages


def _result(parts: dict[str, tuple[float, int, int]], connect: int, stored: dict[str, int]) -> dict[str, Any]:
    return {
        "bytes_per_s": sum(per_hour * whole for per_hour, _, whole in parts.values()) / 3600,
        "payload_bytes_per_s": sum(per_hour * payload for per_hour, payload, _ in parts.values()) / 3600,
        "target_bytes_per_s": TARGET_BYTES_PER_S,
        "connect_bytes": connect,
        "stored_bytes": stored,
        "parts": {
            name: {"per_hour": round(per_hour, 3), "payload_bytes": payload, "bytes": whole}
            for name, (per_hour, payload, whole) in parts.items()
        },
    }


def idle_bytes_per_s() -> dict[str, Any]:
    """Measures an idle gateway in a few seconds. Blocks: call it in a thread of its own from a coroutine.

    `bytes_per_s` is the whole cost with TLS and the headers of TCP and IP, `payload_bytes_per_s` without those headers,
    `connect_bytes` one connection with its handshakes, `stored_bytes` a message in its stream, and `parts` how often
    each part happens in an hour and what it costs once.
    """
    with tempfile.TemporaryDirectory(prefix="slmops-idle-") as name:
        return asyncio.run(_measured(Path(name)))


if __name__ == "__main__":
    json.dump(idle_bytes_per_s(), sys.stdout, indent=2)
    print()

"""Gateways are revoked, removed, moved and enrolled again on a real bus; a gateway's process renews and follows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from nats.js.errors import NotFoundError
from rollout_world import NAME, World, _world, eventually

from slmops.contracts import subjects
from slmops.contracts.blueprint import Blueprint
from slmops.contracts.commands import (
    ApplyBlueprint,
    EnrolGateway,
    Enrolment,
    GatewayView,
    ListGateways,
    MoveGateway,
    ReenrolGateway,
    RemoveGateway,
    RenewCredential,
    RevokeGateway,
    Standing,
)
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import CredentialRevoked, CredentialsRefused, Denied, Unreachable
from slmops.contracts.events import GatewayEnrolled, GatewayReported, GatewayRevoked, UpdatePhase
from slmops.contracts.freshness import GatewayPresence
from slmops.contracts.plan import Identity, Overlay, Release
from slmops.gateway.identity import Credentials, own_seed
from slmops.kit.bus.nats_auth import GatewayClaims, gateway_jwt, new_user_seed, public_key
from slmops.kit.settings import BusSettings
from slmops.local.ports import choose_ports

PACKAGE = Descriptor.of(b"a package", "application/vnd.oci.image.manifest.v1+json")
RELEASE = Release(revision=1, model="m", version="1.0.0", manifest=PACKAGE, signature=PACKAGE, size_bytes=1)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield await _world(tmp_path, stack)


async def enrol(world: World, seed: str, gateway_id: str = "gw-1") -> Enrolment:
    client = await world.system.connect("enrol", inbox_prefix=b"_INBOX_enrol", patient=False)
    token = world.system.layout.enrolment_token.read_text().strip()
    command = EnrolGateway(gateway_id=gateway_id, blueprint=NAME, public_key=public_key(seed), token=token)
    try:
        return await client.request(command)
    finally:
        await client.close()


async def view(world: World, gateway_id: str = "gw-1") -> GatewayView | None:
    found = (await world.operator.client.request(ListGateways(gateway_id=gateway_id))).gateways
    return found[0] if found else None


async def dead_letter_reasons(world: World) -> str:
    info = await world.operator.client.js.stream_info("DLQ", subjects_filter=">")
    found = [await world.operator.client.js.get_last_msg("DLQ", subject) for subject in info.state.subjects or {}]
    return "\n".join(str(message.headers) for message in found)


# ---- simulated gateways -----------------------------------------------------------------------------------


async def test_a_revoked_canary_no_longer_holds_the_stage_and_its_reports_are_refused(world: World) -> None:
    operator = world.operator
    await operator.apply()
    lost = await world.gateway("gw-1", "canary", run=False)
    await world.gateway("gw-2", "canary")
    await world.gateway("gw-3")
    await operator.publish_package("1.0.0")
    await operator.start("1.0.0")
    held = await eventually(operator.rollout, lambda v: v.stages[0].committed == 1, "gw-2 commits")
    assert (held.stages[0].targets, held.stage) == (2, 0)
    revoked = await operator.client.request(RevokeGateway(gateway_id="gw-1", reason="stolen"))
    assert (revoked.standing, revoked.revoked_because) == (Standing.REVOKED, "stolen")
    done = await operator.reached("completed")
    assert [(stage.targets, stage.committed) for stage in done.stages] == [(1, 1), (2, 2)]
    event = await eventually(lambda: operator.client.latest(GatewayRevoked, f"gw-1.{lost.key}"), bool, "the event")
    assert event is not None
    assert event.reason == "stolen"
    await lost.follow()  # its credential still works here: nobody has told this server
    await eventually(
        lambda: dead_letter_reasons(world), lambda text: "gw-1 was revoked" in text, "the report is refused"
    )
    with pytest.raises(CredentialRevoked, match="stolen"):
        await lost.client.request(RenewCredential(gateway_id="gw-1", public_key=lost.key))


async def test_a_device_that_was_set_up_again_needs_consent_and_starts_anew(world: World) -> None:
    await world.operator.apply()
    old = await world.gateway("gw-1", "canary", run=False)
    old.sequence = 500
    await world.operator.publish_package("1.0.0")
    await world.operator.start("1.0.0")
    await eventually(world.operator.plan, lambda plan: bool(plan and plan.candidate), "the plan")
    await old.follow()
    await eventually(lambda: view(world), lambda g: g is not None and g.running_version == "1.0.0", "its report")
    new = new_user_seed()
    with pytest.raises(Denied, match="another key") as refusal:
        await enrol(world, new)
    assert "slmops gateway re-enrol gw-1" in (refusal.value.fix or "")
    await world.operator.client.request(ReenrolGateway(gateway_id="gw-1", within_s=600))
    assert GatewayClaims.of((await enrol(world, new)).jwt).enrolment == 2
    with pytest.raises(CredentialRevoked):
        await old.client.request(RenewCredential(gateway_id="gw-1", public_key=old.key))
    with pytest.raises(Denied, match="another key"):
        await enrol(world, new_user_seed())
    fresh = await eventually(lambda: view(world), lambda g: g is not None and g.enrolment == 2, "enrolment 2")
    assert fresh is not None
    assert (fresh.standing, fresh.running) == (Standing.ENROLLED, None)
    old.sequence = 0  # the new device counts from 1; its reports count
    old.running, last = None, old.last_report
    assert last is not None
    await old.report(last[0], last[1])
    await eventually(lambda: view(world), lambda g: g is not None and g.phase == last[0], "the first report")


async def test_a_removed_gateway_leaves_nothing_but_its_revoked_key(world: World) -> None:
    client, system = world.operator.client, world.system
    await world.operator.apply()
    await client.request(ApplyBlueprint(spec=Blueprint(name="kiosk", model="smollm2")))
    gone = await world.gateway("gw-1", run=False)
    await eventually(lambda: client.latest(GatewayEnrolled, "gw-1"), bool, "the enrolment")
    await client.request(MoveGateway(gateway_id="gw-1", blueprint="kiosk"))
    key = subjects.overlay_key("gw-1")
    held = await eventually(lambda: client.read_desired(key), bool, "the overlay")
    assert held is not None
    assert Overlay.model_validate_json(held[0]).blueprint == "kiosk"
    for _ in range(2):
        assert (await client.request(RemoveGateway(gateway_id="gw-1", reason="scrapped"))).gateway_id == "gw-1"
    await gone.report(UpdatePhase.IDLE, RELEASE)
    await eventually(lambda: dead_letter_reasons(world), lambda text: "gw-1" in text, "the report is refused")
    assert await view(world) is None
    await eventually(lambda: client.latest(GatewayEnrolled, "gw-1"), lambda found: found is None, "its enrolment")
    await eventually(lambda: client.read_desired(key), lambda found: found is not None and not found[0], "the overlay")
    with pytest.raises(CredentialRevoked):
        await gone.client.request(RenewCredential(gateway_id="gw-1", public_key=gone.key))
    await system.start("rollout")  # a second process, which compares the stream with the journal
    assert await client.latest(GatewayEnrolled, "gw-1") is None
    assert (await enrol(world, new_user_seed())).blueprint == NAME


# ---- the credential at the server -------------------------------------------------------------------------


def credentials(world: World, seed: str, issued: timedelta, expires: timedelta) -> Credentials:
    key, now = world.system.layout.gateway_signing_key.read_text(), datetime.now(UTC)
    jwt = gateway_jwt(key, public_key(seed), "gw-1", NAME, issued_at=now + issued, expires_at=now + expires)
    return Credentials(Identity(gateway_id="gw-1", blueprint=NAME), seed, jwt)


async def test_the_server_closes_the_connection_of_an_expired_credential(world: World) -> None:
    mine = credentials(world, new_user_seed(), timedelta(days=-1), timedelta(seconds=3))
    settings: Any = BusSettings(nats_url=world.system.url)
    client = await mine.connect(settings)
    async with asyncio.timeout(60):
        await client.closed.wait()
    assert mine.claims.expires_at is not None
    while datetime.now(UTC) < mine.claims.expires_at + timedelta(seconds=1):  # noqa: ASYNC110 (it counts whole seconds)
        await asyncio.sleep(0.1)
    with pytest.raises(CredentialsRefused):
        await mine.connect(settings)


# ---- a gateway's process ----------------------------------------------------------------------------------


class Device:
    """The real gateway, in a process of its own, with a data folder that a test prepares."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.home = folder / "gw-1"
        self.log = folder / "gateway.log"
        self.ports = choose_ports(folder / "gateway-ports.json", ["api", "http"])
        self.token = folder / "token"

    def start(self) -> subprocess.Popen[bytes]:
        layout = self.world.system.layout
        settings = {
            "GATEWAY_ID": "gw-1",
            "BLUEPRINT": NAME,
            "NATS_URL": self.world.system.url,
            "ENROL_CREDS": str(layout.creds("enrol")),
            "ENROLMENT_TOKEN": str(self.token),
            "TRUSTED_KEY": str(layout.trusted_key),
            "TRUSTED_ROOT": str(layout.trusted_root),
            "DATA_DIR": str(self.home),
            "API_PORT": str(self.ports["api"]),
            "HTTP_PORT": str(self.ports["http"]),
            "REFRESH_EVERY": "PT0.5S",
            "PRESENCE_EVERY": "PT1S",
        }
        env = os.environ | {f"SLMOPS_{key}": value for key, value in settings.items()}
        with self.log.open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "slmops.gateway.app"], env=env, stdout=log, stderr=log)

    @property
    def jwt(self) -> Path:
        return self.home / "user.jwt"

    async def claims(self) -> GatewayClaims:
        return GatewayClaims.of(self.jwt.read_text())

    async def health(self) -> dict[str, Any]:
        try:
            async with httpx.AsyncClient() as http:
                answer = await http.get(f"http://127.0.0.1:{self.ports['http']}/health")
                return {**answer.json(), "status": answer.status_code}
        except httpx.HTTPError:
            return {}

    async def reported(self) -> GatewayReported | None:
        return await self.world.operator.client.latest(GatewayReported, "gw-1")


async def presence_of(world: World, gateway_id: str) -> GatewayPresence:
    try:
        message = await world.operator.client.js.get_msg("PRESENCE", subject=subjects.presence(gateway_id), direct=True)
    except NotFoundError:
        return GatewayPresence()
    return GatewayPresence.model_validate_json(message.data or b"")


@pytest.fixture
async def device(world: World, tmp_path: Path) -> AsyncIterator[tuple[Device, Callable[[], subprocess.Popen[bytes]]]]:
    device, running = Device(world, tmp_path), []

    def start() -> subprocess.Popen[bytes]:
        for process in running:
            process.terminate()
            process.wait(timeout=30)
        running.append(device.start())
        return running[-1]

    yield device, start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(timeout=30)


Started = tuple[Device, Callable[[], subprocess.Popen[bytes]]]


async def test_a_gateway_that_was_off_for_long_returns_by_its_key_and_is_moved_without_a_person(
    world: World, device: Started
) -> None:
    gateway, start = device
    client = world.operator.client
    await world.operator.apply()
    await client.request(ApplyBlueprint(spec=Blueprint(name="kiosk", model="smollm2")))
    seed = own_seed(gateway.home)
    await enrol(world, seed)
    expired = credentials(world, seed, timedelta(days=-90), timedelta(days=-60)).jwt
    gateway.jwt.write_text(expired)
    start()  # it has no token
    first = await eventually(gateway.reported, bool, "a report")
    assert first is not None
    assert (first.blueprint, first.enrolment) == (NAME, 1)
    assert gateway.jwt.read_text() != expired

    await client.request(MoveGateway(gateway_id="gw-1", blueprint="kiosk"))
    moved = await eventually(
        gateway.reported, lambda r: r is not None and r.blueprint == "kiosk", "a report for the new blueprint"
    )
    assert moved is not None
    assert moved.enrolment == 2
    assert moved.sequence > first.sequence
    await eventually(lambda: presence_of(world, "gw-1"), lambda found: found.enrolment == 2, "its presence")
    claims = await gateway.claims()
    assert (claims.blueprint, claims.enrolment, claims.public_key) == ("kiosk", 2, public_key(seed))
    found = await eventually(
        lambda: view(world),
        lambda g: g is not None and g.standing is Standing.ENROLLED and g.blueprint == "kiosk",
        "it",
    )
    assert found is not None
    assert "dlq.slmops.gateway.reported.v1.gw-1" not in await world.operator.dead_letters()


async def test_a_gateway_renews_over_its_own_connection_and_a_revoked_one_says_so(
    world: World, device: Started
) -> None:
    gateway, start = device
    await world.operator.apply()
    seed = own_seed(gateway.home)
    await enrol(world, seed)
    old = credentials(world, seed, timedelta(days=-29), timedelta(days=1)).jwt
    gateway.jwt.write_text(old)
    start()

    async def renewed() -> bool:
        return gateway.jwt.read_text() != old

    await eventually(renewed, bool, "the renewal")
    claims = await gateway.claims()
    assert claims.expires_at is not None
    assert claims.expires_at - claims.issued_at == timedelta(days=30)

    async def connected() -> bool:
        return bool((await gateway.health()).get("connected"))

    await eventually(connected, bool, "connected with the new credential")
    assert not any(path.suffix == ".new" for path in gateway.home.iterdir())

    await world.operator.client.request(RevokeGateway(gateway_id="gw-1", reason="stolen"))
    gateway.jwt.write_text(credentials(world, seed, timedelta(days=-31), timedelta(days=-1)).jwt)
    start()
    health = await eventually(gateway.health, lambda found: "refused" in found, "the refusal")
    assert (health["status"], health["healthy"], health["connected"]) == (200, True, False)
    assert health["refused"]["code"] == CredentialRevoked.code
    assert "stolen" in health["refused"]["what"]
    assert "the fleet refuses this gateway" in gateway.log.read_text()


async def test_a_gateway_serves_while_the_bus_is_gone_and_reports_afterwards(world: World, device: Started) -> None:
    """Its reports wait on its disk, also over a restart."""
    gateway, start = device
    await world.operator.apply()
    await enrol(world, own_seed(gateway.home))
    gateway.token.write_text(world.system.layout.enrolment_token.read_text())
    start()
    first = await eventually(gateway.reported, bool, "a report")
    assert first is not None
    await world.system.stop_nats()

    async def health() -> tuple[Any, Any, Any]:
        found = await gateway.health()
        return found.get("status"), found.get("healthy"), found.get("connected")

    await eventually(health, lambda found: found == (200, True, False), "it is healthy without the bus")
    start()
    await eventually(health, lambda found: found == (200, True, False), "it starts without the bus")
    counter = gateway.home / "report.sequence"

    async def counted() -> int:
        return int(counter.read_text())

    waiting = await eventually(counted, lambda found: found > first.sequence, "a report that waits")
    await world.system.start_nats()
    last = await eventually(
        gateway.reported, lambda report: report is not None and report.sequence >= waiting, "what waited"
    )
    assert last is not None
    assert last.boot not in ("", first.boot)

    async def shown() -> GatewayView | None:
        with suppress(Unreachable):  # the service connects again at its own pace
            return await view(world)
        return None

    await eventually(shown, lambda g: g is not None and g.last_seen > first.at, "the operator sees it")
    assert await world.operator.dead_letters() == {}

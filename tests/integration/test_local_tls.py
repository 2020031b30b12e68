"""The local system is encrypted by default: its servers, the upgrade of a plain folder, and renewal while it runs."""

from __future__ import annotations

import asyncio
import io
import json
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from minio import Minio
from servers import running
from tls_world import serial

from slmops.console.commands.attention import find_items
from slmops.console.settings import find
from slmops.contracts.errors import ServerUntrusted
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus import provisioner
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.dialing import peer_certificate_expires
from slmops.kit.clock import utc_now
from slmops.kit.objects.store import Objects
from slmops.kit.settings import BusSettings, ObjectSettings
from slmops.local import system as local_system
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import BUCKET, S3_PORTS, nats_spec, s3_spec
from slmops.local.system import System


def of_the_release_before(root: Path) -> dict[str, int]:
    """Writes a data folder as a system without TLS leaves it, with a plan and an object. Returns its ports."""
    layout = Layout(root)
    layout.prepare()
    ports = choose_ports(layout.ports_file, ["nats", *S3_PORTS])
    client = {"nats_url": f"nats://{HOST}:{ports['nats']}", "nats_creds": str(layout.creds("console"))}
    layout.client_file.write_text(json.dumps(client))
    with running(nats_spec(layout, ports["nats"])), running(s3_spec(layout, ports)):
        keys = layout.s3_credentials()
        minio = Minio(f"{HOST}:{ports['s3.api']}", keys.access_key, keys.secret_key, secure=False)
        minio.put_object(BUCKET, "kept", io.BytesIO(b"1"), 1)
        asyncio.run(_publish(client["nats_url"], layout))
    return ports


async def _publish(url: str, layout: Layout) -> None:
    await provisioner.run(BusSettings(nats_url=url, nats_creds=layout.creds(PROVISIONER)))
    rollout = await BusClient.connect(BusSettings(nats_url=url, nats_creds=layout.creds("rollout")), name="rollout")
    await rollout.write_desired("blueprint.edge-chat", b"plan", replaces=0)
    await rollout.close()


def objects(system: System) -> Objects:
    keys = system.layout.s3_credentials()
    secrets = {"s3_access_key": keys.access_key, "s3_secret_key": keys.secret_key, "s3_bucket": BUCKET}
    given = {"s3_endpoint": system.s3_endpoint, "tls_ca": system.certificates.trusted}
    return Objects(ObjectSettings.model_validate(secrets | given))


async def test_a_folder_without_encryption_is_upgraded_by_the_next_start(tmp_path: Path) -> None:
    before = await asyncio.to_thread(of_the_release_before, tmp_path)
    async with System(tmp_path, services=("telemetry",), gateways=(), hosts=["edge.example"]) as system:
        settings = find(tmp_path)
        assert settings.nats_url == f"tls://{HOST}:{before['nats']}", "on the same port"
        assert settings.tls_ca == system.certificates.trusted
        rollout = await BusClient.connect(system.bus_settings("rollout"), name="rollout")
        assert (await rollout.read_desired("blueprint.edge-chat") or (b"",))[0] == b"plan"
        await rollout.close()
        assert await objects(system).get_object("kept") == b"1"
        console = await BusClient.connect(settings, name="console")
        assert (peer_certificate_expires(console.connection) or utc_now()) > utc_now() + timedelta(days=89)
        assert [item.kind for item in await find_items(console) if item.kind == "certificate"] == []
        await console.close()
        ports = json.loads(system.layout.ports_file.read_text())
        async with httpx.AsyncClient(verify=system.verify) as http:
            health = f"https://{HOST}:{ports['telemetry.http']}"
            assert (await http.get(f"{health}/health")).status_code == 200
            metrics = (await http.get(f"{health}/metrics")).text
            assert 'slmops_tls_certificate_expires_seconds{server="http"}' in metrics
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient() as stranger:
                await stranger.get(f"{health}/health")


async def test_certificates_are_renewed_while_the_system_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were issued 61 days ago, by a clock that was set back. Connections stay open."""
    ago = timedelta(days=61)
    monkeypatch.setattr(local_system, "_RENEW_EVERY", timedelta(milliseconds=50))
    monkeypatch.setattr(local_system, "utc_now", lambda: utc_now() - ago)
    async with System(tmp_path, services=(), gateways=()) as system:
        client = await BusClient.connect(system.bus_settings("console"), name="console")
        reconnected = asyncio.Event()
        client.on_reconnect(reconnected.set)
        port = json.loads(system.layout.ports_file.read_text())["nats"]
        first, files = await asyncio.to_thread(serial, port, system.certificates), _certificates(system)
        await asyncio.sleep(0.2)
        assert _certificates(system) == files, "nothing is renewed early"
        ago = timedelta()
        async with asyncio.timeout(30):
            while await asyncio.to_thread(serial, port, system.certificates) == first:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await client.connection.flush(5)
        assert not reconnected.is_set()
        assert all(_certificates(system)[name] != files[name] for name in ("nats", "s3", "http"))
        assert [state.restarts for state in system.states()] == [0, 0]
        assert await objects(system).get_object("nothing") is None
        await client.close()


def _certificates(system: System) -> dict[str, str]:
    return {name: system.certificates.server(name).read_text() for name in ("nats", "s3", "http")}


async def test_a_server_of_another_system_is_refused(tmp_path: Path) -> None:
    """Its NATS and S3 have certificates of its own authority, and would accept nothing else from us either."""
    async with System(tmp_path / "theirs", services=(), gateways=()) as theirs:
        ours = Layout(tmp_path / "ours")
        ours.prepare()
        ours.certificates.renew(utc_now())
        given = theirs.bus_settings("console", tls_ca=ours.certificates.trusted)
        with pytest.raises(ServerUntrusted, match="no authority"):
            await BusClient.connect(given, name="console")
        stranger = ObjectSettings(s3_endpoint=theirs.s3_endpoint, tls_ca=ours.certificates.trusted)
        with pytest.raises(ServerUntrusted, match="no authority"):
            await Objects(stranger).get_object("x")

"""The real servers start together, keep their data over a restart, and report why they cannot start."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import nats
import psutil
import pytest
import typer
import urllib3
from integration.kit_world import unrestricted
from minio import Minio
from nats.js.client import JetStreamContext
from servers import reserve_ports
from typer.testing import CliRunner, Result

from slmops.console.session import plugin_command
from slmops.contracts.errors import Conflict, DiskFull, IncompatibleFolder, PortTaken, Unreachable
from slmops.contracts.subjects import STREAMS, GiB, MiB
from slmops.kit.bus.provision import sized
from slmops.kit.tls import client_context
from slmops.local import capacity, command
from slmops.local.layout import Layout
from slmops.local.ports import HOST, is_free
from slmops.local.process import ProcessState
from slmops.local.running import owner
from slmops.local.system import System


def servers(root: Path, **fixed: int) -> System:
    return System(root, services=(), gateways=(), fixed_ports=fixed)


def ports(system: System) -> dict[str, int]:
    return dict(json.loads(system.layout.ports_file.read_text()))


def bucket(system: System) -> Minio:
    keys = system.layout.s3_credentials()
    pool = urllib3.PoolManager(ssl_context=client_context(system.certificates.trusted))
    return Minio(f"{HOST}:{ports(system)['s3.api']}", keys.access_key, keys.secret_key, http_client=pool)


async def jetstream(system: System) -> JetStreamContext:
    client = json.loads(system.layout.client_file.read_text())
    assert client["nats_creds"] == str(system.layout.creds("console"))
    creds = unrestricted(system.layout.keys, "rollout")
    nc = await nats.connect(
        client["nats_url"],
        user_credentials=str(creds),
        inbox_prefix=b"_INBOX_rollout",
        tls=client_context(Path(client["tls_ca"])),
        tls_handshake_first=True,
    )
    return nc.jetstream()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (another process: nothing to wait on)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("free", [1100 * MiB, 3 * GiB], ids=str)
async def test_a_fresh_system_starts_on_a_small_disk_with_smaller_streams(
    free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Streams that reserve 4 GiB whatever the size of the disk would make the start fail."""
    monkeypatch.setattr(capacity, "free_bytes", lambda _folder: free)
    for _ in range(2):  # a restart opens the streams that exist
        async with System(tmp_path, services=("telemetry",), gateways=()) as system:
            assert [state.restarts for state in system.states()] == [0, 0, 0]
            js = await jetstream(system)
            found = {spec.name: (await js.stream_info(spec.name)).config.max_bytes for spec in STREAMS}
            await js._nc.close()
            assert system.capacity
            assert found == {spec.name: spec.max_bytes for spec in sized(STREAMS, system.capacity.stream_bytes)}
            assert sum(size or 0 for size in found.values()) < free / 2


def run(function: Callable[..., None], *arguments: str) -> Result:
    """Calls a command as the command line does. Entry points need an installation, so they are not used."""
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("run")(plugin_command(function))
    return CliRunner().invoke(app, ["run", *arguments])


def test_a_detached_system_runs_until_down_and_its_logs_can_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(tmp_path)]
    nothing = run(command.down, *data)
    assert (nothing.exit_code, "no system is running" in nothing.stderr) == (1, True)
    try:
        done = run(command.up, *data, "--gateways", "0", "--detach")
        assert done.exit_code == 0, done.stderr
        pid = owner(Layout(tmp_path))
        assert f"pid {pid}" in done.stdout
        again = run(command.up, *data, "--gateways", "0", "--detach")
        assert again.exit_code == 75
        assert "another slmops uses this data folder" in again.stderr
        assert owner(Layout(tmp_path)) == pid
        assert run(command.logs, "registry", "nats", *data, "-n", "1").exit_code == 0
        assert "registry.log <==" in capfd.readouterr().out
        assert "Known: " in run(command.logs, "nobody", *data).stderr
    finally:
        stopped = run(command.down, *data)
    assert (stopped.exit_code, f"Stopped pid {pid}" in stopped.stdout) == (0, True)
    assert owner(Layout(tmp_path)) is None
    states = json.loads((tmp_path / "state.json").read_text())["processes"]
    assert {state["status"] for state in states} == {"stopped"}


async def test_a_full_disk_is_an_error_before_any_process_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capacity, "free_bytes", lambda _folder: 500 * MiB)
    system = servers(tmp_path)
    with pytest.raises(DiskFull, match="500MiB free"):
        await system.start()
    assert system.states() == []


async def test_the_servers_keep_their_data_and_ports_over_a_restart(tmp_path: Path) -> None:
    async with servers(tmp_path) as system:
        before = ports(system)
        js = await jetstream(system)
        await (await js.key_value("desired")).put("blueprint.edge-chat", b"plan")
        await js._nc.close()
        data = os.urandom(5_000_000)
        await asyncio.to_thread(bucket(system).put_object, "slmops", "blobs/x", io.BytesIO(data), len(data))
    assert all(is_free(port) for port in before.values())
    async with servers(tmp_path) as system:
        assert ports(system) == before
        js = await jetstream(system)
        assert (await (await js.key_value("desired")).get("blueprint.edge-chat")).value == b"plan"
        await js._nc.close()
        assert (await asyncio.to_thread(bucket(system).get_object, "slmops", "blobs/x")).data == data


async def test_data_is_kept_when_every_port_changes(tmp_path: Path) -> None:
    async with servers(tmp_path) as system:
        old = ports(system)
        await asyncio.to_thread(bucket(system).put_object, "slmops", "a", io.BytesIO(b"1"), 1)
    taken = [socket.create_server((HOST, port)) for port in old.values()]
    try:
        async with servers(tmp_path) as system:
            assert not set(ports(system).values()) & set(old.values())
            await asyncio.to_thread(bucket(system).put_object, "slmops", "b", io.BytesIO(b"2"), 1)
            for key, value in (("a", b"1"), ("b", b"2")):
                assert (await asyncio.to_thread(bucket(system).get_object, "slmops", key)).data == value
    finally:
        for server in taken:
            server.close()


async def test_the_servers_listen_on_the_loopback_interface_only(tmp_path: Path) -> None:
    async with servers(tmp_path) as system:
        pids = [state.pid for state in system.states()]
        listening = [c for pid in pids for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN"]
        assert {connection.laddr.ip for connection in listening} == {HOST}
        assert {connection.laddr.port for connection in listening} == set(ports(system).values())


async def test_a_request_without_credentials_cannot_read_an_object(tmp_path: Path) -> None:
    async with servers(tmp_path) as system, httpx.AsyncClient(verify=system.verify) as http:
        await asyncio.to_thread(bucket(system).put_object, "slmops", "a", io.BytesIO(b"1"), 1)
        answer = await http.get(f"https://{HOST}:{ports(system)['s3.api']}/slmops/a")
        assert answer.status_code == 403


@pytest.mark.parametrize("name", ["nats", "s3.api"])
async def test_a_taken_fixed_port_is_an_error_and_starts_no_process(tmp_path: Path, name: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        system = servers(tmp_path, **{name: taken.getsockname()[1]})
        with pytest.raises(PortTaken, match=name):
            await system.start()
    assert system.states() == []


async def test_a_killed_server_is_restarted_on_its_port_with_its_data(tmp_path: Path) -> None:
    async with servers(tmp_path) as system:
        js = await jetstream(system)
        kv = await js.key_value("desired")
        await kv.put("k", b"v")
        await asyncio.to_thread(bucket(system).put_object, "slmops", "a", io.BytesIO(b"1"), 1)
        await asyncio.gather(system.kill("nats"), system.kill("s3"))
        await until(lambda: [(s.restarts, s.status) for s in system.states()] == [(1, "ready")] * 2)
        await until(lambda: js._nc.is_connected)
        assert (await kv.get("k")).value == b"v"
        assert (await asyncio.to_thread(bucket(system).get_object, "slmops", "a")).data == b"1"
        await js._nc.close()


async def test_a_second_system_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async with servers(tmp_path):
        with pytest.raises(Conflict, match="another slmops"):
            await servers(tmp_path).start()
    async with servers(tmp_path):
        pass


async def test_a_service_that_fails_to_start_stops_the_system_and_the_error_has_the_reason(tmp_path: Path) -> None:
    seen: list[ProcessState] = []
    system = System(tmp_path, services=("nosuchservice",), gateways=())
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "nosuchservice.creds").touch()
    with pytest.raises(Unreachable, match=r"nosuchservice.*(?s:.*)No module named"):
        await system.start(seen.append)
    assert {state.status for state in system.states()} == {"stopped", "failed"}
    assert {state.name for state in seen if state.status == "ready"} == {"nats", "s3"}


def test_up_prints_its_progress_and_ctrl_c_stops_the_servers(tmp_path: Path) -> None:
    code = """
import asyncio, pathlib, sys
from rich.console import Console
from slmops.local import command
from slmops.local.system import System
try:
    asyncio.run(command._run(System(pathlib.Path(sys.argv[1]), services=(), gateways=()), Console()))
except asyncio.CancelledError:
    print('stopped')
"""
    reserve_ports(tmp_path)
    up = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert up.stdout
    lines: list[str] = []
    while not lines or not lines[-1].startswith("Ready"):
        lines.append(up.stdout.readline())
        assert lines[-1], lines
    pids = [process.pid for process in psutil.Process(up.pid).children()]
    assert len(pids) == 2
    up.send_signal(signal.SIGINT)
    rest, _ = up.communicate(timeout=30)
    assert "nats: stopped" in rest
    assert rest.endswith("stopped\n")
    assert up.returncode == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_secrets_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    async with servers(tmp_path) as system:
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
        assert system.layout.s3_credentials().secret_key not in system.layout.client_file.read_text()


@pytest.mark.parametrize("module", ["slmops.console", "slmops.gateway.app"])
def test_a_data_folder_of_a_newer_release_is_refused_in_one_line_and_left_alone(module: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    folder.mkdir()
    other.write_text("")
    kind = "slmops up" if module == "slmops.console" else "a gateway"
    (folder / "layout.json").write_text(json.dumps({"kind": kind, "version": 99, "release": "9.0.0"}))
    arguments = ["up", "--data", str(folder)] if module == "slmops.console" else []
    required = dict.fromkeys(["ENROL_CREDS", "ENROLMENT_TOKEN", "TRUSTED_KEY", "TRUSTED_ROOT"], str(other))
    settings = {"GATEWAY_ID": "gw-1", "BLUEPRINT": "edge-chat", "DATA_DIR": str(folder), **required}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **({} if arguments else {f"SLMOPS_{name}": value for name, value in settings.items()})},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == IncompatibleFolder.exit_code, done.stderr
    assert "version 99 of its layout, written by release 9.0.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["layout.json"]

"""Every port that we open asks for a credential, on loopback too, or answers only what is public by decision.

The probes are in `port_probe.py`. That they find what is open is shown on SeaweedFS as it was started before it asked.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import re
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import pytest_asyncio
import urllib3
import yaml
from cryptography import x509
from minio import Minio
from minio.error import S3Error
from port_probe import (
    Answer,
    Listener,
    damage,
    encrypted,
    http,
    listeners,
    nats_refusal,
    socket_files,
    speaks_grpc,
    statuses,
    steal,
    with_certificate,
    without_certificate,
)
from servers import running
from tls_world import new_authority

from slmops.kit.tls import client_context
from slmops.local.environment import SERVICES, default_gateways
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.process import ProcessSpec
from slmops.local.servers import _WEED_OPTIONS, BUCKET, NATS_PORTS, S3_PORTS, nats_answers, s3_spec
from slmops.local.system import System

ROOT = Path(__file__).parents[2]
GATEWAY = "gw-1"
S3_API = "s3.api"
BY_CERTIFICATE = tuple(name for name in S3_PORTS if name != S3_API)
KEY, CONTENT = "blobs/sha256/4be1", b"weights that cost somebody a month"

REFUSED = {401, 403}
"""Statuses with which a server that speaks to everybody refuses one who shows nothing."""
NOT_THERE = {404, 405}
PUBLIC_HEALTH = {("GET", "/health"), ("GET", "/metrics")}
PUBLIC: dict[str, set[tuple[str, str]]] = {
    **{f"{service}.http": PUBLIC_HEALTH for service in SERVICES},
    "packager.http": PUBLIC_HEALTH | {("GET", "/tuf/metadata/1.root.json"), ("GET", "/tuf/metadata/timestamp.json")},
    f"{GATEWAY}.http": PUBLIC_HEALTH,
    f"{GATEWAY}.api": {
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
    },
}
"""What answers anybody, by decision: state and counts, signed trust metadata, and the gateway's OpenAI API."""
S3_PUBLIC = {("GET", "/status"), ("GET", "/healthz"), ("GET", "/readyz"), ("OPTIONS", "/")}
"""S3's own health and the preflight of browsers: 200, and nothing in it."""


class Store:
    """A running SeaweedFS and one object in it, put with our keys."""

    def __init__(self, layout: Layout, ports: Mapping[str, int], trusted: Path | None = None) -> None:
        self.ports = ports
        self.certificate = layout.weed_identity
        keys = layout.s3_credentials()
        self._minio = Minio(
            f"{HOST}:{ports[S3_API]}",
            keys.access_key,
            keys.secret_key,
            secure=trusted is not None,
            http_client=urllib3.PoolManager(ssl_context=client_context(trusted)) if trusted else None,
        )

    def put(self) -> None:
        if not self._minio.bucket_exists(BUCKET):
            self._minio.make_bucket(BUCKET)
        self._minio.put_object(BUCKET, KEY, io.BytesIO(CONTENT), len(CONTENT))

    def content(self) -> bytes | None:
        """None when it was deleted."""
        try:
            return bytes(self._minio.get_object(BUCKET, KEY).data)
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None

    def inside(self, name: str, path: str, *, closed: bool = True) -> Answer:
        """What a port answers to SeaweedFS itself: over TLS with the certificate when ports are closed."""
        return http(self.ports[name], "GET", path, tls=with_certificate(self.certificate) if closed else None)

    def file_ids(self, *, closed: bool = True) -> list[str]:
        """Under which names the volume server holds the object's bytes."""
        described = self.inside("s3.filer", f"/buckets/{BUCKET}/{KEY}?metadata=true", closed=closed)
        return re.findall(r'"file_id":\s*"([^"]+)"', described.body.decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """Everything that `slmops up --gateways 1` starts."""
    async with System(tmp_path_factory.mktemp("open-ports") / "data", gateways=default_gateways(1)) as system:
        yield system


@pytest.fixture
def ports(system: System) -> dict[str, int]:
    return dict(json.loads(system.layout.ports_file.read_text()))


def listening(system: System) -> set[Listener]:
    return listeners(state.pid for state in system.states() if state.pid)


def check_certificate_is_asked(port: int) -> None:
    """Neither HTTP nor gRPC says anything, in plain text or over TLS, to one without a certificate."""
    stranger = without_certificate()
    assert not speaks_grpc(port)
    assert not speaks_grpc(port, tls=stranger)
    for status in statuses(port).values():
        assert status in (None, 400), "plain HTTP on a port with TLS is no request"
    refused = http(port, "GET", "/", tls=stranger)
    assert refused.status is None
    assert "certificate required" in refused.refusal


def check_keys_are_asked(port: int) -> None:
    """S3 answers nothing but its health to a request without a signature, and nothing to one without TLS."""
    assert set(statuses(port).values()) <= {None, 400}
    answers = statuses(port, encrypted())
    assert {request for request, status in answers.items() if status == 200} == S3_PUBLIC
    assert {http(port, *request, tls=encrypted()).body for request in S3_PUBLIC} == {b""}
    assert {status for request, status in answers.items() if request not in S3_PUBLIC} <= REFUSED | NOT_THERE
    assert not speaks_grpc(port)


def check_object_is_out_of_reach(store: Store, ports: set[int]) -> None:
    """One object cannot be listed, read, overwritten or deleted by any port without a credential."""
    store.put()
    file_ids = store.file_ids()
    assert [store.inside("s3.volume", f"/{file_id}").body for file_id in file_ids] == [CONTENT]
    loot = steal(ports, BUCKET, KEY, CONTENT, file_ids)
    assert (loot.listed, loot.read) == (set(), set())
    for method in ("PUT", "POST", "DELETE"):
        damage(ports, BUCKET, KEY, method, file_ids)
        assert store.content() == CONTENT, method


async def test_every_socket_is_known_and_on_loopback(system: System, ports: dict[str, int]) -> None:
    found = listening(system)
    assert {listener.ip for listener in found} == {HOST}
    assert {listener.port for listener in found} == set(ports.values())
    assert set(ports) == {*NATS_PORTS, S3_API, *BY_CERTIFICATE, *PUBLIC}


@pytest.mark.parametrize("name", BY_CERTIFICATE)
async def test_ports_inside_the_object_store_ask_for_a_certificate(
    system: System, ports: dict[str, int], name: str
) -> None:
    await asyncio.to_thread(check_certificate_is_asked, ports[name])


async def test_s3_asks_for_keys(system: System, ports: dict[str, int]) -> None:
    await asyncio.to_thread(check_keys_are_asked, ports[S3_API])


async def test_nats_asks_for_credentials(system: System, ports: dict[str, int]) -> None:
    for connect in (b"CONNECT {}", b'CONNECT {"user":"nobody","pass":""}', b"SUB > 1"):
        assert b"Authorization Violation" in await nats_refusal(ports["nats"], connect, b"SUB > 1", b"PING")
    assert set((await asyncio.to_thread(statuses, ports["nats"])).values()) == {None}
    websocket = (await asyncio.to_thread(statuses, ports["nats.websocket"], encrypted())).values()
    assert set(websocket) <= {400, 405}, "no handshake of a websocket, no answer"


async def test_nats_is_never_greeted_without_tls(system: System, ports: dict[str, int]) -> None:
    reader, writer = await asyncio.open_connection(HOST, ports["nats"])
    writer.write(b"CONNECT {}\r\nPING\r\n")
    assert await reader.read() == b""
    writer.close()
    assert set((await asyncio.to_thread(statuses, ports["nats.websocket"])).values()) <= {None, 400}


@pytest.mark.parametrize("name", PUBLIC)
async def test_what_is_public_is_listed_here_and_nothing_else_is(
    system: System, ports: dict[str, int], name: str
) -> None:
    tls = None if name.endswith(".api") else encrypted()
    answers = await asyncio.to_thread(statuses, ports[name], tls)
    assert {request for request, status in answers.items() if status not in NOT_THERE} == PUBLIC[name]
    assert None not in answers.values()
    assert not await asyncio.to_thread(speaks_grpc, ports[name])


async def test_a_blob_is_out_of_reach_without_credentials(system: System, ports: dict[str, int]) -> None:
    store = Store(system.layout, ports, system.certificates.trusted)
    found = {listener.port for listener in listening(system)}
    await asyncio.to_thread(check_object_is_out_of_reach, store, found)


async def test_sockets_of_the_file_system_are_private_or_ask_for_a_certificate(system: System) -> None:
    found = socket_files(state.pid for state in system.states() if state.pid)
    private = {path for path in found if not path.is_absolute()}
    assert private == {Path("filer.sock"), Path("s3.sock")}
    assert all((system.layout.home("s3") / path).is_socket() for path in private)
    assert stat.S_IMODE(system.layout.root.stat().st_mode) == 0o700
    assert len(found - private) == sum(name.endswith("-grpc") for name in BY_CERTIFICATE)
    for path in found - private:
        assert not await asyncio.to_thread(speaks_grpc, path)
        assert not await asyncio.to_thread(speaks_grpc, path, tls=without_certificate())


# Below: SeaweedFS alone. As it was started before ports asked, as compose starts it, and when a certificate is damaged.


@pytest.fixture
def own(tmp_path: Path) -> tuple[Layout, dict[str, int]]:
    """A prepared data folder and free ports for SeaweedFS."""
    layout = Layout(tmp_path)
    layout.prepare()
    return layout, choose_ports(layout.ports_file, S3_PORTS)


def open_spec(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    """SeaweedFS as `slmops up` started it before its ports asked for a certificate."""
    spec = s3_spec(layout, ports)
    (layout.home("s3") / "security.toml").unlink()
    return spec


def test_the_probe_takes_what_an_open_server_gives(own: tuple[Layout, dict[str, int]]) -> None:
    layout, ports = own
    with running(open_spec(layout, ports)):
        store = Store(layout, ports)
        store.put()
        file_ids = store.file_ids(closed=False)
        loot = steal(ports.values(), BUCKET, KEY, CONTENT, file_ids)
        assert loot.listed == {ports["s3.filer"], ports["s3.filer-grpc"]}
        assert loot.read == {ports["s3.filer"], ports["s3.volume"]}
        assert {name for name, port in ports.items() if speaks_grpc(port)} == {n for n in ports if n.endswith("-grpc")}
        for name in BY_CERTIFICATE:
            with pytest.raises(AssertionError):
                check_certificate_is_asked(ports[name])
        damage(ports.values(), BUCKET, KEY, "PUT", ())
        assert store.content() == b"damaged"
        damage(ports.values(), BUCKET, KEY, "DELETE", ())
        assert store.content() is None


def test_objects_of_a_folder_from_before_are_still_there(own: tuple[Layout, dict[str, int]]) -> None:
    layout, ports = own
    with running(open_spec(layout, ports)):
        store = Store(layout, ports)
        store.put()
    with running(s3_spec(layout, ports)):
        store = Store(layout, ports)
        assert store.content() == CONTENT
        check_object_is_out_of_reach(store, set(ports.values()))


def test_a_damaged_certificate_ends_the_server(own: tuple[Layout, dict[str, int]]) -> None:
    """SeaweedFS serves gRPC without TLS when it cannot read a certificate; it must not go on like that."""
    layout, ports = own
    layout.weed_identity.write_text("no certificate")
    with pytest.raises(pytest.fail.Exception, match="does not start"), running(s3_spec(layout, ports)):
        pass


def prepare_for_containers() -> ModuleType:
    found = importlib.util.spec_from_file_location("prepare", ROOT / "deploy" / "docker" / "prepare.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def container(name: str, layout: Layout) -> Path:
    """The volume of a server's container as `init` fills it, below `layout.root` instead of `/`."""
    home = layout.root / "volumes" / name
    (home / "keys").mkdir(parents=True)
    for file, text in prepare_for_containers()._server_files(layout, home).items():
        (home / "keys" / file).write_text(text.replace("/data", str(home)))
    return home


async def greets_over_http(port: int) -> bool:
    return (await asyncio.to_thread(http, port, "GET", "/healthz", tls=encrypted())).status == 200


def compose_spec(name: str, home: Path, **changed: object) -> ProcessSpec:
    """A server as docker-compose.yml starts it, in `home` instead of `/data`, and on loopback."""
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    program, *arguments = (word.replace("/data", str(home)).replace("0.0.0.0", HOST) for word in service["command"])
    folder = Path(service.get("working_dir", "/data").replace("/data", str(home)))
    spec = ProcessSpec(name, [str(Path(sys.executable).parent / program), *arguments], home / "log", cwd=folder)
    return replace(spec, **changed)  # type: ignore[arg-type]


def test_the_object_store_of_compose_asks_on_every_port(own: tuple[Layout, dict[str, int]]) -> None:
    layout, ports = own
    ports = {name: port for name, port in ports.items() if not name.startswith("s3.admin")}  # `weed server` has none
    spec = compose_spec("s3", container("s3", layout), ready=lambda: greets_over_http(ports[S3_API]))
    spec = replace(spec, argv=[*spec.argv, *(f"-{_WEED_OPTIONS[name]}={port}" for name, port in ports.items())])
    with running(spec) as pid:
        assert {listener.port for listener in listeners([pid])} == set(ports.values())
        store = Store(layout, ports, layout.certificates.trusted)
        check_object_is_out_of_reach(store, set(ports.values()))
        check_keys_are_asked(ports[S3_API])
        for name in ports.keys() - {S3_API}:
            check_certificate_is_asked(ports[name])


def test_nats_of_compose_opens_its_two_ports_only(own: tuple[Layout, dict[str, int]]) -> None:
    layout, _ = own
    home = container("nats", layout)
    port, websocket = choose_ports(layout.root / "nats.json", NATS_PORTS).values()
    config = home / "keys" / "nats-server.conf"
    config.write_text(config.read_text().replace("0.0.0.0:4222", f"{HOST}:{port}"))
    config.write_text(config.read_text().replace("0.0.0.0:8443", f"{HOST}:{websocket}"))
    trusted = layout.certificates.trusted
    ready = partial(nats_answers, port, client_context(trusted))
    with running(compose_spec("nats", home, ready=ready)) as pid:
        assert {listener.port for listener in listeners([pid])} == {port, websocket}
        assert b"Authorization Violation" in asyncio.run(nats_refusal(port, b"CONNECT {}", b"PING"))
        assert healthy(f"tls://{HOST}:{port}", trusted)
        assert not healthy(f"nats://{HOST}:{port}", trusted)
        other = new_authority(layout.root / "other").trusted
        assert not healthy(f"tls://{HOST}:{port}", other)
    assert not healthy(f"tls://{HOST}:{port}", trusted)


def healthy(url: str, trusted: Path) -> bool:
    """What the health check of a container says."""
    check = ROOT / "deploy" / "docker" / "healthy.py"
    return (
        subprocess.run(
            [sys.executable, check, url], capture_output=True, env={"SLMOPS_TLS_CA": str(trusted)}
        ).returncode
        == 0
    )


def test_compose_takes_the_operators_certificates_or_issues_its_own(tmp_path: Path) -> None:
    layout, prepare = Layout(tmp_path), prepare_for_containers()
    layout.prepare()
    own = tmp_path / "own"
    own.mkdir()
    issued = prepare.certificate_files(layout, own)
    assert issued == prepare.certificate_files(layout, own), "a second start keeps them"
    [authority] = x509.load_pem_x509_certificates(issued["ca.pem"].encode())
    for name in ("nats", "s3"):
        certificate = x509.load_pem_x509_certificate(issued[f"{name}.pem"].encode())
        certificate.verify_directly_issued_by(authority)
        hosts = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {"nats", "s3"} <= set(hosts.get_values_for_type(x509.DNSName))
    for file in ("ca.pem", "nats.pem", "s3.pem"):
        (own / file).write_text(f"the operator's {file}")
    assert prepare.certificate_files(layout, own) == {
        file: f"the operator's {file}" for file in ("ca.pem", "nats.pem", "s3.pem")
    }

"""Every open port, also on loopback, requires a credential or answers only what is public by decision.

The probes are in `port_probe.py`. A SeaweedFS without authentication proves that they find open ports.
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
    encrypted,
    http,
    listeners,
    nats_refusal,
    socket_files,
    speaks_grpc,
    statuses,
    try_to_change,
    try_to_read,
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
KEY, CONTENT = "blobs/sha256/4be1", b"secret weights of a model"

REFUSED = {401, 403}
"""Statuses of an HTTP server that refuses a request without credentials."""
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
"""Public requests by decision: state and counts, signed trust metadata, and the gateway's OpenAI API."""
S3_PUBLIC = {("GET", "/status"), ("GET", "/healthz"), ("GET", "/readyz"), ("OPTIONS", "/")}
"""S3's health checks and the preflight of browsers: 200 with an empty body."""


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
        """Returns the content of the object, or None if it was deleted."""
        try:
            return bytes(self._minio.get_object(BUCKET, KEY).data)
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None

    def inside(self, name: str, path: str, *, closed: bool = True) -> Answer:
        """Returns what a port answers to SeaweedFS itself: over TLS with its certificate if the ports are closed."""
        return http(self.ports[name], "GET", path, tls=with_certificate(self.certificate) if closed else None)

    def file_ids(self, *, closed: bool = True) -> list[str]:
        """Returns the ids under which the volume server stores the object."""
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


def check_certificate_is_required(port: int) -> None:
    """Asserts that a port answers neither HTTP nor gRPC, in plain text or over TLS, without a client certificate."""
    anonymous = without_certificate()
    assert not speaks_grpc(port)
    assert not speaks_grpc(port, tls=anonymous)
    for status in statuses(port).values():
        assert status in (None, 400), "plain HTTP on a port with TLS is no request"
    refused = http(port, "GET", "/", tls=anonymous)
    assert refused.status is None
    assert "certificate required" in refused.refusal


def check_keys_are_required(port: int) -> None:
    """Asserts that S3 answers only its public requests without a signature, and nothing without TLS."""
    assert set(statuses(port).values()) <= {None, 400}
    answers = statuses(port, encrypted())
    assert {request for request, status in answers.items() if status == 200} == S3_PUBLIC
    assert {http(port, *request, tls=encrypted()).body for request in S3_PUBLIC} == {b""}
    assert {status for request, status in answers.items() if request not in S3_PUBLIC} <= REFUSED | NOT_THERE
    assert not speaks_grpc(port)


def check_object_is_protected(store: Store, ports: set[int]) -> None:
    """Asserts that no port lists, returns, overwrites or deletes an object without a credential."""
    store.put()
    file_ids = store.file_ids()
    assert [store.inside("s3.volume", f"/{file_id}").body for file_id in file_ids] == [CONTENT]
    leak = try_to_read(ports, BUCKET, KEY, CONTENT, file_ids)
    assert (leak.listed, leak.read) == (set(), set())
    for method in ("PUT", "POST", "DELETE"):
        try_to_change(ports, BUCKET, KEY, method, file_ids)
        assert store.content() == CONTENT, method


async def test_only_the_known_ports_are_open_and_only_on_loopback(system: System, ports: dict[str, int]) -> None:
    found = listening(system)
    assert {listener.ip for listener in found} == {HOST}
    assert {listener.port for listener in found} == set(ports.values())
    assert set(ports) == {*NATS_PORTS, S3_API, *BY_CERTIFICATE, *PUBLIC}


@pytest.mark.parametrize("name", BY_CERTIFICATE)
async def test_internal_ports_of_the_object_store_require_a_certificate(
    system: System, ports: dict[str, int], name: str
) -> None:
    await asyncio.to_thread(check_certificate_is_required, ports[name])


async def test_s3_requires_keys(system: System, ports: dict[str, int]) -> None:
    await asyncio.to_thread(check_keys_are_required, ports[S3_API])


async def test_nats_requires_credentials(system: System, ports: dict[str, int]) -> None:
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
async def test_each_http_port_answers_exactly_its_public_requests(
    system: System, ports: dict[str, int], name: str
) -> None:
    tls = None if name.endswith(".api") else encrypted()
    answers = await asyncio.to_thread(statuses, ports[name], tls)
    assert {request for request, status in answers.items() if status not in NOT_THERE} == PUBLIC[name]
    assert None not in answers.values()
    assert not await asyncio.to_thread(speaks_grpc, ports[name])


async def test_a_blob_cannot_be_read_or_changed_without_credentials(system: System, ports: dict[str, int]) -> None:
    store = Store(system.layout, ports, system.certificates.trusted)
    found = {listener.port for listener in listening(system)}
    await asyncio.to_thread(check_object_is_protected, store, found)


async def test_unix_sockets_are_private_or_require_a_certificate(system: System) -> None:
    found = socket_files(state.pid for state in system.states() if state.pid)
    private = {path for path in found if not path.is_absolute()}
    assert private == {Path("filer.sock"), Path("s3.sock")}
    assert all((system.layout.home("s3") / path).is_socket() for path in private)
    assert stat.S_IMODE(system.layout.root.stat().st_mode) == 0o700
    assert len(found - private) == sum(name.endswith("-grpc") for name in BY_CERTIFICATE)
    for path in found - private:
        assert not await asyncio.to_thread(speaks_grpc, path)
        assert not await asyncio.to_thread(speaks_grpc, path, tls=without_certificate())


# SeaweedFS alone: without authentication, as compose starts it, and with a damaged certificate.


@pytest.fixture
def own(tmp_path: Path) -> tuple[Layout, dict[str, int]]:
    """A prepared data folder and free ports for SeaweedFS."""
    layout = Layout(tmp_path)
    layout.prepare()
    return layout, choose_ports(layout.ports_file, S3_PORTS)


def open_spec(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    """Returns SeaweedFS as older releases started it: without certificates on its ports."""
    spec = s3_spec(layout, ports)
    (layout.home("s3") / "security.toml").unlink()
    return spec


def test_the_probes_read_and_change_an_object_on_a_server_without_authentication(
    own: tuple[Layout, dict[str, int]],
) -> None:
    layout, ports = own
    with running(open_spec(layout, ports)):
        store = Store(layout, ports)
        store.put()
        file_ids = store.file_ids(closed=False)
        leak = try_to_read(ports.values(), BUCKET, KEY, CONTENT, file_ids)
        assert leak.listed == {ports["s3.filer"], ports["s3.filer-grpc"]}
        assert leak.read == {ports["s3.filer"], ports["s3.volume"]}
        assert {name for name, port in ports.items() if speaks_grpc(port)} == {n for n in ports if n.endswith("-grpc")}
        for name in BY_CERTIFICATE:
            with pytest.raises(AssertionError):
                check_certificate_is_required(ports[name])
        try_to_change(ports.values(), BUCKET, KEY, "PUT", ())
        assert store.content() == b"damaged"
        try_to_change(ports.values(), BUCKET, KEY, "DELETE", ())
        assert store.content() is None


def test_objects_of_a_data_folder_of_an_older_release_are_kept_and_protected(
    own: tuple[Layout, dict[str, int]],
) -> None:
    layout, ports = own
    with running(open_spec(layout, ports)):
        store = Store(layout, ports)
        store.put()
    with running(s3_spec(layout, ports)):
        store = Store(layout, ports)
        assert store.content() == CONTENT
        check_object_is_protected(store, set(ports.values()))


def test_a_server_with_a_damaged_certificate_does_not_start(own: tuple[Layout, dict[str, int]]) -> None:
    """SeaweedFS serves gRPC without TLS if it cannot read a certificate, so such a start must fail."""
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
    """Makes the volume of a server's container as `init` fills it, below `layout.root` instead of `/`."""
    home = layout.root / "volumes" / name
    (home / "keys").mkdir(parents=True)
    for file, text in prepare_for_containers()._server_files(layout, home).items():
        (home / "keys" / file).write_text(text.replace("/data", str(home)))
    return home


async def is_healthy(port: int) -> bool:
    return (await asyncio.to_thread(http, port, "GET", "/healthz", tls=encrypted())).status == 200


def compose_spec(name: str, home: Path, **changed: object) -> ProcessSpec:
    """Returns a server as docker-compose.yml starts it, in `home` instead of `/data`, and on loopback."""
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    program, *arguments = (word.replace("/data", str(home)).replace("0.0.0.0", HOST) for word in service["command"])
    folder = Path(service.get("working_dir", "/data").replace("/data", str(home)))
    spec = ProcessSpec(name, [str(Path(sys.executable).parent / program), *arguments], home / "log", cwd=folder)
    return replace(spec, **changed)  # type: ignore[arg-type]


def test_the_object_store_of_compose_requires_credentials_on_every_port(own: tuple[Layout, dict[str, int]]) -> None:
    layout, ports = own
    ports = {name: port for name, port in ports.items() if not name.startswith("s3.admin")}  # `weed server` has none
    spec = compose_spec("s3", container("s3", layout), ready=lambda: is_healthy(ports[S3_API]))
    spec = replace(spec, argv=[*spec.argv, *(f"-{_WEED_OPTIONS[name]}={port}" for name, port in ports.items())])
    with running(spec) as pid:
        assert {listener.port for listener in listeners([pid])} == set(ports.values())
        store = Store(layout, ports, layout.certificates.trusted)
        check_object_is_protected(store, set(ports.values()))
        check_keys_are_required(ports[S3_API])
        for name in ports.keys() - {S3_API}:
            check_certificate_is_required(ports[name])


def test_nats_of_compose_opens_only_its_two_ports(own: tuple[Layout, dict[str, int]]) -> None:
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
    """Returns the result of the container's health check."""
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

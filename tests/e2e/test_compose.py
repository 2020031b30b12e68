"""`docker compose up` on one host: the whole loop in containers, as a user who has only Docker runs it.

Images are built from the working tree. `BASE_IMAGE` and the `PIP_…` variables of deploy/docker/README.md are respected.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet import write_golden
from tiny_model import make_tiny_llama

from slmops.local.ports import choose_ports

ROOT = Path(__file__).parents[2]
GATEWAYS = ("gw-1", "gw-2", "gw-3")
SERVERS = ("nats", "s3")
SERVICES = ("access", "registry", "optimizer", "packager", "rollout", "telemetry")
KEYS = {
    "nats": {"nats-server.conf", "nats.pem"},
    "s3": {"identities.json", "security.toml", "weed.pem", "s3.pem"},
    "access": {"nats.creds", "nats-answers.creds", "access-keys.json", "access-system.creds", "first-admin.json"},
    "registry": {"nats.creds", "nats-answers.creds", "s3.env"},
    "optimizer": {"nats.creds", "nats-answers.creds", "s3.env"},
    "packager": {"nats.creds", "nats-answers.creds", "s3.env", "package-signing.pem", "tuf"},
    "rollout": {"nats.creds", "nats-answers.creds", "gateway-signing", "enrolment-token", "plan.pem"},
    "telemetry": {"nats.creds"},
    **{gateway: {"enrol.creds", "enrolment-token", "package-trusted.pem", "trusted-root.json"} for gateway in GATEWAYS},
}
BLUEPRINT = {
    "name": "edge-chat",
    "model": "tiny",
    "soak": {"seconds": 0.5, "golden_every_s": 0.1},
    "telemetry": {"every_s": 0.5},
}
TRY_PORT = """
import socket
try: print("open" if socket.create_connection(("{host}", {port}), 5) else "")
except OSError: print("closed")
"""
TRY_GRPC = """
import contextlib, socket, ssl
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["h2"])
frames = []
for secured in (False, True):
    with contextlib.suppress(OSError), socket.create_connection(("s3", 18333), 5) as connection:
        connection = context.wrap_socket(connection) if secured else connection
        connection.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        frames.append(connection.recv(9))
settings = bytes([4])  # the type of the first frame of an HTTP/2 server
print("open" if any(frame[3:4] == settings for frame in frames) else "closed")
"""


def succeeds(*argv: str) -> bool:
    return shutil.which(argv[0]) is not None and not subprocess.run(argv, capture_output=True, timeout=30).returncode


def compose_command() -> list[str]:
    """Returns the command of Compose: docker's plugin, or the older program. Skips if it or the engine is missing."""
    if not succeeds("docker", "info"):
        pytest.skip("no Docker engine is running: `docker info` fails")
    if succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    if succeeds("docker-compose", "version"):
        return ["docker-compose"]
    pytest.skip("Docker Compose is not installed: neither `docker compose` nor `docker-compose`")


@dataclass(frozen=True)
class Compose:
    """One Compose project. `folder` is the working directory: the command line in a container reads its files."""

    command: list[str]
    project: str
    folder: Path
    ports: dict[str, int]

    def __call__(self, *arguments: str, timeout: float = 300) -> str:
        ports = {f"SLMOPS_{name.upper().replace('-', '_')}_PORT": str(port) for name, port in self.ports.items()}
        done = subprocess.run(
            [
                *self.command,
                "--project-directory",
                ROOT,
                "-f",
                ROOT / "docker-compose.yml",
                "-p",
                self.project,
                *arguments,
            ],
            cwd=self.folder,
            env={**os.environ, **ports, "PWD": str(self.folder), "SLMOPS_TAG": "test"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"compose {' '.join(arguments)}:\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        return done.stdout

    def slmops(self, *arguments: str) -> str:
        return self("run", "--rm", "-T", "cli", *arguments)

    def python(self, service: str, code: str) -> str:
        return self("exec", "-T", service, "python", "-c", code).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        container = self("ps", "--all", "--quiet", service)
        [found] = json.loads(subprocess.check_output(["docker", "inspect", container.strip()], text=True))
        return dict(found)

    def ask(self, gateway: str) -> str:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
        url = f"http://127.0.0.1:{self.ports[gateway]}/v1/chat/completions"
        answer = httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=60).post(url, json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])

    def remaining(self) -> list[str]:
        """Returns the containers, volumes and networks of this project that still exist."""
        label = f"label=com.docker.compose.project={self.project}"
        listings = (["ps", "--all"], ["volume", "ls"], ["network", "ls"])
        return [
            name
            for listing in listings
            for name in subprocess.check_output(["docker", *listing, "--quiet", "--filter", label], text=True).split()
        ]


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Yields a running project. Afterwards removes containers, networks and volumes; images stay as a build cache."""
    command = compose_command()
    folder = tmp_path_factory.mktemp("compose")
    ports = choose_ports(folder / "ports.json", GATEWAYS)
    compose = Compose(command, f"slmops-test-{uuid.uuid4().hex[:8]}", folder, ports)
    try:
        compose("build", timeout=1800)
        compose("up", "--detach")
        yield compose
    finally:
        print(compose("logs", "--tail=40"))  # pytest shows it with a failure
        compose("down", "--volumes", "--remove-orphans")
        assert compose.remaining() == []


def running_versions(compose: Compose) -> dict[str, str]:
    views = json.loads(compose.slmops("gateway", "ls", "--json"))["gateways"]
    return {view["gateway_id"]: view["running_version"] for view in views}


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_model_is_pushed_rolled_out_and_served_in_containers_and_survives_down_and_up(compose: Compose) -> None:
    make_tiny_llama(compose.folder / "tiny")  # the weights are readable only by their owner, as such files often are
    write_golden(compose.folder / "golden.jsonl")
    (compose.folder / "edge-chat.yaml").write_text(json.dumps(BLUEPRINT))

    push = ("model", "push", "tiny", "--name", "tiny", "--version", "1.0.0", "--golden", "golden.jsonl", "--wait")
    compose.slmops(*push)
    compose.slmops("blueprint", "apply", "edge-chat.yaml")
    compose.slmops("rollout", "start", "edge-chat", "--version", "1.0.0")
    compose.slmops("rollout", "watch", "edge-chat")
    assert running_versions(compose) == dict.fromkeys(GATEWAYS, "1.0.0")
    assert all(compose.ask(gateway) for gateway in GATEWAYS)
    assert compose.slmops("chat", "gw-2", "hello")

    compose("down")  # the volumes stay: no state may be stored in a container itself
    compose("up", "--detach")
    assert all(compose.ask(gateway) for gateway in GATEWAYS)
    assert running_versions(compose) == dict.fromkeys(GATEWAYS, "1.0.0")
    assert compose.slmops(*push[:-1])  # repeating a push changes nothing; a lost version would be refused
    assert len(json.loads(compose.slmops("model", "ls", "--json"))["versions"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_metrics_are_readable_inside_the_network_and_every_container_has_resource_limits(compose: Compose) -> None:
    read = "import urllib.request as u; print(u.urlopen('http://{}:8000/metrics', timeout=10).read().decode())"
    for reader, names in (("registry", SERVICES), ("gw-1", GATEWAYS)):
        for name in names:
            assert "python_info" in compose.python(reader, read.format(name)), name
    found: set[str] = set()
    while found != set(SERVICES):  # the command line reaches the bus alone; a service under load may answer late
        found |= {process["service"] for process in json.loads(compose.slmops("status", "--json"))["services"]}
    for name in (*SERVERS, *SERVICES, *GATEWAYS):
        limits = compose.inspect(name)["HostConfig"]
        assert all(limits[limit] for limit in ("Memory", "NanoCpus", "PidsLimit")), (name, limits)


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_every_container_exits_on_sigterm_within_its_grace_period(compose: Compose) -> None:
    compose("stop")
    codes = {name: compose.inspect(name)["State"]["ExitCode"] for name in (*SERVERS, *SERVICES, *GATEWAYS)}
    assert 137 not in codes.values(), f"killed: {codes}"
    compose("up", "--detach")


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_a_container_has_only_the_keys_libraries_and_ports_that_it_needs(compose: Compose) -> None:
    for name in (*SERVERS, *SERVICES, *GATEWAYS):
        seen = compose.python(name, "import os; print(os.getuid(), *os.listdir('/data/keys'))").split()
        assert (name, seen[0], set(seen[1:])) == (name, "10001", KEYS[name] | {"trusted-authorities.pem"})
    search = "import importlib.util as u; print(*[m for m in {} if u.find_spec(m)])"
    assert (
        compose.python("gw-1", search.format(["torch", "sqlalchemy", "minio", "onnxruntime_genai"]))
        == "onnxruntime_genai"
    )
    for inner in ("registry:8000", "s3:8888", "s3:9333", "s3:8080", "nats:8222"):
        host, port = inner.split(":")
        assert (inner, compose.python("gw-1", TRY_PORT.format(host=host, port=port))) == (inner, "closed")
    assert compose.python("gw-1", TRY_GRPC) == "closed"
    assert compose.python("gw-1", TRY_PORT.format(host="s3", port=8333)) == "open"  # TRY_PORT works

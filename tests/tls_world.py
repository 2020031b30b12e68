"""Authorities, certificates that are wrong in one way each, and servers that show them."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from servers import running

from slmops.kit.tls import client_context
from slmops.local.certificates import VALID_FOR, Certificates, Issued, _issue
from slmops.local.layout import Layout
from slmops.local.ports import HOST, choose_ports
from slmops.local.servers import NATS_PORTS, nats_spec

WRONG = {
    "another authority": "UnknownAuthority",
    "another host": "WrongHostName",
    "expired": "CertificateExpired",
    "plain": "NotEncrypted",
}
"""What is wrong with a server, and the error that must name it."""


def new_authority(folder: Path) -> Certificates:
    folder.mkdir(parents=True, exist_ok=True)
    certificates = Certificates(folder)
    certificates.renew(datetime.now(UTC))
    return certificates


def certificate_of(what: str, ours: Certificates, folder: Path) -> Path:
    """The file of a server's certificate: `right`, or wrong as in `WRONG`."""
    if what == "right":
        return ours.server("nats")
    if what == "another authority":
        return new_authority(folder / "theirs").server("nats")
    authority, now = Issued.read(ours.authority), datetime.now(UTC)
    assert authority
    hosts = ["elsewhere.example", "192.0.2.1"] if what == "another host" else ["localhost", HOST]
    issued_at = now - 2 * VALID_FOR if what == "expired" else now
    path = folder / f"{what.replace(' ', '-')}.pem"
    path.write_text(_issue("test", hosts, authority, issued_at, VALID_FOR).pem())
    return path


class _Shown(Certificates):
    """Certificates of which every server shows one file."""

    def __init__(self, ours: Certificates, shown: Path) -> None:
        super().__init__(ours.folder)
        object.__setattr__(self, "shown", shown)

    def server(self, name: str) -> Path:
        return self.shown  # type: ignore[attr-defined,no-any-return]


async def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def nats(layout: Layout, ours: Certificates, what: str) -> Iterator[tuple[dict[str, int], int]]:
    """A real nats-server whose certificate is `right` or wrong; yields its ports and its pid. It accepts our users."""
    name = what.replace(" ", "-")
    ports = choose_ports(layout.root / f"{name}.json", NATS_PORTS)
    root = Layout(layout.root / f"nats-{name}")
    root.root.mkdir()
    for folder in (root.logs, root.keys):
        folder.mkdir()
    (root.keys / "nats-authority.json").write_text((layout.keys / "nats-authority.json").read_text())
    shown = None if what == "plain" else _Shown(ours, certificate_of(what, ours, root.root))
    spec = nats_spec(root, ports["nats"], certificates=shown, websocket_port=ports["nats.websocket"] if shown else None)
    object.__setattr__(spec, "ready", lambda: is_listening(ports["nats"]))
    with running(spec) as pid:
        yield ports, pid


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        body = self.server.body  # type: ignore[attr-defined]
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", self.server.elsewhere)  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_arguments: object) -> None:
        return


class Https(http.server.ThreadingHTTPServer):
    """Serves `body` at every path, over TLS if there is a context."""

    def __init__(self, body: bytes, tls: ssl.SSLContext | None) -> None:
        super().__init__((HOST, 0), _Handler)
        self.body, self.asked, self.elsewhere = body, list[str](), ""
        self.tls = tls
        self.scheme = "https" if tls else "http"

    @property
    def address(self) -> str:
        return f"{HOST}:{self.server_address[1]}"

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        try:
            if self.tls:
                request = self.tls.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)  # type: ignore[arg-type]
        except OSError:
            return  # the client refused us


@contextmanager
def https(body: bytes, tls: ssl.SSLContext | None) -> Iterator[Https]:
    server = Https(body, tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def issued_to(ours: Certificates, days: int = 90) -> None:
    """Replaces the certificate of NATS with a new one of the present authority."""
    ours.server("nats").unlink()
    ours.renew(datetime.now(UTC))


def serial(port: int, ours: Certificates) -> str:
    """The serial number of the certificate that a TLS server shows to a new client."""
    context = client_context(ours.trusted)
    with socket.create_connection((HOST, port), 5) as raw, context.wrap_socket(raw, server_hostname=HOST) as tls:
        return str((tls.getpeercert() or {})["serialNumber"])


def later(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)

"""Probes ports of this machine without credentials: hand-written HTTP, TLS and gRPC requests.

Hand-written, because a library would refuse to send some of them, and because its retries would change the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from slmops.local.ports import HOST

Address = int | Path
"""A port on loopback, or a socket of the file system."""
_WITHIN_S = 5
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _HEADERS, _DATA = 4, 1, 0
_END_STREAM, _END_HEADERS = 1, 4

REQUESTS = [
    *(
        ("GET", path)
        for path in (
            "/",
            "/?list-type=2",
            "/buckets/slmops/?limit=100",
            "/slmops?list-type=2",
            "/slmops/blobs/x",
            "/dir/status",
            "/dir/assign",
            "/dir/lookup?volumeId=1",
            "/vol/status",
            "/col/delete?collection=slmops",
            "/cluster/status",
            "/cluster/healthz",
            "/metrics",
            "/debug/pprof/",
            "/debug/vars",
            "/status",
            "/stats/disk",
            "/health",
            "/healthz",
            "/readyz",
            "/varz",
            "/connz",
            "/jsz",
            "/ui/index.html",
            "/login",
            "/static/js/admin.js",
            "/openapi.json",
            "/docs",
            "/asyncapi",
            "/v1/models",
            "/tuf/metadata/1.root.json",
            "/tuf/metadata/timestamp.json",
        )
    ),
    ("OPTIONS", "/"),
    ("POST", "/"),
    ("POST", "/?Action=CreateUser&UserName=stranger"),
    ("POST", "/?Action=AssumeRole&RoleSessionName=stranger"),
    ("POST", "/submit"),
    ("POST", "/dir/assign"),
    ("POST", "/buckets/slmops/stranger"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("PUT", "/slmops"),
    ("PUT", "/slmops/stranger"),
    ("PUT", "/buckets/slmops/stranger"),
    ("DELETE", "/slmops"),
    ("DELETE", "/slmops/blobs/x"),
    ("DELETE", "/buckets/slmops/stranger"),
]
"""Requests to try on each of our servers: lists, reads, writes, deletes, state, metrics, profiles, pages."""


@dataclass(frozen=True)
class Listener:
    """A socket on which a process of ours accepts."""

    process: str
    ip: str
    port: int


def listeners(pids: Iterable[int]) -> set[Listener]:
    """Returns every TCP socket, IPv4 or IPv6, on which these processes and their children listen."""
    roots = [psutil.Process(pid) for pid in pids]
    return {
        Listener(process.name(), connection.laddr.ip, connection.laddr.port)
        for root in roots
        for process in (root, *root.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def socket_files(pids: Iterable[int]) -> set[Path]:
    """Returns every Unix socket on which these processes listen; relative paths as they were opened."""
    found = (connection for pid in pids for connection in psutil.Process(pid).net_connections("unix"))
    return {Path(connection.laddr) for connection in found if connection.laddr}


@dataclass(frozen=True)
class Answer:
    """Status and body of an HTTP response, or why there was none."""

    status: int | None
    body: bytes = b""
    refusal: str = ""


def http(port: int, method: str, path: str, *, body: bytes = b"", tls: ssl.SSLContext | None = None) -> Answer:
    """One request on a connection of its own; over TLS when a context is given."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        with _connected(port, tls) as connection:
            connection.sendall(head.encode() + body)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError as error:  # TLS alerts are OSErrors, too
        return Answer(None, refusal=str(error))
    head_received, _, content = received.partition(b"\r\n\r\n")
    words = head_received.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/"):
        return Answer(None, received, "no HTTP")
    return Answer(int(words[1]), content)


def statuses(port: int, tls: ssl.SSLContext | None = None) -> dict[tuple[str, str], int | None]:
    """Returns the status of the answer to each of `REQUESTS`."""
    return {(method, path): http(port, method, path, body=b"", tls=tls).status for method, path in REQUESTS}


def grpc(port: int, method: str, message: bytes, *, tls: ssl.SSLContext | None = None) -> bytes:
    """Sends one gRPC message. Returns the bytes of all messages in the answer; empty if the connection is refused."""
    headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": f"{HOST}:{port}", "te": "trailers"}
    headers["content-type"] = "application/grpc"
    block = b"".join(_literal(name, value) for name, value in headers.items())
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    sent = (
        _PREFACE + _frame(_SETTINGS) + _frame(_HEADERS, block, _END_HEADERS, 1) + _frame(_DATA, framed, _END_STREAM, 1)
    )
    with contextlib.suppress(OSError), _connected(port, tls) as connection:
        connection.sendall(sent)
        return b"".join(_data(connection))
    return b""


def speaks_grpc(port: Address, *, tls: ssl.SSLContext | None = None) -> bool:
    """Returns whether the port answers the HTTP/2 preface with a SETTINGS frame, as every HTTP/2 server does."""
    with contextlib.suppress(OSError), _connected(port, tls) as connection:
        connection.sendall(_PREFACE + _frame(_SETTINGS))
        return connection.recv(9)[3:4] == bytes([_SETTINGS])
    return False


def directory_entries(directory: str) -> bytes:
    """`filer_pb.ListEntriesRequest` with its first field, `directory`."""
    return b"\x0a" + bytes([len(directory)]) + directory.encode()


def without_certificate() -> ssl.SSLContext:
    """Returns the TLS context of a client that accepts any server and presents no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def encrypted() -> ssl.SSLContext:
    """A client that believes any server, shows no certificate and speaks HTTP/1.1."""
    context = without_certificate()
    context.set_alpn_protocols(["http/1.1"])
    return context


def with_certificate(path: Path) -> ssl.SSLContext:
    context = without_certificate()
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(path)
    return context


async def nats_refusal(port: int, *commands: bytes) -> bytes:
    """Returns what nats-server answers over TLS, after its greeting, to a client that sends no credentials."""
    reader, writer = await asyncio.open_connection(HOST, port, ssl=encrypted())
    greeting = await reader.readline()
    assert greeting.startswith(b"INFO")
    writer.write(b"".join(command + b"\r\n" for command in commands))
    answer = await asyncio.wait_for(reader.read(), _WITHIN_S)
    writer.close()
    return answer


@dataclass
class Leak:
    """The ports by which an unauthenticated client could list or read one object."""

    listed: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)


def try_to_read(ports: Iterable[int], bucket: str, key: str, content: bytes, file_ids: Iterable[str]) -> Leak:
    """List and read one object by every port, in plain text and over TLS without a certificate."""
    leak = Leak()
    folder, _, name = key.rpartition("/")
    lists = [f"/buckets/{bucket}/{folder}/?limit=100", f"/{bucket}?list-type=2", f"/{bucket}"]
    reads = [f"/buckets/{bucket}/{key}", f"/{bucket}/{key}", *(f"/{file_id}" for file_id in file_ids)]
    entries = directory_entries(f"/buckets/{bucket}/{folder}")
    for port in ports:
        for tls in (None, without_certificate(), encrypted()):
            listings = [http(port, "GET", path, tls=tls).body for path in lists]
            listings.append(grpc(port, "/filer_pb.SeaweedFiler/ListEntries", entries, tls=tls))
            if any(name.encode() in listing for listing in listings):
                leak.listed.add(port)
            if any(content in http(port, "GET", path, tls=tls).body for path in reads):
                leak.read.add(port)
    return leak


def try_to_change(ports: Iterable[int], bucket: str, key: str, method: str, file_ids: Iterable[str]) -> None:
    """Overwrite (`PUT`, `POST`) or `DELETE` one object by every port, in plain text and over TLS."""
    for port in ports:
        for tls in (None, without_certificate(), encrypted()):
            for path in (f"/buckets/{bucket}/{key}", f"/{bucket}/{key}", *(f"/{file_id}" for file_id in file_ids)):
                http(port, method, path, body=b"damaged" if method != "DELETE" else b"", tls=tls)


@contextlib.contextmanager
def _connected(port: Address, tls: ssl.SSLContext | None) -> Iterator[socket.socket]:
    with _connection(port) as connection:
        if tls is None:
            yield connection
            return
        with tls.wrap_socket(connection) as secured:
            yield secured


def _connection(address: Address) -> socket.socket:
    if isinstance(address, int):
        return socket.create_connection((HOST, address), _WITHIN_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_WITHIN_S)
    connection.connect(str(address))
    return connection


def _frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: str, value: str) -> bytes:
    """A header of HPACK without indexing and without Huffman coding; both parts are short."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _data(connection: socket.socket) -> Iterator[bytes]:
    """The payloads of DATA frames until the stream ends or nothing comes any more."""
    with connection.makefile("rb") as reader:
        while len(head := reader.read(9)) == 9:
            payload = reader.read(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind == _DATA:
                yield payload
            if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                return

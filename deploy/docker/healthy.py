"""Checks the health of this container's process: `healthy.py URL` exits 0 if it is healthy. Standard library only.

`http://…` must answer with 200. `nats://HOST:PORT` must send the greeting of nats-server, which it sends after its
streams are recovered; this needs no credential and no monitoring port.
"""

import socket
import sys
import urllib.request
from urllib.parse import urlsplit

TIMEOUT_S = 4


def http_answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 the URL is in docker-compose.yml
        return bool(answer.status == 200)


def nats_greets(url: str) -> bool:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), TIMEOUT_S) as connection:
        return connection.recv(4) == b"INFO"


def main(url: str) -> None:
    check = nats_greets if url.startswith("nats://") else http_answers
    try:
        sys.exit(None if check(url) else f"{url} did not give the expected answer")
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])

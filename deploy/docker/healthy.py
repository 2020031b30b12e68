"""Health of the process in this container: `healthy.py URL` exits 0 if it is healthy. Standard library only.

`http://…` must answer 200. `nats://HOST:PORT` must greet as nats-server does once its streams are recovered; that
needs no credential and no monitoring port.
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
    look = nats_greets if url.startswith("nats://") else http_answers
    try:
        sys.exit(None if look(url) else f"{url} does not answer as it should")
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])

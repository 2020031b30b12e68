"""The API's socket and server."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from slmops.contracts.errors import PortTaken
from slmops.kit.tls import server_context


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Returns a bound socket. Port 0 selects a free port. The default `host` accepts local connections only.

    Raises `PortTaken`.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(
            f"port {port} is taken",
            where=f"{host}:{port}",
            fix="Stop the process that listens there, or configure another port.",
        ) from None
    return bound


class ApiServer(uvicorn.Server):
    """uvicorn without its own signal handling and access log. Run `serve([socket])`; set `should_exit` to stop it.

    `certificate` None: no TLS. `key` None: it is in the certificate's file. Raises `InvalidMessage` for unusable files.
    """

    def __init__(self, app: ASGIApp, certificate: Path | None = None, key: Path | None = None) -> None:
        context = server_context(certificate, key) if certificate else None
        factory = (lambda _config, _default: context) if context else None
        super().__init__(
            uvicorn.Config(app, lifespan="off", access_log=False, log_config=None, ssl_context_factory=factory)
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures no signals, because the agent handles them."""
        yield

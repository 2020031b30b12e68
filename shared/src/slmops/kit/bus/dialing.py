"""How a client connects to NATS: encrypted or not, through a proxy or not, and what a failed handshake is called."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from typing import Any

from nats.aio.client import Client as Connection
from nats.aio.client import Srv
from nats.aio.transport import WebSocketTransport

from slmops.contracts.errors import InvalidMessage, ServerUntrusted
from slmops.kit.extras import not_installed
from slmops.kit.settings import BusSettings
from slmops.kit.tls import CA_SETTING, client_context, peer_expiry, untrusted

log = logging.getLogger("slmops.client")
# nats-py upgrades its streams in a way that makes asyncio log this each time the server closes a TLS connection. There
# is nothing to be done about it, and the command line would print it.
_EOF_REMARK = "returning true from eof_received"
logging.getLogger("asyncio").addFilter(lambda record: not str(record.msg).startswith(_EOF_REMARK))
_ENCRYPTED, _WEBSOCKETS = {"tls", "wss"}, {"ws", "wss"}


def schemes(settings: BusSettings) -> set[str]:
    """Returns the schemes of the URLs; one without a scheme is `nats`."""
    urls = settings.nats_url.split(",")
    return {url.strip().partition("://")[0].lower() if "://" in url else "nats" for url in urls}


def encryption(settings: BusSettings) -> dict[str, Any]:
    """Returns nats-py's options for TLS; an empty dict for plain URLs.

    The client begins with TLS. Otherwise nats-py reads a plain greeting first, and stays unencrypted if that greeting,
    which anybody on the way can write, does not ask for TLS.
    Raises `InvalidMessage` for a mixture, for a plain URL although an authority is set, and for an unusable file.
    """
    used = schemes(settings)
    if used & _WEBSOCKETS:
        _require_aiohttp()
    if used <= _ENCRYPTED:
        return {"tls": client_context(settings.tls_ca), "tls_handshake_first": True}
    if settings.tls_ca is not None or used & _ENCRYPTED:
        reason = f"{CA_SETTING} is set" if settings.tls_ca else "others of its URLs are"
        raise InvalidMessage(
            f"a connection to NATS would not be encrypted, although {reason}",
            where=settings.nats_url,
            fix="Use only tls:// or wss:// in SLMOPS_NATS_URL.",
        )
    return {}


def _require_aiohttp() -> None:
    try:
        import aiohttp  # noqa: F401 (nats-py's websockets need it)
    except ModuleNotFoundError as error:
        raise not_installed(error) from error


class Handshakes:
    """Notes failed TLS handshakes of one connection. Logs each kind once, until a handshake succeeds."""

    def __init__(self, settings: BusSettings) -> None:
        self._url = settings.nats_url
        self.failed: ServerUntrusted | None = None

    async def note(self, error: Exception) -> None:
        """Is nats-py's `error_cb`. Other errors surface where a call fails."""
        found = untrusted(error, self._url)
        if found is not None:
            if self.failed is None or self.failed.code != found.code:
                log.error("%s", found)
            self.failed = found

    def succeeded(self) -> None:
        self.failed = None


def peer_certificate_expires(connection: Connection) -> datetime | None:
    """Returns when the certificate ends that the server showed when this connection was made; None without TLS."""
    transport = connection._transport
    if isinstance(transport, WebSocketTransport):
        return peer_expiry(transport._ws.get_extra_info("peercert")) if transport._ws else None
    writer = getattr(transport, "_io_writer", None)
    return peer_expiry(writer.get_extra_info("peercert")) if writer else None


class DialedConnection(Connection):
    """A connection whose websockets use an HTTP proxy (CONNECT) and give up in time. `proxy` None: connect directly."""

    def __init__(self, proxy: str | None) -> None:
        super().__init__()
        self._proxy = proxy

    async def _connect_to_server(self, s: Srv) -> None:
        if s.uri.scheme not in _WEBSOCKETS:
            await super()._connect_to_server(s)
            return
        if not self._transport:
            self._transport = await _websocket(self._proxy)
        await asyncio.wait_for(super()._connect_to_server(s), self.options["connect_timeout"])


async def _websocket(proxy: str | None) -> WebSocketTransport:
    import aiohttp

    transport = WebSocketTransport()
    if proxy:
        await transport._client.close()
        transport._client = aiohttp.ClientSession(proxy=proxy)
    return transport

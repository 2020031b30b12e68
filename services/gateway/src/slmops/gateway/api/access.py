"""Who may use the API: checks a request's Host, its Origin and, if keys are configured, its key.

The API listens on the device, and a browser on the device shows pages of strangers. Such a page must not reach the
model: neither by a request to another origin, which names the page in `Origin`, nor under a name that its owner
resolves to this device (DNS rebinding), which the browser sends in `Host`.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.contracts.errors import InvalidMessage
from slmops.gateway.api.refusals import error_response
from slmops.gateway.api.request_ids import REQUEST_ID
from slmops.gateway.settings import Settings

_ANY = "*"


@dataclass(frozen=True, slots=True)
class Access:
    """The rules. The default: local names and IP addresses, no page of a browser, no key."""

    hosts: frozenset[str] = frozenset()
    """Names beside `localhost` and IP addresses; `*` for any."""
    origins: frozenset[str] = frozenset()
    """Origins of pages that may use the API, for example `https://app.example`; `*` for any."""
    keys: tuple[bytes, ...] = ()
    """A request below `/v1/` must show one of them; none: no key is required."""

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """Raises `InvalidMessage` if the file of keys cannot be read or is empty."""
        device = socket.gethostname()
        return cls(
            hosts=frozenset(
                name.lower() for name in (*settings.api_hosts, settings.gateway_id, device, f"{device}.local")
            ),
            origins=frozenset(origin.lower().rstrip("/") for origin in settings.api_origins),
            keys=_keys(settings.api_keys) if settings.api_keys else (),
        )

    def allows_host(self, host: str) -> bool:
        """`host`: a Host header. An IP address is always allowed: no page can have its owner's name there."""
        name = host.lower().partition("]")[0][1:] if host.startswith("[") else host.lower().partition(":")[0]
        name = name.rstrip(".")
        return _ANY in self.hosts or name in self.hosts or _is_local(name) or _is_ip_address(name)

    def allows_origin(self, origin: str) -> bool:
        return _ANY in self.origins or origin.lower() in self.origins

    def allows_key(self, authorization: bytes) -> bool:
        """`authorization`: an Authorization header."""
        scheme, _, shown = authorization.partition(b" ")
        # Compares with every key in constant time, so that the duration says nothing about a key.
        matches = [hmac.compare_digest(shown.strip(), key) for key in self.keys]
        return not self.keys or (scheme.lower() == b"bearer" and any(matches))


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """Returns `app` behind the checks. A page of an allowed origin gets CORS headers, on refusals of its key, too."""
    with_key = _KeyCheck(app, access)
    with_cors = CORSMiddleware(
        with_key,
        allow_origins=sorted(access.origins),
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        allow_private_network=bool(access.origins),
        expose_headers=(REQUEST_ID,),
    )
    return _SourceCheck(with_cors, access)


class _SourceCheck:
    """Refuses requests under a foreign name and requests of pages of other origins."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        hosts, app = headers.getlist("host"), self._app
        if len(hosts) != 1 or not self._access.allows_host(hosts[0]):
            app = error_response(403, "the API is not served under this host name (SLMOPS_API_HOSTS)", "host_refused")
        elif not all(self._access.allows_origin(origin) for origin in headers.getlist("origin")):
            app = error_response(403, "pages of this origin may not use the API (SLMOPS_API_ORIGINS)", "origin_refused")
        await app(scope, receive, send)


class _KeyCheck:
    """Refuses requests below `/v1/` without a valid key. Health and metrics need none."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not scope["path"].startswith("/v1/") or self._access.allows_key(shown):
            await self._app(scope, receive, send)
            return
        message = "send a key of this gateway as 'Authorization: Bearer KEY'"
        refused = error_response(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await refused(scope, receive, send)


def _is_local(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")  # RFC 6761: never resolved to another device


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _keys(path: Path) -> tuple[bytes, ...]:
    try:
        keys = tuple(line.strip() for line in path.read_bytes().splitlines() if line.strip())
    except OSError as error:
        raise InvalidMessage(
            f"cannot read the API keys: {error.strerror}", where=str(path), fix="Correct SLMOPS_API_KEYS."
        ) from None
    if not keys:
        raise InvalidMessage("the file of API keys is empty", where=str(path), fix="Write one key per line.")
    return keys

"""TLS contexts that follow their files, and errors that say which file to set.

Invariants:

- A context reads its files again when they change, at the next handshake. So a renewed certificate and a new authority
  take effect without a restart, and connections that exist stay open. A damaged new file is logged; the last good one
  stays in use.
- With an authority's file, a client trusts exactly the certificates in it, otherwise those of the operating system.
  A client always checks the name of the host.
- The server speaks TLS first, or there is no connection. A plain greeting never leads to a plain connection.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

from prometheus_client import Gauge

from slmops.contracts.errors import (
    CertificateExpired,
    InvalidMessage,
    NotEncrypted,
    ServerUntrusted,
    UnknownAuthority,
    WrongHostName,
)

log = logging.getLogger("slmops.tls")
_EXPIRED, _NOT_YET_VALID = 10, 9
_WRONG_NAME = {62, 64}
"""OpenSSL's codes for a certificate of another host name or address."""
_PLAIN = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
"""OpenSSL's reasons when the other side answers a handshake with plain text."""
CA_SETTING: Final = "SLMOPS_TLS_CA"
EXPIRES_SOON: Final = timedelta(days=21)
"""Our own certificates are renewed 30 days before they end, so a shorter rest means that renewing fails."""
_EXPIRES = Gauge("slmops_tls_certificate_expires_seconds", "Unix time at which a certificate ends", ["server"])
Version = tuple[tuple[int, int, int], ...]


class _Following(ssl.SSLContext):
    """A context that delegates each handshake to a context of the current files. Reading them costs one `stat` each
    per handshake."""

    _build: Callable[[], ssl.SSLContext]
    _files: tuple[Path, ...]
    _version: Version
    _unusable: Version | None
    _current: ssl.SSLContext
    _alpn: list[str] | None

    def __new__(cls, protocol: int, build: Callable[[], ssl.SSLContext], files: Sequence[Path]) -> Self:
        self = super().__new__(cls, protocol)
        self._build, self._files, self._alpn, self._unusable = build, tuple(files), None, None
        self._version = _version(self._files)
        self._current = build()
        return self

    def set_alpn_protocols(self, alpn_protocols: Any) -> None:
        super().set_alpn_protocols(alpn_protocols)
        self._alpn = list(alpn_protocols)
        self._current.set_alpn_protocols(self._alpn)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._followed().wrap_bio(*args, **kwargs)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return self._followed().wrap_socket(*args, **kwargs)

    def _followed(self) -> ssl.SSLContext:
        version = _version(self._files)
        if version not in (self._version, self._unusable):
            try:
                self._current, self._version = self._build(), version
                if self._alpn is not None:
                    self._current.set_alpn_protocols(self._alpn)
                log.info("read %s again", ", ".join(map(str, self._files)))
            except (InvalidMessage, OSError) as error:
                self._unusable = (
                    version  # logged once; a file that was half written has another version when it is whole
                )
                log.error("the changed certificates cannot be used, so the last ones stay in use: %s", error)
        return self._current


def _version(files: Sequence[Path]) -> Version:
    return tuple(map(_file_version, files))


def _file_version(file: Path) -> tuple[int, int, int]:
    try:
        stat = file.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def client_context(authorities: Path | None) -> ssl.SSLContext:
    """Returns the context of a client that trusts the certificates in a PEM file; None: the operating system's.

    Raises `InvalidMessage`.
    """
    if authorities is None:
        return ssl.create_default_context()

    def build() -> ssl.SSLContext:
        with _readable(authorities, CA_SETTING):
            return ssl.create_default_context(cafile=str(authorities))

    return _Following(ssl.PROTOCOL_TLS_CLIENT, build, [authorities])


def https_trust(authorities: Path | None) -> ssl.SSLContext | bool:
    """Returns httpx's `verify`: a context for the authorities' file; True (public authorities) without one.

    Raises `InvalidMessage`.
    """
    return client_context(authorities) if authorities else True


def server_context(certificate: Path, key: Path | None = None) -> ssl.SSLContext:
    """Returns the context of a server with a certificate (and its chain) and a key; None: it is in the same file.

    Raises `InvalidMessage`.
    """

    def build() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with _readable(certificate, "SLMOPS_HTTP_TLS_CERT and SLMOPS_HTTP_TLS_KEY"):
            context.load_cert_chain(certificate, key)
        return context

    return _Following(ssl.PROTOCOL_TLS_SERVER, build, [file for file in (certificate, key) if file])


class _readable:
    """Translates the error of a file that is missing or holds no certificate or key."""

    def __init__(self, file: Path, setting: str) -> None:
        self._file, self._setting = file, setting

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):  # ssl.SSLError is one too
            why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise InvalidMessage(
                f"the certificate file cannot be used: {why}", where=str(self._file), fix=f"Set {self._setting}."
            ) from error


def untrusted(error: BaseException, where: str) -> ServerUntrusted | None:
    """Returns the error of the tree if `error`, or a cause of it, is a failed TLS handshake with the server at `where`;
    None otherwise."""
    failures = [one for one in _causes(error) if isinstance(one, ssl.SSLError)]
    # aiohttp's errors are ssl errors too, but only the original says what is wrong with the certificate.
    found = next((one for one in failures if hasattr(one, "verify_code")), None)
    if not isinstance(found, ssl.SSLCertVerificationError):
        return _no_handshake(failures[-1], where) if failures else None
    if found.verify_code in _WRONG_NAME:
        fix = "Use a name that is in its certificate, or issue a certificate with this name (slmops up --host NAME)."
        what = f"the server's certificate is for another host: {found.verify_message}"
        return WrongHostName(what, where=where, fix=fix)
    if found.verify_code in (_EXPIRED, _NOT_YET_VALID):
        fix = "Renew the server's certificate, and check the clocks of both machines."
        return CertificateExpired(
            f"the server's certificate is not valid now: {found.verify_message}", where=where, fix=fix
        )
    fix = f"If this is your server, set {CA_SETTING} to the file of its authority. If not, it may be an impostor."
    what = f"no authority that is trusted here signed the server's certificate: {found.verify_message}"
    return UnknownAuthority(what, where=where, fix=fix)


def _no_handshake(error: ssl.SSLError, where: str) -> ServerUntrusted | None:
    """Returns None for a connection that broke later than in its handshake."""
    reason = error.reason or ""
    if reason in _PLAIN:
        fix = "Enable TLS at the server. NATS also needs `handshake_first: true` in its `tls` block."
        what = "the server did not begin with TLS, and plain connections are refused"
        return NotEncrypted(what, where=where, fix=fix)
    if "ALERT" in reason or "PROTOCOL" in reason:
        fix = "Look at the server's log, and compare TLS versions."
        return ServerUntrusted(f"no TLS connection: {reason}", where=where, fix=fix)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and what it wraps. Clients keep the original as cause, context, argument, or `reason`."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]


def peer_expiry(certificate: dict[str, Any] | None) -> datetime | None:
    """Returns when a peer's certificate, as `getpeercert` describes it, ends; None without one."""
    if not certificate or "notAfter" not in certificate:
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)


def file_expiry(path: Path) -> datetime | None:
    """Returns when the first certificate in a PEM file ends; None if there is none."""
    from cryptography import x509  # slow to import, and most processes do not need it

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def publish_expiry(certificate: Path, server: str) -> None:
    """Publishes the metric of a server's certificate file, which is read at each scrape."""

    def seconds() -> float:
        found = file_expiry(certificate)
        return found.timestamp() if found else 0.0

    _EXPIRES.labels(server).set_function(seconds)

"""The library's client over plain HTTP. It stores each file once it is verified, as the specification requires."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlparse

from tuf.api.exceptions import DownloadError, DownloadHTTPError, LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, Root
from tuf.ngclient import Updater, Urllib3Fetcher
from tuf.ngclient._internal.proxy import ProxyEnvironment

from slmops.contracts.errors import Denied, DiskFull, InvalidMessage, NotFound
from slmops.contracts.tuf_names import Attack, refused
from slmops.kit.tls import client_context, untrusted
from slmops.kit.trust.attacks import Recording
from slmops.kit.trust.client import limits, naming


class HttpClient:
    """A TUF client whose trusted state is in `folder`. `authorities`: the file of those that https servers are trusted
    by; None: the operating system's. Methods raise `InvalidMessage`, `NotFound`, `Denied`,
    `DiskFull`; those that fetch also `TrustRefused` with the attack's name, `Unreachable` and `NotReady`."""

    def __init__(self, folder: Path, authorities: Path | None = None) -> None:
        self._folder, self._authorities = folder, authorities

    def init(self, root: Path) -> None:
        """Trusts a root that its own keys signed. Known newer versions still protect against a rollback."""
        try:
            data = root.read_bytes()
            _check_root(Metadata[Root].from_bytes(data))
        except OSError as error:
            raise InvalidMessage(f"the root cannot be read: {error.strerror}", where=str(root)) from error
        except (RepositoryError, ValueError) as error:
            raise InvalidMessage("the file is not a root signed by its own keys", where=str(root)) from error
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            trusted = self._folder / "root.json"
            trusted.unlink(missing_ok=True)  # the library makes it a link into its history, which must not change
            trusted.write_bytes(data)

    def refresh(self, url: str) -> None:
        with _writing(self._folder):
            recording, updater = self._updater(url)
            with naming(recording, self._folder):
                updater.refresh()

    def download(self, url: str, target: str, base: str, into: Path) -> Path | None:
        """Returns the target's path, or None if the repository does not list it. Writes it only if it is verified."""
        _check_address(base)
        with _writing(self._folder):
            recording, updater = self._updater(url)
            with naming(recording, self._folder):
                found = updater.get_targetinfo(target)
        if found is None:
            return None
        file = into / quote(target, safe="")
        with _writing(into), naming(recording, self._folder), _naming_target(target):
            into.mkdir(parents=True, exist_ok=True)
            kept = updater.find_cached_target(found, str(file))
            return Path(kept or updater.download_target(found, str(file), base))

    def _updater(self, url: str) -> tuple[Recording, Updater]:
        _check_address(url)
        recording = Recording(_Fetcher(self._authorities))
        try:
            root = (self._folder / "root.json").read_bytes()
            return recording, Updater(str(self._folder), url, fetcher=recording, config=limits(), bootstrap=root)
        except FileNotFoundError as error:
            raise NotFound(
                "the folder has no trusted root yet",
                where=str(self._folder),
                fix="Run slmops trust client init first.",
            ) from error
        except RepositoryError as error:
            raise InvalidMessage("the trusted root is damaged", where=str(self._folder)) from error


class _Fetcher(Urllib3Fetcher):
    """Reports a broken connection as a network error and not as a damaged file."""

    def __init__(self, authorities: Path | None) -> None:
        super().__init__()
        if authorities:  # the library has no option for it
            self._proxy_env = ProxyEnvironment(ssl_context=client_context(authorities))

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from super()._fetch(url)
        except DownloadHTTPError:
            raise
        except Exception as error:
            if impostor := untrusted(error, url):
                raise impostor from error
            raise DownloadError(type(error.__cause__ or error).__name__) from error


def _check_root(metadata: Metadata[Root]) -> None:
    """Raises `ValueError` or the library's `RepositoryError`."""
    if not isinstance(metadata.signed, Root):
        raise ValueError("metadata of another role")
    metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)


def _check_address(url: str) -> None:
    try:
        good = urlparse(url).scheme in ("http", "https") and urlparse(url).hostname
    except ValueError:
        good = None
    if not good:
        raise InvalidMessage("the URL is not an HTTP address", where=url)


@contextmanager
def _naming_target(target: str) -> Iterator[None]:
    """Reports a target with wrong bytes as an arbitrary package attack."""
    try:
        yield
    except LengthOrHashMismatchError as error:
        raise refused(Attack.ARBITRARY_PACKAGE, "the file does not match its metadata", where=target) from error


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no disk space left", where=str(where), fix="Free disk space.") from error
        raise Denied(f"the folder cannot be read or written: {error.strerror}", where=str(where)) from error

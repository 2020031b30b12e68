"""Derives the name of the attack from an error of the TUF client: from its type, the file and the file's content.

The text of the error is not used, except for one count of signatures. If the count is missing, the more cautious name
is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface

from slmops.contracts.errors import NotReady, SlmopsError, Unreachable
from slmops.contracts.tuf_names import METADATA_LIMIT_BYTES, Attack, refused
from slmops.kit.clock import utc_now

_SIGNED_BY = re.compile(r"signed by (\d+)/\d+ keys")
_ROLE_OF = re.compile(r"^(?:(\d+)\.)?(.+)\.json$")
_TYPES = {"root": "root", "timestamp": "timestamp", "snapshot": "snapshot"}
_ONLINE = ("timestamp", "snapshot")
_SHA256 = {"sha256"}
_DATE_LENGTH = 32


@dataclass
class Fetched:
    """The file that was requested last."""

    name: str = ""
    data: bytes = b""

    @property
    def role(self) -> str:
        found = _ROLE_OF.match(self.name)
        return found[2] if found else self.name

    @property
    def asked_version(self) -> int | None:
        found = _ROLE_OF.match(self.name)
        return int(found[1]) if found and found[1] else None

    def signed(self) -> dict[str, Any]:
        """Returns the signed part; empty if there is none."""
        try:
            content = json.loads(self.data)["signed"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def is_of_another_role(self) -> bool:
        return bool(kind := self.signed().get("_type")) and kind != _TYPES.get(self.role, "targets")


class Recording(FetcherInterface):
    """Fetches through another fetcher and keeps the latest file, up to the size limit of metadata."""

    def __init__(self, fetcher: FetcherInterface) -> None:
        self._fetcher = fetcher
        self.last = Fetched()

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.last = Fetched(url.rpartition("/")[2])
        for chunk in self._fetcher.fetch(url):
            if len(self.last.data) <= METADATA_LIMIT_BYTES:
                self.last.data += chunk
            yield chunk


def named(error: Exception, last: Fetched, *, root_expired: bool) -> SlmopsError:
    """Returns the error to raise instead: `TrustRefused` with the attack's name, or a temporary network error."""
    where = last.name or None
    if isinstance(error, DownloadError) and not isinstance(error, DownloadLengthMismatchError):
        return _unreached(error, where)
    attack, what = _attack(error, last, root_expired)
    return refused(attack, what, where=where, fix=_FIXES.get(attack))


def _unreached(error: DownloadError, where: str | None) -> SlmopsError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SlmopsError):
            return cause
        cause = cause.__cause__
    if isinstance(error, DownloadHTTPError) and error.status_code == 404:
        return NotReady("the repository does not have this file yet", where=where)
    return Unreachable(f"the repository does not answer: {error}", where=where)


def _attack(error: Exception, last: Fetched, root_expired: bool) -> tuple[Attack, str]:
    match error:
        case DownloadLengthMismatchError():
            return Attack.ENDLESS_DATA, "the file is longer than allowed or announced"
        case UnsignedMetadataError():
            return _unsigned(error, last.role)
        case ExpiredMetadataError():
            return _outdated(last, root_expired)
        case BadVersionNumberError():
            return _other_version(last)
        case LengthOrHashMismatchError():
            return _other_bytes(error, last)
        case DeserializationError():
            return Attack.CORRUPT, f"the {last.role} metadata cannot be read"
        case RepositoryError():
            return _inconsistent(last)
    # Parsers may raise any exception on hostile bytes. None of them may count as trusted.
    return Attack.CORRUPT, f"the {last.role} metadata cannot be used ({type(error).__name__})"


def _unsigned(error: Exception, role: str) -> tuple[Attack, str]:
    counted = _SIGNED_BY.search(str(error))
    if counted and int(counted[1]) == 0:
        return Attack.WRONG_KEY, f"{role} has no valid signature by a trusted key"
    return Attack.TOO_FEW_KEYS, f"{role} is signed by fewer trusted keys than required"


def _outdated(last: Fetched, root_expired: bool) -> tuple[Attack, str]:
    if root_expired:
        return Attack.EXPIRED, f"the root of trust has expired{by_this_clock()}"
    expires = last.signed().get("expires")
    when = f" on {expires}" if isinstance(expires, str) and len(expires) <= _DATE_LENGTH else ""
    if last.role in _ONLINE:
        return Attack.FREEZE, f"the newest available {last.role} has expired{when}{by_this_clock()}"
    return Attack.EXPIRED, f"{last.role} has expired{when}{by_this_clock()}"


def by_this_clock() -> str:
    """Returns the time by which something has expired. If it is wrong, that is the cause."""
    return f" (this machine's clock says {utc_now():%Y-%m-%dT%H:%M:%SZ})"


def _other_version(last: Fetched) -> tuple[Attack, str]:
    version, asked = last.signed().get("version"), last.asked_version
    if last.role == "root" or last.role == "timestamp" or (last.role == "snapshot" and version == asked):
        return Attack.ROLLBACK, f"{last.role} is older than the version that is already trusted"
    return Attack.MIX_AND_MATCH, f"{last.role} has version {version} instead of {asked}"


def _other_bytes(error: Exception, last: Fetched) -> tuple[Attack, str]:
    if isinstance(error.__cause__, (ValueError, TypeError)):
        return Attack.OTHER_ALGORITHM, f"{last.role} has a digest that is not SHA-256"
    if not last.signed():
        return Attack.CORRUPT, f"the {last.role} metadata is cut off or damaged"
    return Attack.MIX_AND_MATCH, f"{last.role} is not the file that the other metadata names"


def _inconsistent(last: Fetched) -> tuple[Attack, str]:
    if last.role == "snapshot" and not last.is_of_another_role:
        return Attack.ROLLBACK, "the snapshot no longer names metadata that an earlier one named"
    return Attack.MIX_AND_MATCH, f"{last.role} does not belong to the metadata that names it"


def check_algorithms(named_by: Iterator[dict[str, str] | None]) -> None:
    """Rejects digests other than SHA-256. The library accepts any algorithm that trusted metadata names, also MD5."""
    for hashes in named_by:
        if hashes is not None and set(hashes) != _SHA256:
            what = f"metadata names a file by {', '.join(sorted(hashes))}, not only by SHA-256"
            raise refused(Attack.OTHER_ALGORITHM, what)


_FIXES = {
    Attack.FREEZE: "Check the clock. If it is right, start the packager, which renews it. Check that nobody on the way "
    "to it withholds its answers.",
    Attack.EXPIRED: "Check the clock. If it is right, renew it with its keyholders: slmops trust rotate ROLE "
    "--keep-keys.",
    Attack.ROLLBACK: "Restore the packager's newest state. If it is lost, rotate the timestamp and snapshot keys.",
}

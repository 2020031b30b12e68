"""The file with a person's credentials: who may read it, and when the credentials expire."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

from slmops.console.render.stream_view import Item
from slmops.contracts.errors import Denied
from slmops.kit.bus.client import read_file
from slmops.kit.bus.nats_auth import Credentials

EXPIRES_SOON = timedelta(days=14)


def write_private(path: Path, text: str) -> None:
    """Replaces a file atomically, with mode 0600. Raises `Denied`."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Denied(
            f"cannot write the credentials: {error.strerror}", where=str(path), fix="Name another file with --out."
        ) from error


def expiring(path: Path | None, now: datetime) -> list[Item]:
    """Returns an item if the credentials in a file expire within `EXPIRES_SOON`. Raises `InvalidMessage`."""
    return [] if path is None else of(read_file(path), str(path), now)


def of(credentials: Credentials, where: str, now: datetime) -> list[Item]:
    until = credentials.until
    if until is None or until > now + EXPIRES_SOON:
        return []
    what = f"the credentials of {credentials.who.name} are valid until {until:%Y-%m-%d %H:%M} UTC"
    return [Item(kind="credentials", what=what, where=where, fix="slmops user renew")]

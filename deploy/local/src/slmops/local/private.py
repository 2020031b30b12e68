"""Writes files atomically, readable only by their owner."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from slmops.contracts.errors import Denied, DiskFull


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` atomically, with mode 0600. Raises `DiskFull`, `Denied`."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp creates with 0600
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "the disk is full", where=str(path), fix="Free some space, or use another folder."
            ) from error
        raise Denied(
            f"cannot write: {error.strerror}", where=str(path), fix="Use a folder with write permission."
        ) from error

"""Converts the errors of a full disk to `DiskFull`, which is temporary."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.contracts.errors import DiskFull


@contextmanager
def raise_disk_full(purpose: str, where: Path) -> Iterator[None]:
    """Converts ENOSPC and EDQUOT in the block to `DiskFull`. `purpose` completes "not enough disk space"."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"not enough disk space {purpose}", where=str(where), fix="Free disk space on the gateway."
        ) from error

"""A full disk as an error that passes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.contracts.errors import DiskFull


@contextmanager
def raise_disk_full(purpose: str, where: Path) -> Iterator[None]:
    """Within the block a disk or a quota that is full becomes `DiskFull`: no room to do what `purpose` says."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            f"not enough disk space {purpose}", where=str(where), fix="Free disk space on the gateway."
        ) from error

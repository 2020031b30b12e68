"""Fits the system to the disk: how much its streams may reserve, and whether there is enough space to start at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from slmops.contracts.errors import DiskFull
from slmops.contracts.subjects import STREAMS, GiB, MiB
from slmops.kit.sizes import size_text

FIRST_START_BYTES = GiB
"""Below it a fresh system cannot take the smallest model with its variants."""
LATER_START_BYTES = 100 * MiB
"""Below it databases and streams fail soon after the start."""
_STREAM_SHARE, _STORE_SHARE = 0.4, 0.75
"""Parts of the free space: what all streams together reserve, and what NATS may use at most, with later resizes."""
_SPECIFIED_BYTES = sum(stream.max_bytes for stream in STREAMS)


@dataclass(frozen=True)
class Capacity:
    """`stream_bytes` is the size of all streams together, `store_bytes` the limit of the server that keeps them."""

    stream_bytes: int
    store_bytes: int

    @property
    def remark(self) -> str | None:
        """What an operator should know: the streams are smaller than on a large disk."""
        if self.stream_bytes >= _SPECIFIED_BYTES:
            return None
        sizes = f"{size_text(self.stream_bytes)} instead of {size_text(_SPECIFIED_BYTES)}"
        return f"The disk is small: new streams get {sizes}. Later: slmops stream resize."


def free_bytes(folder: Path) -> int:
    """Returns the space that the folder's disk has for us."""
    return shutil.disk_usage(folder).free


def capacity(root: Path, store: Path) -> Capacity:
    """Measures the disk of the data folder `root`; `store` is the folder of JetStream in it. Raises `DiskFull`."""
    free, fresh = free_bytes(root), not store.exists()
    needed = FIRST_START_BYTES if fresh else LATER_START_BYTES
    if free < needed:
        raise DiskFull(
            f"the disk has {size_text(free)} free, and slmops needs {size_text(needed)} to start",
            where=str(root),
            fix="Free some space, or choose a folder on another disk: slmops up --data FOLDER.",
        )
    room = free + _bytes_below(store)
    # A server whose limit is below what its streams reserve does not open them. So the limit is never below that, even
    # if the disk was filled meanwhile.
    limit = max(int(room * _STORE_SHARE), _reserved_bytes(store) + 256 * MiB)
    return Capacity(min(_SPECIFIED_BYTES, int(room * _STREAM_SHARE)), limit)


def _bytes_below(folder: Path) -> int:
    found = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sum(path.stat().st_size for path in found)


def _reserved_bytes(store: Path) -> int:
    """Returns what the existing streams reserve, from the descriptions that the server wrote."""
    limits = (
        json.loads(path.read_bytes()).get("max_bytes", 0) for path in store.glob("jetstream/*/streams/*/meta.inf")
    )
    return sum(limit for limit in limits if limit > 0)

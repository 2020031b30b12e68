"""Writes files atomically: after a crash or an error a file is complete or does not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yields a file that is renamed to `path` when the block ends without an error; otherwise nothing is left.

    `durable`: flush the file to the disk before it is renamed, and the folder after. Raises `OSError`.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as out:
            yield out
            if durable:
                out.flush()
                os.fsync(out.fileno())
        new.replace(path)
        if durable:
            sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file or the entries of a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

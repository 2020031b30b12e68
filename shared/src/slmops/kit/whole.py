"""A file that is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Write what shall be `path`; it has that name when the block ends without an error, else nothing is left.

    `durable` waits for the disk before. Raises `OSError`.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as out:
            yield out
            if durable:
                out.flush()
                os.fsync(out.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)

"""A text file that is bounded: at its limit it becomes the previous file, whose content is dropped.

What is written here is for diagnosis. So a file that cannot be written, for example on a full disk, stops nobody: the
text is dropped, a warning is logged once, and later text is written as soon as there is space again.
"""

from __future__ import annotations

import logging
from io import FileIO
from pathlib import Path

log = logging.getLogger("slmops.files")


class RotatingFile:
    """Appends text to `path`. At most `limit_bytes` are in it and as many in `path` with the suffix `.1` added.

    Has the part of `TextIO` that an exporter uses. Not for several threads or processes at once.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path, self._limit_bytes = path, limit_bytes
        self._file: FileIO | None = None
        self.problem: OSError | None = None
        """Why the last write failed; None if it succeeded."""

    def write(self, text: str) -> int:
        """Writes whole texts only: of one that does not fit on the disk nothing is left."""
        try:
            self._write(text.encode())
        except OSError as error:
            if self.problem is None:
                log.warning("cannot write %s: %s", self._path, error.strerror)
            self.problem = error
        else:
            self.problem = None
        return len(text)

    def flush(self) -> None:
        """Does nothing: nothing is buffered."""

    def _write(self, data: bytes) -> None:
        file = self._opened()
        if file.tell() + len(data) > self._limit_bytes and file.tell():
            file.close()
            self._file = None
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            file = self._opened()
        before, left = file.tell(), memoryview(data)
        try:
            while left:
                left = left[file.write(left) or 0 :]
        except OSError:
            file.truncate(before)
            raise

    def _opened(self) -> FileIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._path, "a")
        return self._file

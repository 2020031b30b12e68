"""A text file that is bounded: at its limit it becomes the previous file, whose content is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO


class RotatingFile:
    """Appends text to `path`. At most `limit_bytes` are in it and as many in `path` with the suffix `.1` added.

    Has the part of `TextIO` that an exporter uses. Not for several threads or processes at once.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path, self._limit_bytes = path, limit_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()

    def write(self, text: str) -> int:
        if self._file.tell() + len(text) > self._limit_bytes and self._file.tell():
            self._file.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._file = self._opened()
        return self._file.write(text)

    def flush(self) -> None:
        self._file.flush()

    def _opened(self) -> TextIO:
        return self._path.open("a", encoding="utf-8", buffering=1)

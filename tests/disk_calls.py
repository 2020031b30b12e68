"""Sees each call of this process that waits for a file below a folder, before it is made."""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

_PATH_CALLS = ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "scandir", "listdir")
_CHANGES = frozenset({"rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "fsync", "write", "half"})
Damage = Callable[[bytes], bytes]
"""What a power loss leaves of a file that was not flushed to the disk."""
DAMAGES: dict[str, Damage] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),  # its size is on the disk already
}


class _Writing:
    """A file that is open for writing. Each write stops in the middle, with half of its bytes on the disk, if `half`
    raises."""

    def __init__(self, file: Any, half: Callable[[], None]) -> None:
        self._file, self._half = file, half

    def write(self, data: Any) -> int:
        middle = len(data) // 2
        first = self._file.write(data[:middle])
        self._file.flush()
        self._half()
        return int(first + self._file.write(data[first:]))

    def __enter__(self) -> _Writing:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class DiskCalls:
    """Calls `before(name, path)` for each call on a path below one of `folders`; what it raises is the call's error.

    Names are those of `os`, `write` or `read` for opening a file, and `half` in the middle of writing to it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        self._folders = [str(folder) for folder in folders]
        self.before: Callable[[str, Path], None] = lambda name, path: None
        self._unsynced: set[int] = set()
        for name in _PATH_CALLS:
            monkeypatch.setattr(os, name, self._on_path(name, getattr(os, name)))
        fsync, os_open, open_file = os.fsync, os.open, io.open

        def seen_fsync(fd: int) -> None:
            self._see("fsync", fd)
            self._unsynced.discard(os.fstat(fd).st_ino)
            fsync(fd)

        def seen_os_open(path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **options: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self._see("write" if writes else "read", path, dir_fd)
            fd = os_open(path, flags, *rest, dir_fd=dir_fd, **options)
            if writes:
                self._unsynced.add(os.fstat(fd).st_ino)
            return fd

        def seen_open(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            writes = bool(set(mode) & set("wax+"))
            if not isinstance(path, int):
                self._see("write" if writes else "read", path)
            file = open_file(path, mode, *rest, **options)
            if not writes:
                return file
            if not isinstance(path, int):
                self._unsynced.add(os.fstat(file.fileno()).st_ino)
            return _Writing(file, lambda: self._see("half", file.fileno()))

        monkeypatch.setattr(os, "fsync", seen_fsync)
        monkeypatch.setattr(os, "open", seen_os_open)
        monkeypatch.setattr(io, "open", seen_open)
        monkeypatch.setattr(builtins, "open", seen_open)

    def unsynced(self, home: Path) -> list[Path]:
        """Returns the files below a folder that have content, but were not flushed to the disk."""
        seen, self.before = self.before, lambda name, path: None
        try:
            files = [path for path in home.rglob("*") if path.is_file()]
            return [path for path in files if path.stat().st_ino in self._unsynced and path.stat().st_size]
        finally:
            self.before = seen

    def copy_after_power_loss(self, home: Path, copy: Path, damage: Damage = DAMAGES["empty"]) -> None:
        """Copies a folder as a power loss may leave it: files that were not flushed to the disk are damaged."""
        seen, self.before, unsynced = self.before, lambda name, path: None, set(self._unsynced)
        try:
            shutil.copytree(home, copy)
            for path in home.rglob("*"):
                if path.is_file() and path.stat().st_ino in self._unsynced:
                    (copy / path.relative_to(home)).write_bytes(damage(path.read_bytes()))
        finally:  # what the copy wrote does not count
            self.before, self._unsynced = seen, unsynced

    def _on_path(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(path: Any = ".", *rest: Any, **options: Any) -> Any:
            self._see(name, path, options.get("dir_fd") or options.get("src_dir_fd"))
            return call(path, *rest, **options)

        return seen

    def _see(self, name: str, path: Any, dir_fd: int | None = None) -> None:
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
            full = os.path.join(base, os.fsdecode(path))
        if any(full == folder or full.startswith(folder + os.sep) for folder in self._folders):
            self.before(name, Path(full))


def changes(name: str) -> bool:
    """Returns whether a call of this name changes the disk."""
    return name in _CHANGES


def calls_of_this_thread(calls: DiskCalls) -> list[str]:
    """Returns a list that grows with each call of the current thread, the event loop's, and where it was made."""
    loop, found = threading.get_ident(), list[str]()

    def record(name: str, path: Path) -> None:
        if threading.get_ident() == loop:
            found.append(f"{name} {path.name} by {_caller(traceback.extract_stack())}")

    calls.before = record
    return found


def _caller(stack: Iterable[traceback.FrameSummary]) -> str:
    ours = [frame for frame in stack if "/slmops/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours[-3:]))

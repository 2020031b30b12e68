"""A system that runs in another process: who it is, how it is started in the background and how it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from slmops.console.commands.status import is_locked
from slmops.contracts.errors import Denied, NotFound, NotReady, Unreachable
from slmops.local.layout import Layout
from slmops.local.process import log_tail

_POLL_S = 0.1
_STOPPED_WITHIN = timedelta(minutes=2)
UP_LOG = "up"


def owner(layout: Layout) -> int | None:
    """Returns the pid of the process that holds the lock of the data folder; None if the system does not run."""
    if not is_locked(layout.lock_file):
        return None
    written = layout.lock_file.read_text().strip()
    return int(written) if written.isdigit() else None


def stop(layout: Layout, within: timedelta = _STOPPED_WITHIN) -> int:
    """Stops the system and waits until it has ended; returns its pid.

    Raises `NotFound` if none runs, `Denied` if it belongs to another user, `NotReady` if it has not ended in time.
    """
    pid, root = owner(layout), str(layout.root)
    if pid is None:
        raise NotFound("no system is running with this data folder", where=root, fix="Name its folder with --data.")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as error:
        raise Denied("the system belongs to another user", where=f"{root}, pid {pid}") from error
    except ProcessLookupError:
        return pid  # it ended by itself meanwhile
    deadline = time.monotonic() + within.total_seconds()
    while owner(layout) == pid:
        if time.monotonic() > deadline:
            raise NotReady(f"pid {pid} has not ended yet", where=root, fix="Wait, or look at it: slmops status.")
        time.sleep(_POLL_S)
    return pid


def start_detached(layout: Layout, arguments: Sequence[str]) -> int:
    """Runs `slmops up` with these arguments in the background; returns its pid when the system is ready.

    Raises `Unreachable` with the end of its log if it ends instead. Ctrl-C stops it.
    """
    log_path = layout.log(UP_LOG)
    try:
        layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        layout.logs.mkdir(exist_ok=True)
        log = log_path.open("ab")  # it may be that of a running system
    except OSError as error:
        raise Denied(f"cannot use the data folder: {error.strerror}", where=str(layout.root)) from error
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "slmops.console", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while process.poll() is None and _ready_pid(layout.client_file) != process.pid:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode is not None:
        fix = f"Its log ends with:\n{log_tail(log_path)}"
        raise Unreachable(f"slmops up ended with code {process.returncode}", where=str(log_path), fix=fix)
    return process.pid


def _ready_pid(client_file: Path) -> int | None:
    """Returns the pid of the supervisor that wrote the file, which it does when everything is ready."""
    try:
        found = json.loads(client_file.read_bytes()).get("supervisor")
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, int) else None


def log_files(layout: Layout, names: Sequence[str]) -> list[Path]:
    """Returns the logs of processes, of all if none is named. Raises `NotFound`."""
    known = {path.stem: path for path in sorted(layout.logs.glob("*.log"))}
    if unknown := [name for name in names if name not in known]:
        raise NotFound(f"there is no log of {unknown[0]}", where=str(layout.logs), fix=f"Known: {', '.join(known)}.")
    if not known:
        raise NotFound("there are no logs", where=str(layout.logs), fix="Name the folder with --data.")
    return [known[name] for name in names or known]

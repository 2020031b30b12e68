"""A supervised process: its specification, its displayed state, and functions to start and kill it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from slmops.kit.lifeline import die_with

_TAIL_BYTES, _MESSAGE_LENGTH = 64 << 10, 500
LOG_LIMIT_BYTES = 16 << 20
"""Size at which a process's log is emptied. Its previous content is kept too."""
Status = Literal["starting", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True)
class ProcessSpec:
    """How to start a process. `ready` returns whether it serves; None: it is ready as soon as it runs."""

    name: str
    argv: Sequence[str]
    log_path: Path
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    ready: Callable[[], Awaitable[bool]] | None = None
    cwd: Path | None = None


@dataclass(frozen=True)
class ProcessState:
    """The state of one process.

    `last_exit` is negative for a signal, None if the process never exited. `last_error` is the last message that it
    logged before an unexpected exit; it is cleared when the process is ready again.
    """

    name: str
    status: Status
    log: str
    pid: int | None = None
    restarts: int = 0
    last_exit: int | None = None
    last_error: str | None = None
    since: datetime = field(default_factory=lambda: datetime.now(UTC))


async def spawn(spec: ProcessSpec) -> asyncio.subprocess.Process:
    """Starts a process in its own session and appends its output to its log. The kernel kills it if we die.

    Call it from the main thread: the kernel sends its death signal when the forking thread ends, not the process.
    """
    spec.log_path.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()

    with spec.log_path.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *spec.argv,
            env=dict(spec.env),
            cwd=spec.cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )


def bound_log(path: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Empties a log that has reached its limit, after copying it to the same name with `.1` added.

    The process keeps its open file, which appends, so it needs no signal. Lines that it writes meanwhile may be lost.
    """
    if path.exists() and path.stat().st_size >= limit_bytes:
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)


def kill_group(pid: int) -> None:
    """Sends SIGKILL to a process and its children. Does nothing if they have ended."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def log_tail(path: Path, lines: int = 5) -> str:
    """Returns the last lines of a log, for an error message. Reads only the end of the file."""
    if not path.exists():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])


def last_message(path: Path) -> str | None:
    """Returns the last message of a log of JSON lines, or its last line of text; None if it is empty."""
    line = log_tail(path, 1).strip()
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict) and "message" in found:
        line = str(found["message"])
    return line[:_MESSAGE_LENGTH] or None

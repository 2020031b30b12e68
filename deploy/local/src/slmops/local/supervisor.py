"""The supervisor: starts processes, restarts crashed ones, publishes their state, and stops all of them.

Invariants:

- A child never outlives its supervisor: `stop()` stops it, and the kernel kills it if the supervisor is killed.
- If a process exits before it was ready for the first time, `start` fails. Exception: after exit code 75 (EX_TEMPFAIL,
  a dependency is not available yet) it is restarted. After it was ready once, it is always restarted.
- `state.json` is replaced atomically at every change, so a reader always sees a complete and current file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from slmops.contracts.errors import NotFound, SlmopsError, Unreachable
from slmops.local.private import write_atomically
from slmops.local.process import ProcessSpec, ProcessState, bound_log, kill_group, last_message, log_tail, spawn

_POLL: Final = 0.05
_BACKOFF_FIRST: Final = timedelta(milliseconds=250)
_BACKOFF_LIMIT: Final = timedelta(seconds=30)
_STABLE_AFTER: Final = timedelta(seconds=30)
_LOOK_AT_LOG_EVERY: Final = timedelta(seconds=10)
_NOT_STARTED: Final = 127  # the shell's exit code for a command that cannot be run

_log = logging.getLogger(__name__)


class _Child:
    """One process, including all its restarts."""

    def __init__(self, spec: ProcessSpec, changed: Callable[[], None]) -> None:
        self.spec = spec
        self.state = ProcessState(spec.name, "starting", str(spec.log_path))
        self._changed = changed
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = asyncio.Event()
        self._stopping = False
        self._task = asyncio.create_task(self._keep_running(), name=f"supervise {spec.name}")

    def _set(self, **changes: Any) -> None:
        self.state = replace(self.state, since=datetime.now(UTC), **changes)
        self._changed()

    async def _keep_running(self) -> None:
        """Runs and restarts the process. Raises `Unreachable` if it exits before it was ever ready."""
        crashes = 0
        while not self._stopping:
            started = datetime.now(UTC)
            code = await self._run_once()
            if self._stopping:
                return
            if not self._was_ready.is_set() and code != os.EX_TEMPFAIL:
                self._set(status="failed", pid=None, last_exit=code)
                raise self._unreachable(f"it exited with code {code} before it was ready")
            crashes = 0 if datetime.now(UTC) - started > _STABLE_AFTER else crashes
            error = last_message(self.spec.log_path)
            restarts = self.state.restarts + 1
            self._set(status="restarting", pid=None, last_exit=code, last_error=error, restarts=restarts)
            await asyncio.sleep(min(_BACKOFF_FIRST * 2**crashes, _BACKOFF_LIMIT).total_seconds())
            crashes += 1

    async def _run_once(self) -> int:
        """Starts the process and waits until it exits. Returns the exit code."""
        try:
            self._process = await spawn(self.spec)
        except OSError as error:
            with self.spec.log_path.open("a") as log:
                log.write(f"{error}\n")
            return _NOT_STARTED
        self._set(status="starting", pid=self._process.pid)
        try:
            exited = asyncio.create_task(self._process.wait())
            watch = asyncio.create_task(self._watch_ready())
            bound = asyncio.create_task(self._bound_log())
            done, _ = await asyncio.wait({exited, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch in done:
                watch.result()  # raise an error of the readiness check
            return await exited
        finally:
            for task in (watch, bound):
                task.cancel()
            kill_group(self._process.pid)  # children that it did not stop
            await self._process.wait()

    async def _bound_log(self) -> None:
        while True:
            with suppress(OSError):  # a full disk: the next turn may free it
                await asyncio.to_thread(bound_log, self.spec.log_path)
            await asyncio.sleep(_LOOK_AT_LOG_EVERY.total_seconds())

    async def _watch_ready(self) -> None:
        while self.spec.ready and not await self.spec.ready():  # noqa: ASYNC110 (another process: nothing to wait on)
            await asyncio.sleep(_POLL)
        self._set(status="ready", last_error=None)
        self._was_ready.set()

    def _unreachable(self, what: str) -> Unreachable:
        fix = f"The log ends with:\n{log_tail(self.spec.log_path)}"
        return Unreachable(f"{self.spec.name} did not start: {what}", where=str(self.spec.log_path), fix=fix)

    async def wait_ready(self, within: timedelta) -> None:
        ready = asyncio.create_task(self._was_ready.wait())
        await asyncio.wait({ready, self._task}, timeout=within.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            self._task.result()
        if not self._was_ready.is_set():
            raise self._unreachable(f"it was not ready after {within.total_seconds():g} s")

    async def stop(self, grace: timedelta) -> None:
        """Sends SIGTERM, and after `grace` SIGKILL. Does nothing if the process has stopped."""
        self._stopping = True
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait({self._task}, timeout=grace.total_seconds())
        self._task.cancel()  # a process that ignored SIGTERM, or the pause before a restart
        await asyncio.wait({self._task})
        if self.state.status not in ("failed", "stopped"):
            self._set(status="stopped", pid=None, last_exit=self._process.returncode if self._process else None)


class Supervisor:
    """Supervises processes. Use it as an async context manager in the main thread, and not again after `stop`."""

    def __init__(
        self,
        state_file: Path,
        on_change: Callable[[ProcessState], None] | None = None,
        grace: timedelta = timedelta(seconds=10),
    ) -> None:
        self._state_file = state_file
        self._on_change = on_change
        self._grace = grace
        self._children: dict[str, _Child] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, spec: ProcessSpec, within: timedelta = timedelta(seconds=60)) -> None:
        """Starts a process and returns when it is ready. On failure, stops it and raises `Unreachable` with its log."""
        child = _Child(spec, lambda: self._changed(spec.name))
        self._children[spec.name] = child
        try:
            await child.wait_ready(within)
        except BaseException:
            await child.stop(self._grace)
            raise

    async def stop(self) -> None:
        """Stops all processes, the last started first."""
        for child in reversed(self._children.values()):
            await child.stop(self._grace)

    async def kill(self, name: str) -> None:
        """Sends SIGKILL to one process and its children. The process is then restarted. Raises `NotFound`."""
        child = self._children.get(name)
        if not child or not child.state.pid:
            raise NotFound(f"there is no running process {name!r}", fix=f"Running: {', '.join(self._children)}.")
        kill_group(child.state.pid)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to one process, without its children. Does nothing if it does not run."""
        child = self._children.get(name)
        if child and child.state.pid:
            with suppress(ProcessLookupError):
                os.kill(child.state.pid, number)

    def states(self) -> list[ProcessState]:
        """Returns the states in start order."""
        return [child.state for child in self._children.values()]

    def _changed(self, name: str) -> None:
        state = {"supervisor": os.getpid(), "processes": [asdict(state) for state in self.states()]}
        try:
            write_atomically(self._state_file, json.dumps(state, indent=2, default=datetime.isoformat))
        except SlmopsError:  # a full disk must not stop the running processes
            _log.exception("cannot write the state of the processes")
        if self._on_change:
            self._on_change(self._children[name].state)

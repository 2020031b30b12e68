"""Runs `slmops up` and the command line as separate processes, as a user does; imports neither."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import httpx
import psutil
from servers import reserve_ports

from slmops.kit.tls import client_context

SLMOPS = Path(sys.executable).parent / "slmops"
READY_WITHIN_S = 90


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of one call of the command line."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def problem(self) -> Any:
        return json.loads(self.err)


def environment(**settings: str) -> dict[str, str]:
    """Returns our environment without the slmops settings that a developer may have made."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLMOPS_", "TRACEPARENT"))}
    return {**inherited, "COLUMNS": "160", **settings}


def begin(*arguments: str | Path, **settings: str) -> subprocess.Popen[str]:
    """Starts the command line with an empty standard input."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [SLMOPS, *arguments], env=environment(**settings), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )


def wait_for_exit(process: subprocess.Popen[str], within_s: float = 60) -> CommandResult:
    try:
        out, err = process.communicate(timeout=within_s)
    finally:
        process.kill()
    assert "Traceback" not in err, err
    return CommandResult(process.returncode, out, err)


class Up:
    """One system on one data folder. Call it to use the command line: `up("model", "ls", "--json")`."""

    def __init__(self, data: Path, gateways: int, **settings: str) -> None:
        self.data = data
        self._log = data.with_suffix(".log")
        self._arguments = ["up", "--data", data, "--gateways", str(gateways)]
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None
        reserve_ports(data, gateways)

    def start(self) -> None:
        """Starts the system and waits until it is ready. Does nothing if it runs already."""
        if self._process is not None:
            return
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [SLMOPS, *self._arguments], env=environment(**self._settings), stdout=log, stderr=log, text=True
            )
        until(
            lambda: "Ready" in self.output or self._process is None or self._process.poll() is not None, READY_WITHIN_S
        )
        assert self._process.poll() is None, self.output

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits for the exit. Returns the exit code, or 0 if the system was not running."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(timeout=60)
        finally:
            process.kill()

    def __call__(self, *arguments: str | Path, within_s: float = 60, **settings: str) -> CommandResult:
        env = environment(SLMOPS_DATA=str(self.data), **settings)
        done = forked.run(forked.CONSOLE, *arguments, env=env, timeout=within_s)
        assert "Traceback" not in done.err, done.err
        return CommandResult(*done)

    def begin(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return begin(*arguments, SLMOPS_DATA=str(self.data))

    def json(self, *arguments: str | Path, within_s: float = 60) -> Any:
        """Returns the JSON output of a call that must succeed."""
        done = self(*arguments, "--json", within_s=within_s)
        assert done.exit_code == 0, done.err
        return done.json

    @property
    def output(self) -> str:
        return self._log.read_text()

    def processes(self) -> dict[str, dict[str, Any]]:
        """Returns the supervisor's state of each process by name."""
        return {state["name"]: state for state in self._read("state.json")["processes"]}

    def port(self, name: str) -> int:
        return int(self._read("ports.json")[name])

    def health(self, name: str) -> int:
        return self._get(name, "/health").status_code

    def health_report(self, name: str) -> dict[str, Any]:
        return dict(self._get(name, "/health").json())

    def metrics(self, name: str) -> str:
        return self._get(name, "/metrics").text

    def _get(self, name: str, path: str) -> httpx.Response:
        trusted = client_context(self.data / "keys" / "tls" / "trusted-authorities.pem")
        return httpx.get(f"https://127.0.0.1:{self.port(f'{name}.http')}{path}", timeout=10, verify=trusted)

    def signal(self, name: str, number: int) -> None:
        """Sends a signal to a process and its child processes."""
        os.killpg(self.processes()[name]["pid"], number)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Stops a process with SIGSTOP for the duration of the block, so that it runs and does not answer."""
        self.signal(name, signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(name, signal.SIGCONT)

    @contextmanager
    def unsupervised(self) -> Iterator[None]:
        """Stops the supervisor for the duration of the block, so that no process is restarted."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _read(self, name: str) -> Any:
        return json.loads((self.data / name).read_text())


def until(condition: Callable[[], object], within_s: float = 60) -> None:
    """Polls `condition` until it is true; fails after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.1)


def running(pids: list[int]) -> list[str]:
    """Command lines of those that still run."""
    return [" ".join(psutil.Process(pid).cmdline()) for pid in pids if psutil.pid_exists(pid)]

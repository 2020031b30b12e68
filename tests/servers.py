"""The addresses of the servers in `conftest.py`, and ports and settings for servers that a test starts itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from slmops.kit.bus.nats_auth import Authority
from slmops.local.environment import default_gateways
from slmops.local.ports import choose_ports
from slmops.local.process import ProcessSpec, log_tail
from slmops.local.system import System

QUICK = {"SLMOPS_WINDOW_S": "1", "SLMOPS_GRACE_S": "0.5", "SLMOPS_RETRY_EVERY": "PT1S"}
"""Short windows of telemetry, and a short retry delay of gateways."""
_READY_WITHIN_S = 30
_STOPPED_WITHIN_S = 10


@dataclass(frozen=True)
class NatsServer:
    """`creds[user]` is a path for nats-py's `user_credentials`: every service, `console` and `enrol`."""

    url: str
    creds: dict[str, Path]
    authority: Authority
    gateway_signing_key: Path


@dataclass(frozen=True)
class S3:
    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    pid: int = 0

    @contextmanager
    def hanging(self) -> Iterator[Callable[[], None]]:
        """Stops the process, which still accepts connections; yields a function that lets it go on."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield lambda: os.kill(self.pid, signal.SIGCONT)
        finally:
            os.kill(self.pid, signal.SIGCONT)


def reserve_ports(root: Path, gateways: int = 3) -> None:
    """Chooses the ports of a system that another process will start in `root`, apart from the ports of this process."""
    system = System(root, gateways=default_gateways(gateways))
    root.mkdir(exist_ok=True)
    choose_ports(system.layout.ports_file, system._port_names())


@contextmanager
def running(spec: ProcessSpec) -> Iterator[int]:
    """Runs a process while the block runs; yields its id when it is ready."""
    with spec.log_path.open("ab") as log:
        process = subprocess.Popen(list(spec.argv), env=dict(spec.env), cwd=spec.cwd, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _READY_WITHIN_S
        while spec.ready and not asyncio.run(_answer(spec)):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{spec.name} does not start:\n{log_tail(spec.log_path)}")
            time.sleep(0.02)
        yield process.pid
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()  # as the supervisor and Docker do
        process.wait()


async def _answer(spec: ProcessSpec) -> bool:
    assert spec.ready
    return await spec.ready()

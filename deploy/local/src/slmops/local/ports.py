"""Chooses free ports on the loopback interface, if possible the same ones after a restart."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from slmops.contracts.errors import PortTaken
from slmops.local.private import write_atomically

HOST = "127.0.0.1"
# Below the range of Linux for outgoing connections (32768 and up), so that a client's connection cannot take the port
# of a server while the server restarts.
_RANGE = range(20_000, 32_000)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # otherwise a port in TIME_WAIT looks taken
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose_ports(file: Path, names: Iterable[str], fixed: Mapping[str, int] | None = None) -> dict[str, int]:
    """Returns a port for each name: the `fixed` one, or the one stored in `file` if it is free, or a new one.

    Stores the choice in `file`. Raises `PortTaken` if a fixed port is in use.
    """
    fixed = fixed or {}
    ports: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        if name in fixed:
            ports[name] = _checked(name, fixed[name])
        elif name not in ports or not is_free(ports[name]):
            ports[name] = _unused(ports.values())
    write_atomically(file, json.dumps(ports, indent=2))
    return ports


def _checked(name: str, port: int) -> int:
    if not is_free(port):
        raise PortTaken(
            f"port {port}, chosen for {name}, is taken by another process",
            where=f"{HOST}:{port}",
            fix=f"Stop that process, or choose another port for {name}. Without the option, a free port is used.",
        )
    return port


def _unused(taken: Iterable[int]) -> int:
    candidates = [port for port in _RANGE if port not in set(taken)]
    for port in random.sample(candidates, len(candidates)):
        if is_free(port):
            return port
    raise PortTaken("no port is free", where=f"{HOST}:{_RANGE.start}-{_RANGE.stop}", fix="Stop some servers.")

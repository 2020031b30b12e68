"""Where the real servers of `conftest.py` are; ports and settings for those that a test starts itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops.kit.nats_auth import Authority
from slmops.local.environment import default_gateways
from slmops.local.ports import choose_ports
from slmops.local.system import System

QUICK = {"SLMOPS_WINDOW_S": "1", "SLMOPS_GRACE_S": "0.5", "SLMOPS_RETRY_EVERY": "PT1S"}
"""Telemetry's windows, and how soon a gateway tries again."""


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


def reserve_ports(root: Path, gateways: int = 3) -> None:
    """Choose the ports of a system that another process will start on `root`, which knows nothing of ours."""
    system = System(root, gateways=default_gateways(gateways))
    root.mkdir(exist_ok=True)
    choose_ports(system.layout.ports_file, system._port_names())

"""What the fixtures in `conftest.py` hand to tests: where the real servers are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops.kit.nats_auth import Authority


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

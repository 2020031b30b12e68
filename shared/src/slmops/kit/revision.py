"""Names the code that runs: a digest of the installed files. Versions alone do not tell two builds apart."""

from __future__ import annotations

import os
import socket
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from slmops.contracts.descriptor import digest_of
from slmops.contracts.identity import ServiceProcess
from slmops.kit.clock import utc_now

_SHARED = ("slmops.contracts", "slmops.kit")


def this_process(service: str) -> ServiceProcess:
    """Describes the process that calls it. Reads a few hundred files, which takes some hundredths of a second."""
    return ServiceProcess(
        service=service,
        version=_version(f"slmops-{service}"),
        revision=revision(*_SHARED, f"slmops.{service}"),
        shared_revision=shared_revision(),
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=utc_now(),
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def shared_revision() -> str:
    """Returns the revision of the code that all services and the command line share."""
    return revision(*_SHARED)


@cache
def revision(*packages: str) -> str:
    """Returns the first 12 hexadecimal digits of the digest of the packages' Python files and their paths."""
    found = [
        f"{name} {path.relative_to(folder).as_posix()} {digest_of(path.read_bytes())}"
        for name in packages
        for folder in _folders(name)
        for path in sorted(folder.rglob("*.py"))
    ]
    return digest_of("\n".join(found).encode()).removeprefix("sha256:")[:12]


def _folders(package: str) -> list[Path]:
    spec = find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []

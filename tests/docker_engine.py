"""Finds a Docker engine for tests that build and run containers, and the files that `.ci/engine` prepared for them.

Each function skips the test if it finds nothing, because few machines can test containers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from slmops.console.image.engine import Engine
from slmops.contracts.errors import SlmopsError

ROOT = Path(__file__).parents[1]
BASE = "slmops-test-base:bookworm"
_WHEELS = ROOT / "build" / "engine" / "wheels"


def engine() -> Engine:
    try:
        return Engine()
    except SlmopsError as error:
        _skip(error)


def base(found: Engine) -> str:
    """Returns the tag of a small Debian image with Python."""
    try:
        found.inspect(BASE)
    except SlmopsError as error:
        _skip(error)
    return BASE


def wheels() -> Path:
    """Returns the folder of all wheels that a gateway needs, for the Python of `base`."""
    if not (_WHEELS / ".gathered").exists():
        _skip(f"no wheels in {_WHEELS.relative_to(ROOT)}")
    return _WHEELS


def _skip(why: object) -> NoReturn:
    pytest.skip(f"containers cannot be tested; .ci/engine makes what is needed: {why}")

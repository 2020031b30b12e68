"""A Docker engine for tests that build and run containers, and what `.ci/engine` made for them.

Each skips where what it finds is not there: containers can be tested on few machines.
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
    """A small Debian with Python."""
    try:
        found.inspect(BASE)
    except SlmopsError as error:
        _skip(error)
    return BASE


def wheels() -> Path:
    """All that a gateway needs, for the Python of `base`."""
    if not (_WHEELS / ".gathered").exists():
        _skip(f"no wheels in {_WHEELS.relative_to(ROOT)}")
    return _WHEELS


def _skip(why: object) -> NoReturn:
    pytest.skip(f"containers cannot be tested; .ci/engine makes what is needed: {why}")

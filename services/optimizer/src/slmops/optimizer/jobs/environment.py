"""Computes a digest of everything that a result depends on besides its job: tools, our code, and bundled texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from slmops.contracts.descriptor import Digest, digest_of
from slmops.optimizer.measure.texts import read_texts
from slmops.optimizer.recipes.pipeline import TOOLS

_PACKAGE = Path(__file__).parents[1]


def environment(package: Path = _PACKAGE) -> Mapping[str, str]:
    """Returns the version of each tool and the digests of our files and of this machine's calibration text, by name.

    Our files include the passes, the evaluator and its texts, because a change in any of them may change a figure.
    """
    tools = {tool: version(tool) for tool in (*TOOLS, "slmops-shared")}
    return tools | {"files": _files_digest(package), "calibration": read_texts().calibration.digest}


@cache
def environment_digest() -> Digest:
    """Returns the digest of the environment. The first call takes about a second."""
    return digest_of(json.dumps(environment(), sort_keys=True).encode())


def _files_digest(package: Path) -> Digest:
    paths = sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    lines = [f"{path.relative_to(package).as_posix()} {digest_of(path.read_bytes())}" for path in paths]
    return digest_of("\n".join(lines).encode())

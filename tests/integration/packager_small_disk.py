"""Checks the packager on a full disk. Runs in a mount namespace of its own, so that no mount is left behind.

unshare --mount python packager_small_disk.py FOLDER KEY < {"objects": settings, "variant": event}
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.contracts.errors import DiskFull
from slmops.contracts.events import VariantOptimized
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings
from slmops.packager.assemble import Assembler

CANNOT_MOUNT = 99


async def packaging(folder: Path, key: Path) -> None:
    given = json.load(sys.stdin)
    assembler = Assembler(Objects(ObjectSettings(**given["objects"])), folder / "work", key)
    await assembler.open()
    try:
        await assembler.assemble(VariantOptimized.model_validate(given["variant"]))
    except DiskFull as error:
        assert str(folder) in str(error.where)  # noqa: PT017
        assert "Free" in str(error.fix)  # noqa: PT017
    else:
        raise AssertionError("no error on a full disk")
    assert list((folder / "work").iterdir()) == [], "its partial files are removed"


PASSED = "every check passed"


def run_on_a_small_disk(folder: Path, key: Path, given: dict[str, object]) -> str:
    """Runs this file as a process in a mount namespace, and skips the test if none can be made. Returns its output."""
    folder.mkdir()
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    argv = [*unshare, sys.executable, __file__, str(folder), str(key)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, input=json.dumps(given), env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode == CANNOT_MOUNT or "unshare:" in done.stderr:
        pytest.skip("mounting a small disk is not permitted on this machine")
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    folder = Path(sys.argv[1])
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        sys.exit(CANNOT_MOUNT)
    asyncio.run(packaging(folder, Path(sys.argv[2])))
    print(PASSED)


if __name__ == "__main__":
    main()

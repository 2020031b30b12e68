"""Checks on a full or read-only disk. Runs in a mount namespace of its own, so that no mount is left behind.

unshare --mount python kit_small_disk.py FOLDER journal
unshare --mount python kit_small_disk.py FOLDER health
unshare --mount python kit_small_disk.py FOLDER command
unshare --mount python kit_small_disk.py FOLDER objects DIGEST < settings.json
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.kit_counter import Counter

from slmops.contracts.errors import DatabaseFull, DiskFull, SlmopsError, Unreachable
from slmops.kit.disk import DiskWatch
from slmops.kit.objects.store import Objects
from slmops.kit.settings import ObjectSettings

CANNOT_MOUNT = 99


def mount(folder: Path, *options: str) -> None:
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        sys.exit(CANNOT_MOUNT)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(4096))
        except OSError:
            return


async def journal(folder: Path) -> None:
    url = f"sqlite:///{folder}/journal.db"
    counter = Counter(url)
    await counter.journal.open()
    count = await counter.step()
    fill(folder / "fill")
    refused = None
    for _ in range(1000):
        try:
            count = await counter.step()
        except SlmopsError as error:
            refused = error
            break
    assert type(refused) is DatabaseFull, refused
    assert "Free disk space" in str(refused.fix)
    assert await counter.count() == count, "stored data can still be read"
    (folder / "fill").unlink()
    assert await counter.step() == count + 1
    await counter.journal.close()

    mount(folder, "-o", "remount,ro")
    counter = Counter(url)
    try:
        await counter.journal.open()
    except (DiskFull, Unreachable) as error:
        assert "is writable" in str(error.fix)  # noqa: PT017
    else:
        raise AssertionError("the journal opened on a read-only disk")


async def objects(folder: Path) -> None:
    store = Objects(ObjectSettings(**json.load(sys.stdin)))
    target = folder / "weights.bin"
    try:
        await store.get_file(sys.argv[3], target)
    except DiskFull as error:
        assert str(folder) in str(error.where)  # noqa: PT017
        assert "Free" in str(error.fix)  # noqa: PT017
    else:
        raise AssertionError("no error on a full disk")
    assert list(folder.iterdir()) == [], "its partial files are removed"


async def health(folder: Path) -> None:
    """Without space a process is degraded, for the stated reason, until there is space again."""
    now = [0.0]
    disks = DiskWatch([folder / "data" / "not there yet", folder], floor_bytes=300_000, clock=lambda: now[0])
    assert await disks.problems() == []
    (folder / "half").write_bytes(bytes(600_000))
    now[0] += 10
    [nearly] = await disks.problems()
    assert (nearly.path, nearly.floor_bytes, "free" in nearly.reason) == (str(folder), 300_000, True)
    assert 0 < nearly.free_bytes < 300_000
    fill(folder / "fill")
    now[0] += 1
    assert await disks.problems() == [nearly], "asked again at once, it does not look again"
    now[0] += 10
    [full] = await disks.problems()
    assert (full.path, full.free_bytes, full.reason) == (str(folder), 0, "cannot write: No space left on device")
    for name in ("half", "fill"):
        (folder / name).unlink()
    now[0] += 10
    assert await disks.problems() == []
    assert list(folder.iterdir()) == [], "it leaves nothing"


async def command(folder: Path) -> None:
    """Commands answer on a full disk, with one warning. The trace file is new, or was there before."""
    began, new = folder / "began.jsonl", folder / "new" / "trace.jsonl"
    run_command(began)
    with began.open("ab") as out:  # to the end of a block, so that the next line needs another one
        out.write(b"\n" * (-out.tell() % 4096))
    there = began.read_bytes()
    assert b'"slmops status"' in there
    fill(folder / "fill")
    for trace in (began, new):
        said = run_command(trace)
        assert said.count("\n") == 1, said
        assert said.startswith(f"warning: the trace was not written to {trace}: No space left on device."), said
        assert "Free disk space" in said
    assert began.read_bytes() == there, "no half line"


def run_command(trace: Path) -> str:
    """Runs a command that needs no server; checks its answer and returns what it said besides."""
    environment = os.environ | {"SLMOPS_TRACE_FILE": str(trace), "SLMOPS_NATS_URL": "nats://127.0.0.1:1"}
    argv = [sys.executable, "-m", "slmops.console.app", "status", "--json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problem"]["code"] == "unreachable"
    return done.stderr


PASSED = "every check passed"


def run_on_a_small_disk(folder: Path, *arguments: str, stdin: str = "") -> str:
    """Runs this file as a process in a mount namespace, and skips the test if none can be made. Returns its output."""
    folder.mkdir(exist_ok=True)
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    argv = [*unshare, sys.executable, __file__, str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, input=stdin, env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode == CANNOT_MOUNT or "unshare:" in done.stderr:
        pytest.skip("mounting a small disk is not permitted on this machine")
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    folder = Path(sys.argv[1])
    mount(folder, "-t", "tmpfs", "-o", "size=800k", "tmpfs")
    asyncio.run({"journal": journal, "objects": objects, "health": health, "command": command}[sys.argv[2]](folder))
    print(PASSED)


if __name__ == "__main__":
    main()

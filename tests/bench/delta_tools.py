"""What everybody has for a difference of two files, on a tar of each side. A tool that is not installed is left out."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard

ZSTD = "zstd --patch-from, 19"


def tools() -> Mapping[str, Callable[[Path, Path, Path], int]]:
    """Each writes its delta from one file to another and says how many bytes it has."""
    programs = {ZSTD: "zstd", "xdelta3, 9": "xdelta3", "bsdiff": "bsdiff"}
    run = {ZSTD: _zstd, "xdelta3, 9": _xdelta3, "bsdiff": _bsdiff}
    found = {name: run[name] for name, program in programs.items() if shutil.which(program)}
    return found | {"chunks of 16 kB": _chunks}


def measured(base: Path, target: Path, scratch: Path) -> dict[str, Any]:
    """`{tool: {bytes, make_s}}`"""
    found = {}
    before, after = _tar(base, scratch / "base.tar"), _tar(target, scratch / "target.tar")
    for name, tool in tools().items():
        start = time.perf_counter()
        try:
            size = tool(before, after, scratch / "out")
        except subprocess.CalledProcessError as error:  # zstd 1.5.4 crashes on some pairs
            print(f"{name} failed with {error.returncode}", file=sys.stderr)
            continue
        found[name] = {"bytes": size, "make_s": round(time.perf_counter() - start, 2)}
        (scratch / "out").unlink(missing_ok=True)
    return found


def zstd_19(target: Path, scratch: Path) -> int:
    """The whole target, compressed."""
    source, out = _tar(target, scratch / "whole.tar"), scratch / "whole.zst"
    _run("zstd", "-q", "-f", "-19", "--long=27", "-T2", str(source), "-o", str(out))
    return out.stat().st_size


def _tar(folder: Path, out: Path) -> Path:
    with tarfile.open(out, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size = path.stat().st_size
                with path.open("rb") as source:
                    archive.addfile(entry, source)
    return out


def _zstd(base: Path, target: Path, out: Path) -> int:
    _run("zstd", "-q", "-f", "-19", "--long=27", f"--patch-from={base}", str(target), "-o", str(out))
    return out.stat().st_size


def _xdelta3(base: Path, target: Path, out: Path) -> int:
    _run("xdelta3", "-e", "-f", "-9", "-B", str(1 << 29), "-s", str(base), str(target), str(out))
    return out.stat().st_size


def _bsdiff(base: Path, target: Path, out: Path) -> int:
    _run("bsdiff", str(base), str(target), str(out))
    return out.stat().st_size


def _chunks(base: Path, target: Path, _out: Path) -> int:
    """Content-defined chunks that the base lacks, compressed one by one, as casync and its like fetch them."""
    known = {digest for digest, _ in _cut(base)}
    pack = zstandard.ZstdCompressor(level=9).compress
    return sum(len(pack(chunk)) + 32 for digest, chunk in _cut(target) if digest not in known)


def _cut(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """A boundary where 8 bytes, as a number times a constant, have 14 high bits of zero: about every 16 kB."""
    import numpy as np

    data = np.fromfile(path, np.uint8)
    step = 16 << 20
    start = 0
    for first in range(0, data.size, step):
        window = np.lib.stride_tricks.sliding_window_view(data[first : first + step + 7], 8)
        hashed = np.ascontiguousarray(window).view(np.uint64)[:, 0] * np.uint64(0x9E3779B97F4A7C15)
        for cut in np.flatnonzero(hashed >> np.uint64(50) == 0) + first + 1:
            if cut - start >= 2048:
                chunk = data[start:cut].tobytes()
                yield hashlib.sha256(chunk).digest(), chunk
                start = int(cut)
    if start < data.size:
        chunk = data[start:].tobytes()
        yield hashlib.sha256(chunk).digest(), chunk


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

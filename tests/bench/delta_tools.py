"""Runs common tools for binary differences on a tar of each side. Tools that are not installed are skipped."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard
from backports import zstd

ZSTD = "zstd --patch-from, 19"


def tools() -> Mapping[str, Callable[[Path, Path, Path], int]]:
    """Functions that write a delta between two files and return its size in bytes."""
    run = {"xdelta3": _xdelta3, "bsdiff": _bsdiff}
    return {ZSTD: _zstd, "chunks of 16 kB": _chunks} | {name: run[name] for name in run if shutil.which(name)}


def measure(base: Path, target: Path, scratch: Path) -> dict[str, Any]:
    """Returns `{tool: {bytes, make_s}}`."""
    found = {}
    before, after = _tar(base, scratch / "base.tar"), _tar(target, scratch / "target.tar")
    for name, tool in tools().items():
        start = time.perf_counter()
        size = tool(before, after, scratch / "theirs.delta")
        found[name] = {"bytes": size, "make_s": round(time.perf_counter() - start, 2)}
        (scratch / "theirs.delta").unlink(missing_ok=True)
    return found


def zstd_19(target: Path, scratch: Path) -> int:
    """Returns the size of the compressed whole target."""
    source = _tar(target, scratch / "whole.tar").read_bytes()
    return len(zstd.compress(source, options=_zstd_options(len(source))))


def _tar(folder: Path, out: Path) -> Path:
    with tarfile.open(out, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size = path.stat().st_size
                with path.open("rb") as source:
                    archive.addfile(entry, source)
    return out


def _zstd(base: Path, target: Path, _out: Path) -> int:
    """Does the same as `zstd -19 --patch-from`, with the library: Debian 12's zstd (1.5.4) crashes on some pairs."""
    before, after = zstd.ZstdDict(base.read_bytes(), is_raw=True), target.read_bytes()
    options = _zstd_options(len(before) + len(after))
    return len(zstd.compress(after, options=options, zstd_dict=before.as_prefix))


def _zstd_options(reach: int) -> dict[int, int]:
    """Returns parameters of level 19 with matches at any distance within `reach` bytes."""
    of = zstd.CompressionParameter
    return {of.compression_level: 19, of.window_log: reach.bit_length(), of.enable_long_distance_matching: 1}


def _xdelta3(base: Path, target: Path, out: Path) -> int:
    _run("xdelta3", "-e", "-f", "-9", "-B", str(1 << 29), "-s", str(base), str(target), str(out))
    return out.stat().st_size


def _bsdiff(base: Path, target: Path, out: Path) -> int:
    _run("bsdiff", str(base), str(target), str(out))
    return out.stat().st_size


def _chunks(base: Path, target: Path, _out: Path) -> int:
    """Returns the size of the content-defined chunks that the base lacks, each compressed, as casync fetches them."""
    known = {digest for digest, _ in _cut(base)}
    pack = zstandard.ZstdCompressor(level=9).compress
    return sum(len(pack(chunk)) + 32 for digest, chunk in _cut(target) if digest not in known)


def _cut(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yields digest and bytes of each chunk. A chunk ends where 8 bytes, multiplied by a constant, have 14 high zero
    bits: about every 16 kB."""
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

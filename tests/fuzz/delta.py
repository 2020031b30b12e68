"""Fuzzes the delta reader. Half of the files are raw bytes; the other half has chosen fields in well-formed frames,
which the fuzzer could not produce through the compression."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import atheris
import zstandard
from fuzz.harness import Target

with atheris.instrument_imports(include=["slmops.kit.delta"]):
    from slmops.kit.delta import apply, by_digest, describe, make

from slmops.contracts.descriptor import digest_of

BASE = b"0123456789"
_PACK = zstandard.ZstdCompressor(level=1).compress


def build(raw: bytes) -> bytes:
    chosen = atheris.FuzzedDataProvider(raw)
    if chosen.ConsumeBool():
        return chosen.ConsumeBytes(4096)
    target = [_file(chosen) for _ in range(chosen.ConsumeIntInRange(0, 3))]
    base = [{"path": "a.bin", "digest": digest_of(BASE), "size_bytes": len(BASE)}]
    header = json.dumps({"base": base if chosen.ConsumeBool() else [_file(chosen)], "target": target}).encode()
    records = b"".join(_record(chosen) for _ in range(chosen.ConsumeIntInRange(0, 4)))
    frame = _PACK(header)
    return struct.pack("<8sHI", b"SLMDELTA", 1, len(frame)) + frame + records + chosen.ConsumeBytes(8)


def _file(chosen: atheris.FuzzedDataProvider) -> dict[str, object]:
    path = chosen.PickValueInList(["x", "a/b", "../x", "/x", "", "a.bin"])
    digest = chosen.PickValueInList([digest_of(BASE), digest_of(b""), "sha512:00", digest_of(b"y")])
    return {"path": path, "digest": digest, "size_bytes": chosen.ConsumeIntInRange(-1, 40)}


def _record(chosen: atheris.FuzzedDataProvider) -> bytes:
    streams = [chosen.ConsumeBytes(chosen.ConsumeIntInRange(0, 24)) for _ in range(chosen.ConsumeIntInRange(0, 3))]
    packed = [_PACK(stream) if chosen.ConsumeBool() else stream for stream in streams]
    fixed = struct.pack(
        "<BBBBIQII",
        chosen.ConsumeIntInRange(0, 8),
        chosen.ConsumeIntInRange(0, 9),
        chosen.ConsumeIntInRange(0, 9),
        len(packed),
        chosen.ConsumeIntInRange(0, 2),
        chosen.ConsumeIntInRange(0, 20),
        chosen.ConsumeIntInRange(0, 20),
        chosen.ConsumeIntInRange(0, 40),
    )
    return fixed + struct.pack(f"<{len(packed)}I", *map(len, packed)) + b"".join(packed)


def read(data: bytes, folder: Path) -> None:
    """Checks that an applied delta writes only the files of its header, and nothing elsewhere."""
    delta, base, out = folder / "it.delta", folder / "a.bin", folder / "out"
    delta.write_bytes(data)
    base.write_bytes(BASE)
    try:
        made = apply(delta, by_digest(base), lambda file: out / file.path, limit_bytes=1 << 30, durable=False)
        describe(delta)
        assert all(path.resolve().is_relative_to(out.resolve()) for path in made)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "it.delta"]


def seeds() -> list[bytes]:
    """Returns a real delta for the raw-bytes mode, and bytes for the mode with chosen fields."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.bin").write_bytes(BASE)
        (folder / "b.bin").write_bytes(b"0123456799more")
        make(folder / "a.bin", folder / "b.bin", folder / "it.delta")
        return [(folder / "it.delta").read_bytes() + b"\1", bytes(range(256)), b"\0" * 200]


def target() -> Target:
    return Target(build, read, seeds)

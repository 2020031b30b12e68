"""Fuzzes the bundle reader with raw bytes, and with tars of chosen members under an index that may not match."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import atheris
from fuzz.harness import Target

with atheris.instrument_imports(include=["slmops.kit.bundle", "slmops.contracts.bundle"]):
    from slmops.contracts.bundle import INDEX_NAME, BundleIndex, blob_name
    from slmops.kit.bundle import BundleFile, write_bundle

from slmops.contracts.descriptor import digest_of

_NAMES = ["plan.json", blob_name(digest_of(b"a")), "metadata/timestamp.json", "../x", "/x", "", INDEX_NAME, "é"]
_TYPES = [tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.CHRTYPE]


def build(raw: bytes) -> bytes:
    chosen = atheris.FuzzedDataProvider(raw)
    if chosen.ConsumeBool():
        return chosen.ConsumeBytes(4096)
    files = [(chosen.PickValueInList(_NAMES), chosen.ConsumeBytes(3)) for _ in range(chosen.ConsumeIntInRange(0, 3))]
    files.sort()
    index = _index(chosen, files)
    if chosen.ConsumeBool():
        index[chosen.PickValueInList(list(index))] = chosen.PickValueInList([None, [], {}, "", 1, -1, 1 << 70])
    members = [(INDEX_NAME, json.dumps(index).encode()), *files]
    return b"".join(_member(chosen, *member) for member in members) + _end(chosen)


def _index(chosen: atheris.FuzzedDataProvider, files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Returns an index that mostly matches the files; otherwise the reader would never read them."""
    members = [
        {"name": name, "digest": digest_of(data), "size": len(data) + (chosen.ConsumeIntInRange(0, 15) == 15)}
        for name, data in files
    ]
    return {"format": 1, "blueprint": "b", "created_at": "2030-01-01T00:00:00Z", "packages": [], "members": members}


def _member(chosen: atheris.FuzzedDataProvider, name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    if chosen.ConsumeIntInRange(0, 7) == 7:
        info.type = chosen.PickValueInList(_TYPES)
        info.mode = chosen.ConsumeIntInRange(0, 0o777)
        info.linkname = chosen.PickValueInList(["", "/etc/passwd", "plan.json"])
    padding = bytes(-len(data) % 512) if chosen.ConsumeIntInRange(0, 7) else b"!" * (-len(data) % 512)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + padding


def _end(chosen: atheris.FuzzedDataProvider) -> bytes:
    return bytes(1024) if chosen.ConsumeIntInRange(0, 3) else chosen.ConsumeBytes(1100)


def read(data: bytes, folder: Path) -> None:
    """Checks that an accepted bundle has exactly the bytes that we would write for its content."""
    path, again = folder / "it.slmops", folder / "again.slmops"
    path.write_bytes(data)
    bundle = BundleFile(path)
    bundle.check()
    assert BundleIndex.decode(bundle.index.model_dump_json().encode()) == bundle.index
    content: dict[str, bytes | Path] = {m.name: bundle.read(m.name, 4096) for m in bundle.index.members}
    write_bundle(again, bundle.index, content)
    assert {m.name: BundleFile(again).read(m.name, 4096) for m in bundle.index.members} == content
    again.unlink()


def target() -> Target:
    return Target(build, read, lambda: [b"\0" * 300, bytes(range(256)), b"\0" + b"\xff" * 300])

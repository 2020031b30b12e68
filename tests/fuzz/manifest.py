"""Fuzzes the manifest reader with raw bytes, and with chosen JSON in the fields that the reader uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import atheris
from fuzz.harness import Target

with atheris.instrument_imports(include=["slmops.contracts"]):
    from slmops.contracts.manifest import Manifest, layers_by_path

from slmops.contracts.descriptor import digest_of

_TEXTS = ["weights.onnx", "../x", "/etc/passwd", "a/../b", "", ".", "a\0b", "a\\b", "manifest.json", "model.sig", "é"]
_DIGESTS = [digest_of(b"a"), digest_of(b"b"), "sha256:zz", "sha512:00", "", "SHA256:" + "0" * 64]


def build(raw: bytes) -> bytes:
    chosen = atheris.FuzzedDataProvider(raw)
    if chosen.ConsumeBool():
        return chosen.ConsumeBytes(4096)
    document: dict[str, Any] = {
        "schemaVersion": chosen.PickValueInList([2, 1, "2", None, 2.0]),
        "config": _descriptor(chosen),
        "layers": [_descriptor(chosen) for _ in range(chosen.ConsumeIntInRange(0, 4))],
        "annotations": chosen.PickValueInList([{}, {"a": "b"}, {"a": 1}, [], None]),
    }
    if chosen.ConsumeBool():
        document.pop(chosen.PickValueInList(list(document)))
    return json.dumps(document).encode() + chosen.ConsumeBytes(2)


def _descriptor(chosen: atheris.FuzzedDataProvider) -> Any:
    size = chosen.PickValueInList([0, 5, -1, 1 << 62, 1 << 70, "5", 0.5, None])
    path = chosen.PickValueInList(_TEXTS) if chosen.ConsumeBool() else chosen.ConsumeUnicode(20)
    found = {
        "mediaType": chosen.PickValueInList(["application/vnd.cncf.model.weight.v1.raw", "", 7]),
        "digest": chosen.PickValueInList(_DIGESTS),
        "size": size,
        "annotations": {"org.cncf.model.filepath": path} if chosen.ConsumeBool() else {},
    }
    return found if chosen.ConsumeBool() else chosen.PickValueInList([found, None, [], "x"])


def read(data: bytes, _folder: Path) -> None:
    """Checks that an accepted manifest names only files inside its folder and is unchanged by encoding it again."""
    manifest = Manifest.decode(data)
    for path in layers_by_path(manifest):
        assert not Path(path).is_absolute()
        assert ".." not in Path(path).parts
    assert Manifest.decode(manifest.encode()) == manifest


def target() -> Target:
    return Target(build, read, lambda: [bytes(range(256)), b"\0" * 300, b"\1" + b"{}"])

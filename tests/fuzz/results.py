"""Fuzzes the reader of results files with raw bytes, and with chosen lines under a valid seal."""

from __future__ import annotations

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import atheris
from fuzz.harness import Target

with atheris.instrument_imports(include=["slmops.kit.sealed_results", "slmops.contracts.results"]):
    from slmops.contracts.results import ResultsSeal
    from slmops.kit.sealed_results import ResultsFile

from slmops.kit.bus.nats_auth import new_user_seed, public_key, sign

SEED = new_user_seed()
_SUBJECTS = [
    "measure.gw-1",
    "slmops.gateway.reported.v1.gw-1",
    "slmops.gateway.reported.v1.gw-2",
    "",
    "cmd.rollout.enrol",
]


def build(raw: bytes) -> bytes:
    chosen = atheris.FuzzedDataProvider(raw)
    if chosen.ConsumeBool():
        return chosen.ConsumeBytes(4096)
    lines = b"".join(_line(chosen) for _ in range(chosen.ConsumeIntInRange(0, 3)))
    seal = ResultsSeal.model_validate(
        {
            "gateway_id": "gw-1",
            "blueprint": "b",
            "public_key": public_key(SEED),
            "created_at": "2030-01-01T00:00:00Z",
            "messages": lines.count(b"\n"),
            "digest": f"sha256:{sha256(lines).hexdigest()}",
        }
    )
    signature = base64.b64encode(sign(SEED, seal.statement)).decode()
    return lines + seal.model_copy(update={"signature": signature}).model_dump_json().encode() + b"\n"


def _line(chosen: atheris.FuzzedDataProvider) -> bytes:
    if chosen.ConsumeIntInRange(0, 3) == 3:
        return chosen.ConsumeBytes(30) + b"\n"
    payload: dict[str, Any] = {
        "gateway_id": chosen.PickValueInList(["gw-1", "gw-2", "", None]),
        "blueprint": "b",
        "sequence": chosen.PickValueInList([1, 0, -1, 1 << 70, "1"]),
        "phase": chosen.PickValueInList(["committed", "x", None]),
        "at": chosen.PickValueInList(["2030-01-01T00:00:00Z", "never", 1e400]),
    }
    headers = {
        "ce-id": "1",
        "ce-source": "s",
        "ce-type": "slmops.gateway.reported.v1",
        "ce-time": "2030-01-01T00:00:00Z",
        "Nats-Msg-Id": chosen.PickValueInList(["1", "2", ""]),
    }
    if chosen.ConsumeIntInRange(0, 7) == 7:
        headers[chosen.ConsumeUnicodeNoSurrogates(8)] = "x"
    message = {"subject": chosen.PickValueInList(_SUBJECTS), "headers": headers, "payload": json.dumps(payload)}
    return json.dumps(message).encode() + b"\n"


def read(data: bytes, folder: Path) -> None:
    """Checks that accepted messages belong to the gateway that sealed them and are on its own subjects."""
    path = folder / "it.slmops-results"
    path.write_bytes(data)
    found = ResultsFile(path)
    for message in found.messages():
        assert message.subject in _SUBJECTS[:2]
        assert json.loads(message.payload)["gateway_id"] == found.seal.gateway_id == "gw-1"


def target() -> Target:
    return Target(build, read, lambda: [b"\0" * 300, bytes(range(256)), b"\0" + b"\xff" * 300])

"""Spans of one trace across messages and processes in the trace file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from slmops.kit.tracing import span, traceparent

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SCRIPT = """
import sys
from pathlib import Path
from slmops.kit.settings import BusSettings
from slmops.kit.tracing import setup, span, traceparent
provider = setup(sys.argv[1], BusSettings(trace_file=Path(sys.argv[2])))
with span("outer", parent=sys.argv[3], size_bytes=3):
    with span("inner"):
        print(traceparent())
provider.shutdown()
"""


def traced(service: str, file: Path, parent: str) -> str:
    argv = [sys.executable, "-c", SCRIPT, service, str(file), parent]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def test_one_trace_goes_through_two_processes(tmp_path: Path) -> None:
    file = tmp_path / "traces" / "all.jsonl"
    handed_on = traced("registry", file, PARENT)
    traced("optimizer", file, handed_on)
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    assert {s["context"]["trace_id"] for s in spans} == {"0x" + PARENT.split("-")[1]}
    assert {s["resource"]["attributes"]["service.name"] for s in spans} == {"registry", "optimizer"}
    by_id = {s["context"]["span_id"]: s for s in spans}
    assert len(by_id) == 4
    chain = [next(s for s in spans if s["name"] == "inner" and "optimizer" in str(s["resource"]))]
    while (parent := chain[-1]["parent_id"]) in by_id:
        chain.append(by_id[parent])
    assert [s["name"] for s in chain] == ["inner", "outer", "inner", "outer"]
    assert chain[-1]["parent_id"] == "0x" + PARENT.split("-")[2]
    assert chain[-1]["attributes"] == {"size_bytes": 3}


def test_outside_of_a_trace_there_is_no_parent() -> None:
    assert traceparent() is None


def test_a_malformed_parent_starts_a_new_trace() -> None:
    with span("work", parent=PARENT):
        assert PARENT.split("-")[1] in (traceparent() or "")
    with span("work", parent="garbage"):
        assert "garbage" not in (found := traceparent() or "")
        assert PARENT.split("-")[1] not in found

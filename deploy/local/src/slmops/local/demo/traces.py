"""Reads the spans in the trace files of the processes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class TraceSummary(BaseModel):
    trace_id: str
    spans: int
    services: list[str]


def summarize(folder: Path, trace_id: str) -> TraceSummary:
    """Returns the number of spans of a trace and their services. `trace_id` is 32 hexadecimal digits."""
    mine = [span for span in spans(folder) if span["context"]["trace_id"].removeprefix("0x") == trace_id]
    services = {str(span["resource"]["attributes"]["service.name"]) for span in mine}
    return TraceSummary(trace_id=trace_id, spans=len(mine), services=sorted(services))


def spans(folder: Path) -> Iterable[dict[str, Any]]:
    """Yields every span of every file. Skips incomplete lines, which a killed process may leave."""
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                yield json.loads(line)
            except ValueError:
                continue

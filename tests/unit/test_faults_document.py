"""`docs/faults.md` names a test for every fault, and each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "faults.md").read_text()


def test_every_fault_names_tests_that_exist() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(rows) >= 30
    assert [row for row in rows if row.count(" | ") != 3] == [], "a row has four columns"
    named = {row: re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows}
    assert [row for row, tests in named.items() if not tests] == []
    sources = {path.name: path.read_text() for path in ROOT.glob("tests/**/test_*.py")}
    missing = [
        f"{file}::{test}"
        for tests in named.values()
        for file, test in tests
        if f"def {test}(" not in sources.get(file, "")
    ]
    assert missing == []

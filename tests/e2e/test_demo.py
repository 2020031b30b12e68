"""The demo as a user starts it, with a real model and real servers; its bad version must be refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SLMOPS = Path(sys.executable).parent / "slmops"


def processes_of(folder: Path) -> list[str]:
    """Returns the command lines of the processes that run below `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) or str(folder) in process.cwd():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow  # the loop with a tiny model is in test_loop.py
@pytest.mark.timeout(900)
def test_the_demo_completes_the_first_rollout_rolls_back_the_second_and_reports_both(tmp_path: Path) -> None:
    done = subprocess.run([SLMOPS, "demo", "--out", tmp_path], capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    assert (report["model"]["name"], report["model"]["version"]) == ("smollm2", "1.0.0")
    gates = {(v["version"], v["recipe"]): v["gate"] for v in report["variants"]}
    passed = {(v, r): "passed" for v in ("1.0.0", "1.0.1") for r in ("int4", "int8")}
    # The embedding of the second version differs too much for an update anchored on the first: it is refused early.
    assert gates == passed | {("1.0.1", "int4-anchored"): "refused"}
    assert done.stdout.count("int4 chosen, being packaged") == 2  # the smaller of those that pass
    for variant in (v for v in report["variants"] if v["gate"] == "passed"):
        figures = ("bytes", "kl", "top1", "ppl", "tokens_per_s", "ttft_s", "peak_rss_bytes")
        assert all(variant[figure] > 0 for figure in figures), variant
    assert [(r["version"], r["outcome"]) for r in report["rollouts"]] == [
        ("1.0.0", "completed"),
        ("1.0.1", "rolled_back"),
    ]
    assert [g["id"] for g in report["gateways"]] == ["gw-1", "gw-2", "gw-3"]
    for gateway in report["gateways"]:
        assert gateway["version"] == "1.0.0"
        assert "Paris" in gateway["answer"]
        assert gateway["failed_requests"] == 0
    assert len(report["trace"]["services"]) == 7
    assert report["trace"]["trace_id"] in done.stdout
    assert processes_of(tmp_path) == []


def test_ctrl_c_stops_the_demo_and_all_its_processes(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [SLMOPS, "demo", "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while len(processes_of(tmp_path)) < 6 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(processes_of(tmp_path)) >= 6
    os.kill(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert "Traceback" not in output
    assert processes_of(tmp_path) == []

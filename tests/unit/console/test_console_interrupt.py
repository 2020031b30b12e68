"""Ctrl-C, a wrong setting and a missing module: one clean line each, by the command line and by services."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPT = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
SERVICES = ("registry", "optimizer", "packager", "rollout", "telemetry", "gateway")


def run(home: Path, *argv: str, **environment: str) -> tuple[int, list[str]]:
    """Returns the exit code and the lines on stderr. Modules in the folder `home` hide installed ones."""
    path = os.pathsep.join([str(home), *sys.path])
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-m", *argv], env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("module", ["typer", "rich", "minio"])
def test_ctrl_c_before_a_command_runs_is_one_line(module: str, tmp_path: Path) -> None:
    """The interrupt arrives while the command line imports its libraries. `minio` is one that only `up` imports."""
    (tmp_path / f"{module}.py").write_text(INTERRUPT)
    assert run(tmp_path, "slmops.console", "up", "--data", str(tmp_path / "data")) == (130, ["Interrupted."])


def test_a_missing_module_of_a_command_is_named_with_its_package(tmp_path: Path) -> None:
    (tmp_path / "tuf.py").write_text("raise ModuleNotFoundError(\"No module named 'tuf'\", name='tuf')\n")
    code, lines = run(tmp_path, "slmops.console", "trust", "ceremony", "--folder", str(tmp_path / "tuf"))
    assert (code, lines[0]) == (1, "error [not_found]: the Python module tuf is not installed")
    assert lines[1:] == ["  fix:   Install it: pip install 'slmops-shared[trust]'"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_wrong_log_level_is_one_line(service: str, tmp_path: Path) -> None:
    settings = {"SLMOPS_LOG_LEVEL": "loud", "SLMOPS_GATEWAY_ID": "gw-1", "SLMOPS_BLUEPRINT": "edge-chat"}
    code, lines = run(tmp_path, f"slmops.{service}.app", **settings)
    assert (code, len(lines)) == (65, 1), lines
    assert "SLMOPS_LOG_LEVEL: Value error, use one of DEBUG, INFO" in lines[0]


def test_a_wrong_log_level_of_a_command_is_an_error_with_its_name(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "slmops.console", "model", "ls", SLMOPS_LOG_LEVEL="loud")
    assert (code, len(lines)) == (65, 2), lines
    assert "SLMOPS_LOG_LEVEL" in lines[0]


def test_a_missing_extra_of_a_service_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ModuleNotFoundError(\"No module named 'psycopg'\", name='psycopg')\n")
    code, lines = run(tmp_path, "slmops.registry.app", SLMOPS_DATABASE_URL="postgresql+psycopg://x@127.0.0.1:1/x")
    assert (code, len(lines)) == (1, 1), lines
    assert "pip install 'slmops-shared[journal]'" in lines[0]

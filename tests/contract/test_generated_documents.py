"""The generated documents match the code, and a stale document is detected and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.contracts.commands import COMMANDS, Command
from slmops.contracts.events import EVENTS, Event

ROOT = Path(__file__).parents[2]
TABLES = {"gateway", "registry", "rollout"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    done = run("--into", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def references(value: Any) -> Iterator[str]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from references(part)
    if isinstance(value, dict) and isinstance(value.get("$ref"), str):
        yield value["$ref"]


def test_every_event_and_command_is_documented(documents: Path) -> None:
    text = (documents / "events.md").read_text()
    kinds: list[type[Event] | type[Command[Any]]] = [*EVENTS.values(), *COMMANDS.values()]
    for kind in kinds:
        assert f"### {kind.__name__}\n" in text
        assert f"`{kind.subject_template()}`" in text
    anchors = {line[4:].lower() for line in text.splitlines() if line.startswith("### ")}
    linked = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert linked - anchors == set()


def test_every_transition_table_is_drawn(documents: Path) -> None:
    assert {path.stem for path in (documents / "states").iterdir()} == TABLES
    for path in (documents / "states").iterdir():
        assert "```mermaid\nstateDiagram-v2\n    [*] --> " in path.read_text()


def test_every_interface_resolves_its_references(documents: Path) -> None:
    answered: set[str] = set()
    for path in (documents / "asyncapi").iterdir():
        document = json.loads(path.read_text())
        for reference in references(document):
            found = document
            for part in reference.removeprefix("#/").split("/"):
                found = found[part]
        answered |= {str(channel["address"]) for channel in document["channels"].values()}
    assert {
        kind.subject_template() + ("" if kind.anonymous or kind.per_gateway else ".{role}.{sender}")
        for kind in COMMANDS.values()
    } <= answered


def test_the_same_code_gives_the_same_documents(documents: Path) -> None:
    again = run("--check", "--into", str(documents), PYTHONHASHSEED="7", SLMOPS_NATS_URL="nats://elsewhere:4222")
    assert again.returncode == 0, again.stderr


def test_a_stale_document_is_named_with_what_to_do(documents: Path, tmp_path: Path) -> None:
    shutil.copytree(documents, tmp_path, dirs_exist_ok=True)
    changed, missing, left_over = (tmp_path / name for name in ("events.md", "states/rollout.md", "states/melted.md"))
    changed.write_text("old")
    missing.unlink()
    left_over.write_text("old")
    done = run("--check", "--into", str(tmp_path))
    assert done.returncode == 1
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == [str(changed), str(left_over), str(missing)]
    assert all("make docs" in line for line in done.stderr.splitlines())
    assert run("--into", str(tmp_path)).returncode == 0
    assert (changed.read_text(), missing.exists(), left_over.exists()) == (
        (documents / "events.md").read_text(),
        True,
        False,
    )

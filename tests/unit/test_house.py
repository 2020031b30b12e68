"""The house rules that no linter knows: the same rooms everywhere, small files, no drawers for odds and ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PORTIONS = sorted(ROOT.glob("*/*/src/slmops/*")) + sorted(ROOT.glob("shared/src/slmops/*"))
SERVICES = sorted(path.parent for path in ROOT.glob("services/*/pyproject.toml"))
SOURCES = sorted(path for folder in ("shared", "services", "deploy") for path in ROOT.glob(f"{folder}/**/src/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
ROOMS = {"__init__", "app", "handlers", "domain", "store", "settings"}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
MAX_LINES = 500
MAX_MODULES = 30
"""On one floor: the commands of the console, and the contracts, are that many; nothing else comes near it."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(service: Path) -> set[str]:
    home = service / "src" / "slmops" / service.name
    return {path.stem for path in home.glob("*.py")} | {
        path.name for path in home.iterdir() if (path / "__init__.py").exists()
    }


def test_the_namespace_belongs_to_nobody() -> None:
    assert [relative(path) for path in ROOT.glob("**/slmops/__init__.py") if "site-packages" not in path.parts] == []


def test_there_is_something_to_check() -> None:
    assert {"contracts", "kit", "local", "registry", "gateway"} <= {path.name for path in PORTIONS}
    assert len(SOURCES) > 50


@pytest.mark.parametrize("path", [p for p in PORTIONS if p.is_dir() and p.name != "__pycache__"], ids=relative)
def test_a_portion_says_in_one_line_what_it_is(path: Path) -> None:
    lines = (path / "__init__.py").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('"""')
    assert lines[0].endswith('."""')


@pytest.mark.parametrize("service", SERVICES, ids=lambda p: p.name)
def test_a_service_has_the_rooms_of_every_service(service: Path) -> None:
    """A room that is missing, or an engine beside them, is named in the service's README: `store.py`, `delta.py`, …"""
    present = modules(service)
    readme = (service / "README.md").read_text()
    explained = {
        name for name in (ROOMS - present) | (present - ROOMS) if re.search(rf"`({name}|{name}\.py|{name}/)`", readme)
    }
    assert sorted((ROOMS - present) - explained) == [], "rooms that are missing without a reason in README.md"
    assert sorted((present - ROOMS) - explained) == [], "engines that README.md does not name"


@pytest.mark.parametrize("service", SERVICES, ids=lambda p: p.name)
def test_a_distribution_is_named_after_its_folder(service: Path) -> None:
    assert f'name = "slmops-{service.name}"' in (service / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_a_file_holds_one_idea(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert path.stem not in DRAWERS
    if path in SOURCES and text.strip():
        assert text.lstrip().startswith(('"""', "#!")), "it does not say what it is"


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=relative)
def test_a_folder_is_no_drawer(folder: Path) -> None:
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MAX_MODULES
    folders = [path for path in folder.iterdir() if (path / "__init__.py").exists()]
    assert len(modules) != 1 or folders or folder.name in ("local", "demo"), "a folder of one file"


def test_every_place_that_a_reader_is_sent_to_exists() -> None:
    rows = re.findall(r"^\| .+\? \| `(.+)` \|$", (ROOT / "docs" / "where.md").read_text(), re.MULTILINE)
    assert len(rows) == 20
    assert [row for row in rows if not (ROOT / row).is_file()] == []


def test_tests_are_no_packages_and_have_names_of_their_own() -> None:
    assert [relative(path) for path in ROOT.glob("tests/**/__init__.py")] == []
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_a_command_line_or_a_process_of_its_own_exits(path: Path) -> None:
    """An exit code is chosen where a process begins: a `main`, a command, the service's run loop."""
    exits = [n for n, line in enumerate(path.read_text().splitlines(), 1) if "sys.exit(" in line or "os._exit(" in line]
    begins = (
        "__main__" in path.read_text()
        or "console" in path.parts
        or path.name in ("command.py", "service.py", "process.py")
    )
    assert not exits or begins, f"lines {exits}"

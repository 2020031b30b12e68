"""Repository rules that no linter checks: the same modules in every service, small files, no catch-all modules."""

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
"""Highest number of modules in one folder. Only the console's commands and the contracts come near it."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(service: Path) -> set[str]:
    home = service / "src" / "slmops" / service.name
    return {path.stem for path in home.glob("*.py")} | {
        path.name for path in home.iterdir() if (path / "__init__.py").exists()
    }


def test_no_distribution_owns_the_namespace() -> None:
    assert [relative(path) for path in ROOT.glob("**/slmops/__init__.py") if "site-packages" not in path.parts] == []


def test_there_is_something_to_check() -> None:
    assert {"contracts", "kit", "local", "registry", "gateway"} <= {path.name for path in PORTIONS}
    assert len(SOURCES) > 50


@pytest.mark.parametrize("path", [p for p in PORTIONS if p.is_dir() and p.name != "__pycache__"], ids=relative)
def test_a_package_docstring_has_one_line(path: Path) -> None:
    lines = (path / "__init__.py").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('"""')
    assert lines[0].endswith('."""')


@pytest.mark.parametrize("service", SERVICES, ids=lambda p: p.name)
def test_every_service_has_the_same_modules(service: Path) -> None:
    """A missing module, and an additional engine, must be named in the service's README: `store.py`, `delta.py`, …"""
    present = modules(service)
    readme = (service / "README.md").read_text()
    explained = {
        name for name in (ROOMS - present) | (present - ROOMS) if re.search(rf"`({name}|{name}\.py|{name}/)`", readme)
    }
    assert sorted((ROOMS - present) - explained) == [], "missing modules that README.md does not explain"
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
        assert text.lstrip().startswith(('"""', "#!")), "the module has no docstring"


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES}), ids=relative)
def test_a_folder_is_not_too_large_or_too_small(folder: Path) -> None:
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MAX_MODULES
    folders = [path for path in folder.iterdir() if (path / "__init__.py").exists()]
    assert len(modules) != 1 or folders or folder.name in ("local", "demo", "versions"), "the folder has only one file"


def test_every_file_in_where_md_exists() -> None:
    rows = re.findall(r"^\| .+\? \| `(.+)` \|$", (ROOT / "docs" / "where.md").read_text(), re.MULTILINE)
    assert len(rows) >= 20
    assert [row for row in rows if not (ROOT / row).is_file()] == []


def test_test_folders_are_not_packages_and_test_modules_have_unique_names() -> None:
    assert [relative(path) for path in ROOT.glob("tests/**/__init__.py")] == []
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_an_entry_point_of_a_process_exits(path: Path) -> None:
    """Only a process's entry point chooses an exit code: a `main`, a command, the service's run loop."""
    exits = [n for n, line in enumerate(path.read_text().splitlines(), 1) if "sys.exit(" in line or "os._exit(" in line]
    begins = (
        "__main__" in path.read_text()
        or "console" in path.parts
        or path.name in ("command.py", "main.py", "service.py", "process.py")
    )
    assert not exits or begins, f"lines {exits}"

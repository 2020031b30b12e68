"""Each distribution declares its imports, and the gateway's depends on no other service."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "slmops-shared": ROOT / "shared",
    "slmops-local": ROOT / "deploy" / "local",
    **{f"slmops-{path.parent.name}": path.parent for path in (ROOT / "services").glob("*/pyproject.toml")},
}
# Imported only where an extra or another distribution provides them.
OPTIONAL = {
    "slmops-shared": {
        *("sqlalchemy", "alembic", "minio", "httpx", "urllib3", "opentelemetry-exporter-otlp-proto-http", "gguf"),
        *(
            "cryptography",
            "model-signing",
            "tuf",
            "securesystemslib",
            "numpy",
            "zstandard",
            "faststream",
            "uvicorn",
            "aiohttp",
        ),
    },
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(distribution: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Returns every distribution that is installed with this one, including itself."""
    found, waiting = set(), [(normal(distribution), extras)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (wanted or {""})):
                waiting.append((normal(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


def imported(folder: Path) -> set[str]:
    """Returns imported top-level modules outside the standard library and slmops."""
    found: set[str] = set()
    for path in (folder / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"slmops"}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_import_is_declared(name: str) -> None:
    brought, providers = declared(name), packages_distributions()
    missing = {
        module
        for module in imported(FOLDERS[name])
        if not {normal(p) for p in providers.get(module, [module])} & (brought | OPTIONAL.get(name, set()))
    }
    assert missing == set()


def test_a_gateway_installs_without_unneeded_dependencies() -> None:
    services = ("access", "optimizer", "packager", "registry", "rollout", "telemetry", "console")
    others = {f"slmops-{name}" for name in services}
    heavy = {"torch", "transformers", "sqlalchemy", "psycopg", "minio", "gguf", "accelerate", "typer", "faststream"}
    assert declared("slmops-gateway") & (others | heavy) == set()


@pytest.mark.parametrize("service", ["access", "registry", "packager", "rollout", "telemetry"])
def test_the_wheel_of_a_service_contains_its_migrations(service: str, tmp_path: Path) -> None:
    folder = FOLDERS[f"slmops-{service}"]
    (wheel,) = WheelBuilder(str(folder)).build(directory=str(tmp_path))
    revisions = {str(path.relative_to(folder / "src")) for path in folder.glob("src/**/migrations/versions/*.py")}
    assert revisions
    assert revisions <= set(ZipFile(wheel).namelist())

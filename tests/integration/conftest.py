"""Empty databases, and a tiny random Llama as the gateway gets it: an onnxruntime-genai folder, built once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import pytest_asyncio
from filelock import FileLock
from sqlalchemy import create_engine, text

from slmops.contracts.descriptor import digest_of

if TYPE_CHECKING:
    from slmops.gateway.serving.runner import ProcessRunner

MakeRunner = Callable[..., "ProcessRunner"]


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yields the URL of an empty database of this test: a file of its own, or its own database on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/journal.db"
        return
    server: str = request.getfixturevalue("postgres")
    name = f"test_{uuid4().hex}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.rpartition("/")[0] + f"/{name}"
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(scope="session")
def genai_model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Returns an int4 model with random weights: fast, and greedy decoding always gives the same meaningless text.

    Built once: the workers of pytest-xdist share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "genai-model"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _build_genai_model(folder, tmp_path_factory.mktemp("tiny"))
    return folder


def _build_genai_model(folder: Path, scratch: Path) -> None:
    from tiny_model import make_tiny_llama  # imported here because it loads torch

    make_tiny_llama(scratch / "hf")
    # In a process of its own: the builder changes sys.path and loads torch.
    builder = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", "-c", str(scratch / "cache")]
    done = subprocess.run(
        [sys.executable, *builder, "-i", scratch / "hf", "-o", scratch / "genai"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"the genai builder failed:\n{done.stderr[-2000:]}")
    (scratch / "genai").rename(folder)


@pytest_asyncio.fixture
async def make_runner(genai_model: Path) -> AsyncIterator[MakeRunner]:
    """Yields a factory of runners of the tiny model, not started. Kills those that still run after the test."""
    from slmops.gateway.serving.inference import Release
    from slmops.gateway.serving.runner import ProcessRunner, RunnerOptions

    runners: list[ProcessRunner] = []

    def make(version: str = "1.0.0", model_dir: Path = genai_model, **options: object) -> ProcessRunner:
        release = Release(digest_of(version.encode()), "tiny", version)
        runners.append(ProcessRunner(release, model_dir, RunnerOptions(**options)))  # type: ignore[arg-type]
        return runners[-1]

    yield make
    for runner in runners:
        if runner.alive:
            await runner.kill()
